"""The family as training sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from snella.data.epoch import epoch_order
from snella.files import atomic
from snella.method import Batch
from snella.tasks import Backbone, Task


class Regression(Task):
    """Two numbers per image."""

    def build_model(self, backbone: Backbone) -> nn.Module:
        return timm.create_model(backbone.arch, num_classes=2, **backbone.kwargs)

    def batches(self, split: str, seed: int | None) -> Iterator[Batch]:
        images = self._images(split)
        places = torch.from_numpy(self.data.column(split, "place"))
        for index in epoch_order(len(images), seed).split(self.batch_size):
            yield {"pixels": images[index], "place": places[index]}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["pixels"]).sigmoid()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        error = (self.forward(model, batch) - batch["place"]).abs()
        return error.pow(self.settings.power).mean()

    @torch.inference_mode()
    def predict(self, model: nn.Module, split: str, folder: Path) -> int:
        found = self.forward(model, {"pixels": self._images(split)}).numpy()
        with atomic(folder / "places.npy") as path, open(path, "wb") as file:
            np.save(file, found)
        return len(found)

    def _images(self, split: str) -> Tensor:
        stack = np.stack(list(self.data.images(split)))
        return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255 - 0.5
