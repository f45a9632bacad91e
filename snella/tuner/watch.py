"""Whether training calls the hooks, and in the right order: told by the order of events.

Events are forward passes that record a graph (F), optimizer steps (S), which torch reports for all
its optimizers (fused ones leave no other trace in what they change), and calls of on_step_end (H).
Right is F S H. A compiled or captured model shows no F, a hand-written optimizer no S; where
nothing is seen, nothing is concluded.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from snella.errors import UserError

# Steps without a hook before the hooks are taken to be forgotten; a loaded state or a learning-rate
# finder may step a few times before training begins.
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

# By the id of a trained factor: itself (it may be gone, and the id be another's) and its adapter's.
_watched: dict[int, tuple[weakref.ref[Tensor], Watch]] = {}


class Watch:
    """The events of one adapter's training; shared by its layers."""

    def __init__(self) -> None:
        self.forwards_ever = self.steps_ever = False
        self.forward = self.hooked = False  # an F since the last H; an H at all
        self.steps = 0  # S since the last H
        self.unseen = 0  # S since any hook

    def on_forward(self, factor: Tensor) -> None:
        """F of a layer with this trained factor."""
        self.forward = self.forwards_ever = True
        known = _watched.get(id(factor))
        if known is None or known[1] is not self or known[0]() is not factor:
            if len(_watched) > _MANY:
                for key in [key for key, (alive, _) in _watched.items() if alive() is None]:
                    del _watched[key]
            _watched[id(factor)] = weakref.ref(factor), self

    def on_step(self) -> None:
        """S of an optimizer that holds a factor of the adapter; raises ``UserError``."""
        self.steps_ever = True
        self.steps += 1
        self.unseen += 1
        if self.unseen > PATIENCE:
            raise UserError(FORGOTTEN)
        if self.hooked and self.forwards_ever and not self.forward and self.steps == 1:
            raise UserError(TOO_EARLY)

    def on_epoch_start(self) -> None:
        """The other hook: training calls hooks."""
        self.unseen = 0

    def on_step_end(self, grads: list[Tensor | None]) -> None:
        """H, with the step's gradients; raises ``UserError`` if the events before it are wrong."""
        if self.hooked and self.forwards_ever and self.steps == 0:
            # A scaler skips the steps whose gradients are not finite.
            if self.forward and self.steps_ever and _finite(grads):
                raise UserError(TOO_OFTEN)
            if not self.forward and all(g is None or g.device.type == "cpu" for g in grads):
                raise UserError(TWICE)  # elsewhere it may be a captured graph
        self.hooked, self.forward, self.steps, self.unseen = True, False, 0, 0


def _finite(grads: list[Tensor | None]) -> bool:
    return all(bool(grad.isfinite().all()) for grad in grads if grad is not None)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _watched:
        return
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            known = _watched.get(id(parameter))
            if known is not None and known[0]() is parameter:
                found[id(known[1])] = known[1]
    for watch in found.values():
        watch.on_step()


register_optimizer_step_post_hook(_after_step)
