"""Protocol: how any task is optimised and how its number is chosen, named and recorded.

A protocol is a named preset of ``config/protocols.yaml`` plus overrides. These are the fields that
all task families share; a family adds its own (pixels, prompts, ...) beside them. All are plain
values, so that a record can carry them and two records can be compared.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from snella.validation import Strict


def _source(name: str) -> str:
    if not re.fullmatch(r"fixed|released|search(/[A-Za-z0-9_-]+)?", name):
        raise ValueError("is `fixed`, `released`, `search` or `search/NAME`")
    return name


class Protocol(Strict):
    """How optimisation and selection are done.

    ``selection`` names the number that tables show: ``last`` epoch, best epoch on the validation
    split, or best epoch on the test set (as many published numbers; marked wherever it is shown).
    ``train_split="train"`` keeps the validation examples out of training, so that all three
    selections can be recorded by one run; with ``trainval`` there is no ``val`` selection.

    ``hyperparameters`` says where a row's settings come from: ``fixed``, the authors' scripts
    (``released``), or what a search of the suite, or of ``search/NAME``, found.

    Training lasts ``epochs``, or as many as ``steps`` optimizer steps need. ``threads`` is the
    number of CPU threads: sums in another order differ in their last digits, so it belongs here.
    """

    # optimisation
    train_split: Literal["train", "trainval"] = "trainval"
    optimizer: str = "adamw"
    momentum: float = Field(0.9, ge=0, lt=1)
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(1e-4, ge=0, allow_inf_nan=False)
    epochs: int = Field(100, gt=0, le=1_000_000)
    steps: int | None = Field(None, gt=0, le=100_000_000)
    batch_size: int = Field(64, gt=0, le=1_000_000)
    accumulation: int = Field(1, gt=0, le=1_000_000)
    schedule: Literal["cosine", "released", "timm", "linear", "constant"] = "cosine"
    stepping: Literal["step", "epoch"] = "step"
    warmup_epochs: int = Field(10, ge=0)
    cooldown_epochs: int = Field(0, ge=0)
    warmup_lr: float = Field(1e-6, ge=0, allow_inf_nan=False)
    min_lr: float = Field(1e-5, ge=0, allow_inf_nan=False)
    clip_grad: float | None = Field(None, gt=0, allow_inf_nan=False)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = False
    gradient_checkpointing: bool = False
    threads: int = Field(1, gt=0, le=1024)
    checkpoint_every: int = Field(1, gt=0)

    # selection
    selection: Literal["last", "val", "best-test"] = "last"
    evaluate_every: int = Field(10, gt=0)
    evaluate_last: int = Field(1, gt=0)
    hyperparameters: Annotated[str, AfterValidator(_source)] = "fixed"

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        if self.selection == "val" and self.train_split == "trainval":
            raise ValueError("selection 'val' needs train_split 'train': val is trained on")
        if self.steps is None and self.warmup_epochs + self.cooldown_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} and cooldown_epochs {self.cooldown_epochs} "
                "together must be below epochs, which counts them"
            )
        return self

    def total_epochs(self, steps_per_epoch: int) -> int:
        """The number of epochs, from ``steps`` where they are given."""
        return self.epochs if self.steps is None else -(-self.steps // steps_per_epoch)

    def looks(self, epoch: int, epochs: int) -> bool:
        """Whether predictions are made after ``epoch`` (0-based).

        Always after the last, and after each of the ``evaluate_last``.
        """
        return (epoch + 1) % self.evaluate_every == 0 or epoch >= epochs - self.evaluate_last

    def lr_factor(self, epoch: int, progress: float, epochs: int | None = None) -> float:
        """Learning rate at ``epoch`` + ``progress`` of it (in [0, 1)), divided by ``lr``.

        ``cosine`` rises linearly from ``warmup_lr`` to exactly ``lr`` over the warm-up, then
        follows a half cosine to ``min_lr``, step by step; ``linear`` falls in a straight line.
        ``released`` is the schedule of the SNELL, SPT and SNELLA codes: constant within an epoch,
        one epoch late (epochs 0 and 1 both run at ``warmup_lr``), and a cosine that the warm-up
        does not shift, so the peak is never reached; ``timm`` is the same in time, as SSF and GPS
        run it. ``stepping: epoch`` keeps the rate of an epoch's beginning (VPT). The last
        ``cooldown_epochs`` stay at ``min_lr``; ``epochs`` counts them.
        """
        if self.schedule == "constant":
            return 1.0
        total = (epochs or self.epochs) - self.cooldown_epochs
        warmup_lr, min_lr = min(self.warmup_lr, self.lr), min(self.min_lr, self.lr)
        released = self.schedule in ("released", "timm")
        late = self.schedule == "released"
        whole = released or self.stepping == "epoch"
        t = float(max(epoch - late, 0)) if whole else epoch + progress
        if t >= total:
            return min_lr / self.lr
        if t < self.warmup_epochs:
            return (warmup_lr + t * (self.lr - warmup_lr) / self.warmup_epochs) / self.lr
        start = 0 if released else self.warmup_epochs
        phase = (t - start) / max(total - start, 1e-9)
        fall = 1 - phase if self.schedule == "linear" else (1 + math.cos(math.pi * phase)) / 2
        return (min_lr + (self.lr - min_lr) * fall) / self.lr
