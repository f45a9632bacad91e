"""Mixup and CutMix of a batch with its own reverse, and the soft targets that go with them.

    mixup   x <- λ x + (1 - λ) x',  λ ~ Beta(α, α);      cutmix  a box of x' in x, λ = 1 - its share
    target  λ y + (1 - λ) y'

Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019; drawn as timm's Mixup does with
probability 1 and one choice per batch, between the two with equal chance where both are asked for.
SSF and GPS train on FGVC with 0.8 and 1.0.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KEY = "mix"
"""The batch's column that says how it is mixed, float64 (6,): 1 for cutmix, λ, y0, y1, x0, x1."""


def draw_mix(mixup: float, cutmix: float, size: int, seed: int, index: int) -> Tensor:
    """How batch ``index`` of an epoch is mixed: λ and a box, which is empty for mixup."""
    rng = np.random.default_rng([seed, index])
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    share = float(rng.beta(alpha, alpha))
    box = [0, 0, 0, 0]
    if cut:
        side = int(size * (1 - share) ** 0.5)
        y, x = rng.integers(0, size, 2).tolist()
        edges = (y - side // 2, y + side // 2, x - side // 2, x + side // 2)
        box = [min(max(edge, 0), size) for edge in edges]
        share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / size**2
    return torch.tensor([cut, share, *box], dtype=torch.float64)


def apply_mix(
    images: Tensor, labels: Tensor, classes: int, smoothing: float, mix: Tensor
) -> tuple[Tensor, Tensor]:
    """Mixed images (B, 3, H, W) and soft targets (B, classes)."""
    cut, share, top, bottom, left, right = (
        mix.unbind()
    )  # read on the device: the host need not wait
    row, column = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    box = ((row >= top) & (row < bottom))[:, None] & (column >= left) & (column < right)
    weight = torch.where(cut > 0, (~box).to(share.dtype), share)
    own, other = weight.to(images.dtype), (1 - weight).to(images.dtype)
    mixed = own * images + other * images.flip(0)
    low = smoothing / classes
    hot = F.one_hot(labels, classes).to(torch.float32) * (1 - smoothing) + low
    return mixed, share * hot + (1 - share) * hot.flip(0)
