"""The toy task of classification: five classes of random images, learnt by heart."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from snella.methods.base import Batch
from snella.models.tiny import tiny_backbone, toy_batch
from snella.tasks.base import Toy


def toy(family: str) -> Toy:
    """A tiny backbone of ``family`` and a batch {"image": (B, 3, 32, 32), "label": (B,)}."""
    return Toy(tiny_backbone(family), toy_batch(family), loss, forward)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, classes)."""
    logits: Tensor = model(batch["image"])
    return logits


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in single precision."""
    return F.cross_entropy(forward(model, batch).float(), batch["label"])
