"""Image classification: cross-entropy on one label per image, scored by top-1 accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella.data.prepared import Prepared
from snella.data.transforms import (
    batches,
    eval_transform,
    normalise,
    open_split,
    train_transform,
)
from snella.methods.base import Batch, head
from snella.models.backbones import build_backbone
from snella.runs.protocol import Protocol
from snella.tasks.base import Task

EVAL_BATCH = 256


class Classification(Task):
    """Single-label classification of a prepared data set."""

    metric = "top1"

    def __init__(self, data: Prepared, protocol: Protocol) -> None:
        super().__init__(data, protocol)
        self._opened: dict[tuple[str, bool], Any] = {}

    def build_model(self, backbone: dict[str, Any]) -> nn.Module:
        """The backbone with a linear head of ``num_classes`` outputs.

        The head starts at truncated normal(0.02) with zero bias, as in the released codes: a
        zero head would give methods that calibrate on gradients nothing to look at.
        """
        model = build_backbone(backbone, self.data.num_classes, self.protocol.drop_path)
        for module in (head(model) or nn.Identity()).modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        return model

    def train_batches(self, epoch_seed: int | None) -> Iterator[Batch]:
        """Normalised images (B, 3, H, W) and labels (B,)."""
        split = self.protocol.train_split
        source = self._split(split, training=True)
        labels = torch.from_numpy(np.array(self.data.labels(split)))
        return self._normalised(batches(source, labels, self.protocol.batch_size, epoch_seed))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["image"])
        return F.cross_entropy(
            logits.float(), batch["label"], label_smoothing=self.protocol.label_smoothing
        )

    @torch.inference_mode()
    def predict(self, model: nn.Module, split: str) -> np.ndarray:
        """Predicted class of each image, int16 (N,)."""
        device = next(model.parameters()).device
        found = []
        for batch in self._normalised(batches(self._split(split), None, EVAL_BATCH, None)):
            found.append(model(batch["image"].to(device)).argmax(dim=-1).cpu())
        return torch.cat(found).to(torch.int16).numpy()

    @staticmethod
    def score(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Top-1 accuracy; raises ``ValueError`` unless each image is scored exactly once."""
        if predictions.shape != targets.shape:
            raise ValueError(f"{len(predictions)} predictions for {len(targets)} images")
        return {"top1": float((predictions == targets).mean())}

    def _normalised(self, source: Iterator[Batch]) -> Iterator[Batch]:
        for batch in source:
            yield {**batch, "image": normalise(batch["image"], self.protocol)}

    def _split(self, split: str, training: bool = False) -> Any:
        """A split's images, uint8: transformed once where they are fixed and fit in memory."""
        augmented = training and self.protocol.augmentation != "none"
        key = (split, augmented)
        if key not in self._opened:
            make = train_transform if augmented else eval_transform
            transform = make(self.protocol, jpeg=self.data.jpeg)
            self._opened[key] = open_split(self.data.images(split), transform)
        return self._opened[key]
