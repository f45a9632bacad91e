"""Rows of baselines/peft.py the way Hugging Face PEFT's documentation runs them.

The config is the one our row made, its target modules included, so that both sides adapt the
same layers of a split or fused ``qkv``. The rows that are left out (lora-16, lora-plus, rslora,
pissa, corda) have the step of LoRA.
"""

from __future__ import annotations

import copy
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
from measuring import (
    Setup,
    Training,
    configured_method,
    configured_row,
    cross_entropy,
    trained_by_adamw,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from published_models import Published
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import split_qkv


def wrapped(backbone: nn.Module, ours: nn.Module, **fields: Any) -> Any:
    """``backbone`` as a PeftModel with our model's config, and the same parameters trained."""
    config = copy.deepcopy(ours.peft_config["default"])  # type: ignore[union-attr, operator]
    config.target_modules = [n for n, m in ours.named_modules() if isinstance(m, BaseTunerLayer)]
    config.modules_to_save = ["head"]
    for name, value in fields.items():
        setattr(config, name, value)
    if any(".qkv." in path for path in config.target_modules):
        split_qkv(backbone)
    model = peft.get_peft_model(backbone, config).train()
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if "lora_A" in name:  # which LoRA-FA freezes
            parameter.requires_grad_(name.removeprefix("base_model.model.") in trained)
    return model


def library(root: Path, setup: Setup, ours: Training) -> Training:
    model, batch = wrapped(setup.backbone().to(setup.device), ours.model), setup.data()
    return trained_by_adamw(model, lambda: cross_entropy(model, batch))


def adalora(root: Path, setup: Setup, ours: Training) -> Training:
    """Before the budget falls, as ours in its first epoch.

    PEFT adds the penalty to the loss of a model that returns one.
    """
    backbone, batch = setup.backbone().to(setup.device), setup.data()
    plain = backbone.forward

    def with_loss(images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=F.cross_entropy(plain(images), batch["label"]))

    backbone.forward = with_loss
    plan = {"tinit": 10_000, "tfinal": 30_000, "total_step": 100_000}
    model, steps = wrapped(backbone, ours.model, **plan), count()
    return trained_by_adamw(
        model,
        lambda: model(batch["image"]).loss,
        after_step=lambda: model.base_model.update_and_allocate(next(steps)),
    )


def fourierft(root: Path, setup: Setup, ours: Training) -> Training:
    return library(root, setup, configured_row(configured_method("fourierft"), setup))


_PLAIN = ("lora-8", "lora-fa", "dora", "fourierft", "oft", "vera", "shira", "waveft")
LIBRARY: dict[str, Published] = {
    **{row: Published(row, "peft", library) for row in _PLAIN},
    "adalora": Published("adalora", "peft", adalora),
    "s2ft-6000": Published(
        "s2ft-6000",
        "peft",
        fourierft,
        note="theirs is FourierFT, S²FT without the reordering; S²FT has no code",
    ),
}
