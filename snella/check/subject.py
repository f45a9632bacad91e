"""A method on a tiny backbone, trained once on the toy task while everything is watched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from snella.check.toy import make_toy
from snella.methods.base import Method, check_marked, kept_tensors, prepare_model
from snella.methods.step import train_step
from snella.models.parameters import count_parameters, seed_everything, trainable
from snella.tasks.base import Toy

EPOCHS, STEPS, LR, WEIGHT_DECAY = 3, 4, 5e-3, 1e-4


@dataclass(frozen=True)
class Fit:
    """What was seen in training: losses in eval mode, and names of tensors.

    ``marked`` train, ``live`` got a gradient that is not zero at some step, ``moved`` were not
    marked and changed, ``left_out`` are marked but given to no optimizer.
    """

    before: float
    after: float
    marked: tuple[str, ...]
    live: frozenset[str]
    moved: tuple[str, ...]
    left_out: tuple[str, ...]


class Subject:
    """A method on the tiny model of the family ``kind``; trained at first use of ``fit``."""

    def __init__(self, method: Method, kind: str, lr: float = LR, **overrides: Any) -> None:
        self.method, self.kind, self.lr, self.overrides = method, kind, lr, overrides
        self.toy = make_toy(kind, **overrides)
        self.batch = self.toy.batch
        self.model = self._adapt(self.toy.model, seed=1)
        self.counts = count_parameters(self.model)

    def plain(self) -> nn.Module:
        """The backbone as it was before."""
        return make_toy(self.kind, **self.overrides).model

    def adapted(self, seed: int) -> nn.Module:
        """A fresh backbone, adapted; what the method draws depends on ``seed``."""
        return self._adapt(self.plain(), seed)

    def _adapt(self, model: nn.Module, seed: int) -> nn.Module:
        seed_everything(seed)
        prepare_model(self.method, model)
        return model

    def twin(self) -> Subject:
        """The same once more, from the start."""
        return Subject(self.method, self.kind, self.lr, **self.overrides)

    @cached_property
    def fit(self) -> Fit:
        """Train :attr:`model`."""
        return _fit(self.method, self.model, self.toy, self.lr)

    @torch.no_grad()
    def answer_of(self, model: nn.Module) -> Tensor:
        """The output of ``model`` for the toy batch in eval mode, which it is left in."""
        return self.toy.forward(model.eval(), self.batch)

    @cached_property
    def answer(self) -> Tensor:
        """The trained model's output for the toy batch, in eval mode."""
        assert self.fit
        return self.answer_of(self.model)

    @cached_property
    def rounding(self) -> float:
        """How far the trained model's output moves if its input does by one float32 rounding."""
        batch = {n: v * (1 + 2**-23) if v.is_floating_point() else v for n, v in self.batch.items()}
        with torch.no_grad():
            moved = self.toy.forward(self.model.eval(), batch) - self.answer
        return moved.abs().max().item()

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The trained adapter, as a file would hold it."""
        assert self.fit
        state = kept_tensors(self.method, self.model, "state")
        return {name: value.detach().contiguous().clone() for name, value in state.items()}


@torch.no_grad()
def _loss(model: nn.Module, toy: Toy) -> float:
    return toy.loss(model.eval(), toy.batch).item()


def _fit(method: Method, model: nn.Module, toy: Toy, lr: float) -> Fit:
    """Calibrate and train ``model`` on one batch, with all hooks, as the trainer does."""
    seed_everything(2)
    method.calibrate(model, [toy.batch, toy.batch], toy.loss)
    check_marked(method, model)
    before = _loss(model, toy)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    groups = method.parameter_groups(model, lr, WEIGHT_DECAY)
    optimised = {id(p) for group in groups for p in group["params"]}
    left_out = [name for name, p in trainable(model).items() if id(p) not in optimised]
    live = _optimise(method, model, toy, torch.optim.AdamW(groups, lr=lr))
    moved = [
        name
        for name, parameter in model.named_parameters()
        if name in frozen and not torch.equal(parameter, frozen[name])
    ]
    marked = tuple(trainable(model))
    return Fit(before, _loss(model, toy), marked, live, tuple(moved), tuple(left_out))


def _optimise(
    method: Method, model: nn.Module, toy: Toy, optimizer: torch.optim.Optimizer
) -> frozenset[str]:
    """Take all steps; return which tensors had a gradient that is not zero."""
    live: set[str] = set()

    def note() -> None:
        for name, parameter in trainable(model).items():
            if parameter.grad is not None and bool(parameter.grad.any()):
                live.add(name)

    method.steps_per_epoch = STEPS
    for epoch in range(EPOCHS):
        seed_everything(3 + epoch)
        model.train()
        method.on_epoch_start(model, epoch, EPOCHS)
        for _ in range(STEPS):
            train_step(model, optimizer, [toy.batch], toy.loss, method=method, after_backward=note)
    return frozenset(live)
