"""Augmented views of stored images for methods that calibrate on them (supervised contrastive).

Crop of 8 to 100 % of the area, flip, colour jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8,
greyscale with 0.2: the views of GPS's released code, drawn from the stored image at its own size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snella.data.pixels import PixelSettings
from snella.data.transforms import Split, batches, normalise


@dataclass(frozen=True)
class Views:
    """A callable from one stored image, uint8 (H, W, 3), to its views, uint8 (n, 3, S, S)."""

    image_size: int
    count: int
    deterministic: bool = False
    identity: bool = False

    def __call__(self, image: np.ndarray) -> Tensor:
        from PIL import Image

        picture = Image.fromarray(image)
        return torch.stack([self._pipeline(picture) for _ in range(self.count)])

    @cached_property
    def _pipeline(self) -> Any:
        from torchvision.transforms import v2

        bicubic = v2.InterpolationMode.BICUBIC
        return v2.Compose(
            [
                v2.RandomResizedCrop(self.image_size, scale=(0.08, 1.0), interpolation=bicubic),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.PILToTensor(),
            ]
        )


def view_batches(
    images: Sequence[np.ndarray],
    settings: PixelSettings,
    count: int,
    batch_size: int,
    seed: int | None,
) -> Iterator[Tensor]:
    """Normalised views (B, n, 3, S, S), in the order of :func:`batches` with the same seed."""
    split = Split(images, Views(settings.image_size, count))  # type: ignore[arg-type]
    for batch in batches(split, None, batch_size, seed):
        views = batch["image"]
        yield normalise(views.flatten(0, 1), settings).view(views.shape)
