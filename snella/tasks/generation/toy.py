"""The toy task of generation: one batch of noisy latents with fixed noise, learnt by heart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snella.models.tiny import tiny_backbone
from snella.tasks.base import Toy
from snella.tasks.generation.task import flow_forward, mean_flow_loss


def toy(family: str) -> Toy:
    """A tiny SD3 transformer and a batch of 8 latents (4, 8, 8) with noise and noise levels."""
    rng = torch.Generator().manual_seed(1)
    batch = {
        "latent": torch.randn(8, 4, 8, 8, generator=rng),
        "noise": torch.randn(8, 4, 8, 8, generator=rng),
        "sigma": torch.linspace(0.05, 0.95, 8),
        "tokens": torch.randn(8, 3, 16, generator=rng),
        "pooled": torch.randn(8, 16, generator=rng),
    }
    return Toy(tiny_backbone(family), batch, _loss, flow_forward)


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return mean_flow_loss(model, batch, precondition=False)
