"""Whether training calls the hooks, and in the right order: told by the order of events.

Events are forward passes that record a graph (F), optimizer steps (S), which torch reports for all
its optimizers (fused ones leave no other trace in what they change), and calls of on_step_end (H).
Right is F S H. A compiled or captured model shows no F, but gradients tell that they are the ones
of before; a hand-written optimizer shows no S; where nothing is seen, nothing is concluded.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from snella.errors import UserError

# Steps of one optimizer without a hook before the hooks are taken to be forgotten; a loaded state
# or a learning-rate finder may step a few times before training begins.
PATIENCE = 3
# Factors known, beyond which those of deleted models are looked for.
_MANY = 10_000

FORGOTTEN = (
    "SNELLA's budget allocation needs two calls that were never made: "
    "model.on_epoch_start(epoch, epochs) before every epoch and model.on_step_end() "
    "after every optimizer.step(), before zero_grad() (with transformers' Trainer: "
    "callbacks=[SnellaCallback()]). To train without, set allocation=False."
)
TOO_EARLY = (
    "SNELLA's on_step_end() was called before optimizer.step(): call it after optimizer.step() and "
    "before zero_grad()."
)
TOO_OFTEN = (
    "SNELLA's on_step_end() was called without an optimizer step since its last call: call it "
    "once per optimizer.step(); with gradient accumulation not after every micro-batch "
    "(accelerate: only if accelerator.sync_gradients)."
)
TWICE = "SNELLA's on_step_end() was called twice for one step: call it once per optimizer.step()."

# By the id of a trained factor: the layer and the name of the adapter that hold it (it may be gone,
# and the id be another's), and its adapter's watch. Not the factor itself: tensors with weak
# references cannot be swapped (torch.__future__.set_swap_module_params_on_conversion).
_watched: dict[int, tuple[weakref.ref[Any], str, Watch]] = {}
# Optimizers that have stepped. Watches are copied and saved with their model, optimizers not.
_optimizers: weakref.WeakKeyDictionary[Watch, weakref.WeakSet[Optimizer]]
_optimizers = weakref.WeakKeyDictionary()


class Watch:
    """The events of one adapter's training; shared by its layers."""

    def __init__(self) -> None:
        self.forwards_ever = self.steps_ever = False
        self.forward = self.hooked = False  # an F since the last H; an H at all
        self.right = False  # an H after an S was seen: what follows does not mistake the order
        self.taken: tuple[Tensor, int] | None = None  # a gradient of the last H, till right
        self.steps = 0  # S since the last H
        self.unseen: Counter[int] = Counter()  # S since any hook, by optimizer
        self.left_out: Tensor | None = None  # above 0: optimizers left S out, since the last H

    def on_forward(self, layer: Any, name: str) -> None:
        """F of a layer with this adapter."""
        factor = layer._part("snella_A", name)
        if factor is not None and factor.requires_grad:
            self.forward = self.forwards_ever = True
            self.know(layer, name)

    def know(self, layer: Any, name: str) -> None:
        """Of this factor the optimizer steps are counted."""
        key = id(layer._part("snella_A", name))
        known = _watched.get(key)
        if known is None or known[2] is not self or known[0]() is not layer:
            if len(_watched) > _MANY:
                for old in [key for key, (alive, _, _) in _watched.items() if alive() is None]:
                    del _watched[old]
            _watched[key] = weakref.ref(layer), name, self

    def on_step(self, optimizer: Optimizer, grads: list[Tensor]) -> None:
        """S of an optimizer that holds factors with these gradients; raises ``UserError``."""
        _optimizers.setdefault(self, weakref.WeakSet()).add(optimizer)
        self.steps_ever = True
        self.steps += 1
        self.unseen[id(optimizer)] += 1
        # A fused optimizer leaves a step out itself, where a gradient scaler has told it so.
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        if found is not None:
            before = self.left_out
            self.left_out = found if before is None else before + found.to(before.device)
        if self.unseen[id(optimizer)] > PATIENCE:
            raise UserError(FORGOTTEN)
        stale = not self.forward if self.forwards_ever else self._took(grads)
        if self.hooked and self.steps == 1 and not self.right and stale:
            raise UserError(TOO_EARLY)

    def _took(self, grads: list[Tensor]) -> bool:
        """Whether the last H took these, and no backward pass has changed them since."""
        if self.taken is None:
            return False
        taken, version = self.taken
        return taken._version == version and any(grad is taken for grad in grads)

    def on_epoch_start(self) -> None:
        """The other hook: training calls hooks."""
        self.unseen.clear()
        self.left_out = None

    @property
    def passed_by(self) -> bool:
        """Whether forwards are seen, and the last step had none: its batch needs no adapter."""
        return self.forwards_ever and not self.forward

    def on_step_end(self, grads: list[Tensor | None]) -> Tensor | bool:
        """H, with the step's gradients: whether the step was left out for one that is not finite.

        A scaler leaves out the steps of an optimizer that has such a gradient, though it need not
        be one of the adapter, and then may not have unscaled the others. On the device, where only
        that knows. Raises ``UserError`` if the events before are wrong.
        """
        left_out = False if self.left_out is None else (self.left_out > 0).any()
        if self.hooked and self.steps == 0:
            on_host = all(g is None or g.device.type == "cpu" for g in grads)
            # Elsewhere it may be a captured graph, which shows no F and no S.
            if self.steps_ever and (self.forward or (on_host and not self.forwards_ever)):
                if _finite(grads + self._other_gradients()):
                    raise UserError(TOO_OFTEN)
                left_out = _finite(grads)  # else the scores see it themselves
            elif self.forwards_ever and not self.forward and on_host:
                raise UserError(TWICE)
        self.right |= self.steps > 0
        first = next(grad for grad in grads if grad is not None)
        self.taken = None if self.right else (first, first._version)
        self.hooked, self.forward, self.steps = True, False, 0
        self.unseen.clear()
        self.left_out = None
        return left_out

    def _other_gradients(self) -> list[Tensor | None]:
        """Of everything that the adapter's optimizers train."""
        optimizers = _optimizers.get(self, ())
        return [p.grad for o in optimizers for group in o.param_groups for p in group["params"]]


def _finite(grads: list[Tensor | None]) -> bool:
    return all(bool(grad.isfinite().all()) for grad in grads if grad is not None)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _watched:
        return
    found: dict[int, tuple[Watch, list[Tensor]]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            known = _watched.get(id(parameter))
            if known is not None and parameter.grad is not None and _holds(known, parameter):
                found.setdefault(id(known[2]), (known[2], []))[1].append(parameter.grad)
    for watch, grads in found.values():
        watch.on_step(optimizer, grads)


def _holds(known: tuple[weakref.ref[Any], str, Watch], parameter: Tensor) -> bool:
    layer, name = known[0](), known[1]
    return layer is not None and layer._part("snella_A", name) is parameter


register_optimizer_step_post_hook(_after_step)
