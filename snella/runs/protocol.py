"""Protocol: everything besides the method that moves a number, named and recorded.

A protocol is a named preset of ``config/protocols.yaml`` plus overrides. Its fields are plain
values, so that a record can carry all of them and two records can be compared.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SELECTIONS = ("last", "val", "best-test")


class Protocol(BaseModel):
    """How pixels, optimisation and selection are done.

    ``selection`` names the number that tables show: ``last`` epoch, best epoch on ``val200``,
    or best epoch on the test set (as many published numbers; marked wherever it is shown).
    ``train_split="train800"`` keeps the validation images out of training, so that all three
    selections can be recorded by one run; with ``trainval`` there is no ``val`` selection.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # pixels
    pixels: Literal["as-is", "community-jpeg"] = "as-is"
    image_size: int = Field(224, gt=0)
    resize: Literal["square", "shorter-side", "none"] = "square"
    resize_size: int | None = Field(None, gt=0)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    normalisation: Literal["imagenet", "inception", "none"] = "imagenet"
    augmentation: Literal["none", "flip", "random-resized-crop", "timm"] = "none"

    # optimisation
    train_split: Literal["train800", "trainval"] = "trainval"
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    epochs: int = Field(100, gt=0)
    batch_size: int = Field(64, gt=0)
    schedule: Literal["cosine", "released", "constant"] = "cosine"
    warmup_epochs: int = Field(10, ge=0)
    warmup_lr: float = Field(1e-6, ge=0)
    min_lr: float = Field(1e-5, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    clip_grad: float | None = Field(None, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"

    # selection
    selection: Literal["last", "val", "best-test"] = "last"
    evaluate_every: int = Field(10, gt=0)
    hyperparameters: Literal["fixed", "released"] = "fixed"

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        if self.selection == "val" and self.train_split == "trainval":
            raise ValueError("selection 'val' needs train_split 'train800': val200 is trained on")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be below epochs")
        return self

    def evaluates(self, epoch: int) -> bool:
        """Whether the model is evaluated after ``epoch`` (0-based); always after the last."""
        return (epoch + 1) % self.evaluate_every == 0 or epoch == self.epochs - 1

    def lr_factor(self, epoch: int, progress: float) -> float:
        """Learning rate at ``epoch`` + ``progress`` of it (in [0, 1)), divided by ``lr``.

        ``cosine`` rises linearly from ``warmup_lr`` to exactly ``lr`` over the warm-up, then
        follows a half cosine to ``min_lr``, step by step. ``released`` is the schedule of the
        SNELL, SPT and SNELLA codes: constant within an epoch, one epoch late (epochs 0 and 1
        both run at ``warmup_lr``), and a cosine that the warm-up does not shift, so the peak
        is never reached.
        """
        if self.schedule == "constant":
            return 1.0
        warmup_lr, min_lr = min(self.warmup_lr, self.lr), min(self.min_lr, self.lr)
        released = self.schedule == "released"
        t = float(max(epoch - 1, 0)) if released else epoch + progress
        if t < self.warmup_epochs:
            return (warmup_lr + t * (self.lr - warmup_lr) / self.warmup_epochs) / self.lr
        start = 0 if released else self.warmup_epochs
        phase = (t - start) / (self.epochs - start)
        return (min_lr + (self.lr - min_lr) * (1 + math.cos(math.pi * phase)) / 2) / self.lr
