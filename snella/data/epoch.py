"""The order of an epoch, and lazily transformed images that do not depend on who transforms them.

Each image is transformed under a seed of its own, drawn from (epoch seed, image index); so the
pixels are the same for every number of workers and after a resume.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from snella.data.transforms import Split

WORKER_PIXELS = 10_000_000  # an epoch with fewer is done before workers have started
MAX_WORKERS = 8


def epoch_order(count: int, seed: int | None) -> Tensor:
    """The order in which an epoch visits its images, int64 (N,): shuffled by `seed` if given."""
    if seed is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def lazy_images(
    split: Split, order: Sequence[Tensor], seed: int | None, workers: int | None
) -> Iterator[Tensor]:
    """Transformed batches uint8 (B, 3, S, S), one for each index tensor of `order`."""
    if workers is None:
        short = len(split) * split.transform.image_size**2 < WORKER_PIXELS
        workers = 0 if short else min(MAX_WORKERS, _cores())
    if seed is None and not split.transform.deterministic:
        seed = int(torch.randint(1 << 62, ()))
    loader = DataLoader(
        _SeededBatches(split, seed),
        sampler=[index.tolist() for index in order],
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    return iter(loader)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class _SeededBatches(Dataset[Tensor]):
    """Whole batches of a split, each image transformed under its own seed.

    The global generator is left as it was found, so that what else draws from it (dropout) does
    not depend on whether images are transformed here or in a worker.
    """

    def __init__(self, split: Split, seed: int | None) -> None:
        self.split, self.seed = split, seed

    def __getitem__(self, index: list[int]) -> Tensor:
        return torch.stack([self._image(i) for i in index])

    def _image(self, index: int) -> Tensor:
        if self.split.transform.deterministic:
            return self.split[index][0]
        word = hashlib.blake2b(f"{self.seed}/{index}".encode(), digest_size=8).digest()
        state = torch.get_rng_state()
        try:
            # not torch.manual_seed, which would seed the accelerator as well
            torch.default_generator.manual_seed(int.from_bytes(word, "big") >> 1)
            return self.split[index][0]
        finally:
            torch.set_rng_state(state)
