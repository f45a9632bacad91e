"""Notices optimizer steps, whichever optimizer makes them, that nobody tells SNELLA of.

By torch's hook for all optimizers: fused ones leave no other trace in the parameters they change.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from snella.errors import UserError

# Training steps seen without a hook before they are taken to be forgotten; a loaded state or a
# learning-rate finder may step a few times before training begins.
PATIENCE = 3


class Watched:
    """What of a layer is watched: steps on its parameters since a hook was called."""

    unseen_steps = 0


# By the id of a trained parameter; its layer may be gone, and the id be another object's now.
_watched: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Watched]]] = {}


def watch(parameter: Tensor, layer: Watched) -> None:
    """Count the optimizer steps on this parameter as the layer's."""
    known = _watched.get(id(parameter))
    if known is None or known[0]() is not parameter or known[1]() is not layer:
        _watched[id(parameter)] = weakref.ref(parameter), weakref.ref(layer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    forgotten = False
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            known = _watched.get(id(parameter))
            if known is None or known[0]() is not parameter:
                continue
            layer = known[1]()
            if layer is not None:
                layer.unseen_steps += 1
                forgotten |= layer.unseen_steps > PATIENCE
    if forgotten:
        raise UserError(
            "SNELLA's budget allocation needs two calls that were never made: "
            "model.on_epoch_start(epoch, epochs) before every epoch and model.on_step_end() "
            "after every optimizer.step(), before zero_grad() (with transformers' Trainer: "
            "callbacks=[SnellaCallback()]). To train without, set allocation=False."
        )


register_optimizer_step_post_hook(_after_step)
