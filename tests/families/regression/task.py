"""The family as training sees it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from snella.data.epoch import epoch_order
from snella.files import atomic
from snella.method import Batch
from snella.models.backbones import build_backbone
from snella.tasks import Backbone, Task


class Regression(Task):
    """Two numbers per image."""

    def build_model(self, backbone: Backbone) -> nn.Module:
        return build_backbone(backbone.entry, num_classes=2)

    def batches(self, split: str, seed: int | None) -> Iterator[Batch]:
        images = self._images(split)
        places = torch.from_numpy(self.data.column(split, "place"))
        for index in epoch_order(len(images), seed).split(self.batch_size):
            yield {"image": images[index], "place": places[index]}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["image"]).sigmoid()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        error = (self.forward(model, batch) - batch["place"]).abs()
        return error.pow(self.settings.power).mean()

    @torch.inference_mode()
    def predict(self, model: nn.Module, split: str, folder: Path) -> int:
        file = folder / "places.npy"
        images = self._images(split)
        if not file.exists():  # an interrupted call may have left it
            device = next(model.parameters()).device
            batches = [{"image": part.to(device)} for part in images.split(256)]
            found = torch.cat([self.forward(model, batch) for batch in batches])
            with atomic(file) as partial, open(partial, "wb") as stream:
                np.save(stream, found.float().cpu().numpy())
        return len(images)

    def _images(self, split: str) -> Tensor:
        stack = np.stack(list(self.data.images(split)))
        return torch.from_numpy(stack).permute(0, 3, 1, 2) / 127.5 - 1
