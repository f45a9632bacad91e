"""Classification as training sees it: batches, loss, and predicted classes on disk."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella.data import erasing
from snella.data.mixing import KEY, apply_mix, draw_mix
from snella.data.placement import resident
from snella.data.prepared import Prepared
from snella.data.resized import open_images
from snella.data.transforms import batches, eval_transform, train_transform
from snella.data.views import view_batches
from snella.files import atomic
from snella.methods.base import Batch
from snella.models.backbones import build_backbone
from snella.models.families import head
from snella.tasks.base import Backbone, Task
from snella.tasks.classification.settings import PREDICTIONS, ClassificationSettings

EVAL_BATCH = 256


class Classification(Task):
    """Single-label classification of a prepared data set."""

    def __init__(self, data: Prepared, settings: ClassificationSettings, batch_size: int) -> None:
        super().__init__(data, settings, batch_size)
        self._opened: dict[tuple[str, bool], Any] = {}

    def build_model(self, backbone: Backbone) -> nn.Module:
        """The backbone with a linear head of ``num_classes`` outputs.

        The head starts at truncated normal(0.02) with zero bias, as in the released codes: a
        zero head would give methods that calibrate on gradients nothing to look at.
        """
        model = build_backbone(backbone.entry, self.data.num_classes, self.settings.drop_path)
        for module in (head(model) or nn.Identity()).modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        return model

    def batches(self, split: str, seed: int | None) -> Iterator[Batch]:
        """Normalised images (B, 3, H, W) and labels (B,), and how a training batch is mixed."""
        found = self.plain_batches(split, seed)
        settings = self.settings
        if seed is None:
            return found
        found = islice(found, self.steps(split))
        if settings.random_erasing:
            found = (
                {**batch, erasing.KEY: erasing.draw_erasing(seed, i)}
                for i, batch in enumerate(found)
            )
        if not (settings.mixup or settings.cutmix):
            return found
        return (
            {**batch, KEY: draw_mix(settings.mixup, settings.cutmix, settings.image_size, seed, i)}
            for i, batch in enumerate(found)
        )

    def steps(self, split: str) -> int:
        """The number of batches of one epoch; one at least, however small."""
        whole = self.data.size(split) // self.batch_size
        return max(whole, 1) if self.settings.drop_last else super().steps(split)

    def plain_batches(self, split: str, seed: int | None) -> Iterator[Batch]:
        """All batches, without mixup and cutmix: what methods calibrate on."""
        source = self._split(split, training=True)
        labels = torch.from_numpy(np.array(self.data.labels(split)))
        return batches(source, labels, self.batch_size, seed, settings=self.settings)

    def views(self, split: str, seed: int | None, count: int) -> Iterator[Tensor]:
        """Augmented views (B, count, 3, S, S) of the images of :meth:`batches`, in their order."""
        return view_batches(self.data.images(split), self.settings, count, self.batch_size, seed)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = model(batch["image"])
        return logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy in single precision, with label smoothing, mixing and erasing."""
        smoothing, images, targets = self.settings.label_smoothing, batch["image"], batch["label"]
        if KEY in batch:
            classes = self.data.num_classes
            images, targets = apply_mix(images, targets, classes, smoothing, batch[KEY])
            smoothing = 0.0
        if erasing.KEY in batch:
            images = erasing.erase(images, self.settings.random_erasing, int(batch[erasing.KEY]))
        logits = self.forward(model, {**batch, "image": images}).float()
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    @torch.inference_mode()
    def predict(self, model: nn.Module, split: str, folder: Path) -> int:
        """Write the predicted class of each image, int16 (N,)."""
        file = folder / PREDICTIONS
        if not file.exists():
            device = next(model.parameters()).device
            found = [
                model(batch["image"].to(device)).argmax(dim=-1)
                for batch in batches(self._split(split), None, EVAL_BATCH, settings=self.settings)
            ]
            with atomic(file) as temporary, open(temporary, "wb") as stream:
                np.save(stream, torch.cat(found).cpu().to(torch.int16).numpy())
        return self.data.size(split)

    def _split(self, split: str, training: bool = False) -> Any:
        """A split's images, uint8: transformed once where they are fixed, on the device if fit."""
        augmented = training and self.settings.augmentation != "none"
        key = (split, augmented)
        if key not in self._opened:
            make = train_transform if augmented else eval_transform
            transform = make(self.settings, jpeg=self.data.jpeg)
            images = open_images(self.data, split, transform)
            self._opened[key] = resident(images) if isinstance(images, Tensor) else images
        return self._opened[key]
