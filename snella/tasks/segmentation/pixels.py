"""Images and masks at the model's size: decoded and resized once, kept as bytes while they fit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from snella.tasks.segmentation.masks import decode_mask, resize_image, resize_mask

if TYPE_CHECKING:
    from snella.data.prepared import Prepared

CACHE_BYTES = 4 << 30
"""Memory that the resized images of one split may take; those beyond it are decoded each time."""
THREADS, AHEAD = 4, 3
SMALL = 1 << 16
"""Pixels of an image below which threads cost more than they save."""


class ResizedSplit:
    """The images of one split, uint8 (3, S, S), with their masks, bool (S, S), where wanted."""

    def __init__(self, data: Prepared, split: str, size: int, masks: bool) -> None:
        self.size, self.count = size, data.size(split)
        self._images = data.images(split)
        self._masks = data.encoded(split, "mask") if masks else None
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._room = CACHE_BYTES // (4 * size * size)

    def item(self, index: int) -> tuple[Tensor, Tensor | None]:
        """One image and its mask at the model's size."""
        found = self._kept.get(index)
        if found is None:
            image = np.ascontiguousarray(resize_image(self._images[index], self.size))
            mask = None
            if self._masks is not None:
                mask = torch.from_numpy(resize_mask(decode_mask(self._masks[index]), self.size))
            found = torch.from_numpy(image.copy()).permute(2, 0, 1), mask
            if len(self._kept) < self._room:
                self._kept[index] = found
        return found

    def batches(self, order: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Stacked images (B, 3, S, S) and masks (B, S, S), a few batches ahead of the reader."""
        if self.size**2 < SMALL:
            yield from map(self._stack, order)
            return
        with ThreadPoolExecutor(THREADS) as pool:
            ahead: deque[Future[tuple[Tensor, Tensor | None]]] = deque()
            for indices in order:
                ahead.append(pool.submit(self._stack, indices))
                if len(ahead) > AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _stack(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        images, masks = zip(*(self.item(i) for i in indices), strict=True)
        stacked = None if self._masks is None else torch.stack(masks)
        return torch.stack(images), stacked
