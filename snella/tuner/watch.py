"""Whether training calls the hooks, and in the right order; told from the parameters' values.

Counters of tensor versions do not do: fused optimizers and ``.data`` writes leave them alone. So
the first steps of a training are looked at, and after them nothing costs anything.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from snella.errors import UserError

# Changes of the parameters seen without a hook before the hooks are taken to be forgotten; a loaded
# state or a learning-rate finder may change them a few times before training begins.
PATIENCE = 3
# Calls of on_step_end after which the order is looked at, and wrong orders seen that are an error:
# a step at learning rate 0 shows nothing, and a state may be loaded in between.
LOOKS, EVIDENCE = 3, 2
# Entries of A per layer that are compared.
_ENTRIES = 64

FORGOTTEN = (
    "SNELLA's budget allocation needs two calls that were never made: "
    "model.on_epoch_start(epoch, epochs) before every epoch and model.on_step_end() "
    "after every optimizer.step(), before zero_grad() (with transformers' Trainer: "
    "callbacks=[SnellaCallback()]). To train without, set allocation=False."
)
TOO_EARLY = (
    "SNELLA's on_step_end() is called before optimizer.step(): the parameters change between it and "
    "the next forward pass. Call it after optimizer.step() and before zero_grad()."
)
TOO_OFTEN = (
    "SNELLA's on_step_end() was called, but the gradients were not cleared before the next backward "
    "pass: call it once per optimizer step, after optimizer.step() and before zero_grad(); with "
    "gradient accumulation not after every micro-batch (accelerate: if accelerator.sync_gradients)."
)
TWICE = "SNELLA's on_step_end() was called twice after one forward pass: call it once per optimizer step."


class Watched(Protocol):
    """What is looked at: a layer with the adapter's factor A."""

    key: str
    snella_A: Any


class Watch:
    """Looks at the training of one adapter; shared by its layers."""

    def __init__(self) -> None:
        self.calls = 0  # of on_step_end
        self.forwards = 0
        self.early: set[int] = set()
        self.changes: dict[str, int] = {}
        self.samples: dict[str, Tensor] = {}

    @property
    def done(self) -> bool:
        """Nothing is left to be looked at: a training forward costs one comparison."""
        return self.calls > LOOKS

    def reset(self) -> None:
        """Forget the values; the parameters were written to on purpose."""
        self.samples, self.changes = {}, {}

    @torch.no_grad()
    def forward(self, layer: Watched, name: str) -> None:
        """Note a forward pass in training; raises ``UserError`` for missing or misplaced hooks."""
        factor = layer.snella_A[name]
        if self.done or factor.device.type == "meta":
            return
        self.forwards += 1
        if self.calls == 0:
            self._look_for_steps(layer.key, _sample(factor))
        elif (after := self.samples.pop(layer.key, None)) is not None:
            if not after.equal(_sample(factor).to(after.device)):
                self.early.add(self.calls)
            if len(self.early) >= EVIDENCE:
                raise UserError(TOO_EARLY)
            if factor.requires_grad:
                _look_for_old_gradient(factor)

    def _look_for_steps(self, key: str, sample: Tensor) -> None:
        before = self.samples.get(key)
        if before is not None and not before.equal(sample.to(before.device)):
            self.changes[key] = self.changes.get(key, 0) + 1
            if self.changes[key] > PATIENCE:
                raise UserError(FORGOTTEN)
        self.samples[key] = sample

    @torch.no_grad()
    def step(self, layers: list[Any], name: str) -> None:
        """Note a call of on_step_end."""
        if self.done:
            return
        if self.calls and self.forwards == 0:
            raise UserError(TWICE)
        if self.forwards == 0:  # compiled as a whole: there is nothing to go by
            self.calls = LOOKS
        self.calls += 1
        self.forwards = 0
        self.samples, self.changes = {}, {}
        if not self.done:
            self.samples = {layer.key: _sample(layer.snella_A[name]) for layer in layers}


def _sample(factor: Tensor) -> Tensor:
    return factor.detach().flatten()[:_ENTRIES].clone()


def _look_for_old_gradient(factor: Tensor) -> None:
    """Raise in the coming backward pass if it would add to the gradient of the last step."""

    def look(gradient: Tensor) -> None:
        handle.remove()
        if factor.grad is not None and bool(factor.grad.any()):
            raise UserError(TOO_OFTEN)

    handle = factor.register_hook(look)
