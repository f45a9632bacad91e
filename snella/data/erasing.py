"""Random erasing of normalised training images, timm's, with noise in each pixel.

Zhong et al., Random Erasing Data Augmentation, AAAI 2020; one box, after mixup and cutmix, as in
timm's loader and SSF's scripts.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

KEY = "erase"
"""The batch's column that seeds its erasing, int64 ()."""


def draw_erasing(seed: int, index: int) -> Tensor:
    """The seed of batch ``index`` of an epoch."""
    return torch.tensor(random.Random(f"{seed}/{index}").getrandbits(62))


def erase(images: Tensor, probability: float, seed: int) -> Tensor:
    """A copy of images (B, 3, H, W) of which each has, with ``probability``, a box of noise.

    Draws from generators of its own: the global ones are left as they were.
    """
    from timm.data.random_erasing import RandomErasing

    before = random.getstate()
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        random.seed(seed)
        torch.manual_seed(seed)
        # timm keeps the device of its noise as a string
        box = RandomErasing(probability, mode="pixel", device=str(images.device))
        erased: Tensor = box(images.clone())
    random.setstate(before)
    return erased
