"""The toy of each family of backbones: the task's own where a task trains that family."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from snella.methods.base import Batch
from snella.models.families import family
from snella.models.tiny import output, tiny_backbone, toy_batch
from snella.tasks import find_task, task_names
from snella.tasks.base import Toy


def make_toy(kind: str, **overrides: Any) -> Toy:
    """A tiny model of the family ``kind`` with a batch to learn by heart.

    ``overrides`` are keyword arguments of the tiny backbone, for tests.
    """
    for name in task_names():
        info = find_task(name)
        if kind in info.families and not overrides:
            return info.make_toy(kind)
    return Toy(tiny_backbone(kind, **overrides), toy_batch(kind), _loss, _forward)


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    return output(model, batch)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    found = output(model, batch).float()
    if family(model) == "sd3":
        return F.mse_loss(found, batch["target"])
    return F.cross_entropy(found, batch["label"])
