"""RandAugment, AugMix and AutoAugment as timm does them, under torch's generator.

timm draws from Python's and numpy's generators; here both are seeded from torch's for each image
and put back, so that an image's augmentation depends on its own seed alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class AutoAugment:
    """A callable from picture to picture; ``policy`` is timm's, "rand-m9-mstd0.5-inc1"."""

    policy: str
    image_size: int
    mean: tuple[float, ...]

    def __call__(self, picture: Any) -> Any:
        seed = int(torch.randint(2**31, ()))
        before = random.getstate(), np.random.get_state()
        try:
            random.seed(seed)
            np.random.seed(seed)
            return self._augment(picture)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

    @cached_property
    def _augment(self) -> Any:
        from timm.data import auto_augment as timm

        settings = {  # as timm.data.transforms_factory sets them
            "translate_const": int(self.image_size * 0.45),
            "img_mean": tuple(min(255, round(255 * part)) for part in self.mean),
        }
        if self.policy.startswith("rand"):
            return timm.rand_augment_transform(self.policy, settings)
        if self.policy.startswith("augmix"):
            return timm.augment_and_mix_transform(self.policy, settings | {"translate_pct": 0.3})
        return timm.auto_augment_transform(self.policy, settings)
