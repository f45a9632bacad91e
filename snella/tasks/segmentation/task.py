"""Segmentation as training sees it: batches, loss, and predicted masks on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snella.data.epoch import epoch_order
from snella.errors import UserError
from snella.methods.base import Batch
from snella.models.sam import (
    load_sam,
    mask_logits,
    mask_loss,
    pixel_statistics,
    upsample,
)
from snella.tasks.base import Backbone, Task
from snella.tasks.segmentation.collapse import collapsed
from snella.tasks.segmentation.pixels import ResizedSplit
from snella.tasks.segmentation.predictions import Index, Writer

log = logging.getLogger("snella")

EVAL_PIXELS = 1 << 21
"""Pixels of a batch of prediction: two images of 1024 x 1024, for SAM's attention is large."""
EVAL_BATCH = 32


class Segmentation(Task):
    """Masks of one foreground class, by a SAM without prompts."""

    def build_model(self, backbone: Backbone) -> nn.Module:
        """The pre-trained SAM for images of ``image_size``; its decoder is pre-trained too."""
        return load_sam(backbone.arch, backbone.kwargs, self.settings.image_size, backbone.file)

    def batches(self, split: str, seed: int | None) -> Iterator[Batch]:
        """Normalised images (B, 3, S, S) and masks (B, S, S), float in {0, 1}.

        With ``augmentation: flip`` a seeded epoch mirrors half of the images.
        """
        order = epoch_order(self.data.size(split), seed).split(self.batch_size)
        mirrored = None
        if seed is not None and self.settings.augmentation == "flip":
            generator = torch.Generator().manual_seed(seed)
            mirrored = torch.rand(self.data.size(split), generator=generator) < 0.5
        source = self._split(split, True)
        for indices, (image, mask) in zip(
            order, source.batches([part.tolist() for part in order]), strict=True
        ):
            assert mask is not None
            if mirrored is not None:
                flip = mirrored[indices]
                image[flip], mask[flip] = image[flip].flip(-1), mask[flip].flip(-1)
            yield {"image": _normalised(image), "mask": mask.float()}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mask logits (B, S / 4, S / 4)."""
        return mask_logits(model, batch["image"])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Binary cross-entropy plus soft IoU of the masks at the model's size, in float32."""
        size = batch["mask"].shape[-2:]
        logits = upsample(self.forward(model, batch), (size[0], size[1]))
        return mask_loss(logits, batch["mask"])

    @torch.inference_mode()
    def predict(self, model: nn.Module, split: str, folder: Path) -> int:
        """Append each image's mask at 0.5, and map where asked for, to ``folder``; resumes there.

        Masks at the original size come from the decoder's logits, bilinear. Masks that are empty
        or full for most images of the validation split are warned about.
        """
        source, sizes = self._split(split, split == "val"), self.data.column(split, "size")
        device = next(model.parameters()).device
        step = max(1, min(EVAL_BATCH, EVAL_PIXELS // self.settings.image_size**2))
        shares: list[tuple[float, float]] = []
        with Writer(folder, self._index(model, split)) as writer:
            rest = torch.arange(writer.done, source.count).split(step)
            order = [part.tolist() for part in rest if len(part)]
            for indices, (image, mask) in zip(order, source.batches(order), strict=True):
                low = _logits(model, _normalised(image).to(device))
                rows = zip(indices, low, strict=True)
                found = [self._append(writer, logits, sizes[i]) for i, logits in rows]
                if mask is not None:
                    shares += zip(found, mask.float().mean((1, 2)).tolist(), strict=True)
        if problem := collapsed(shares):
            log.warning("Validation: %s", problem)
        return source.count

    def _append(self, writer: Writer, logits: Tensor, size: np.ndarray) -> float:
        """Write one image's prediction; return the share of its pixels that are foreground."""
        side = writer.index.model_size
        original = upsample(logits[None], (int(size[0]), int(size[1])))[0] > 0
        at_model_size = upsample(logits[None], (side, side))[0] > 0
        levels = None
        if writer.index.map_size:
            levels = (torch.sigmoid(logits) * 255).round().to(torch.uint8).cpu().numpy()
        writer.append(original.cpu().numpy(), at_model_size.cpu().numpy(), levels)
        return float(original.float().mean())

    def _index(self, model: Any, split: str) -> Index:
        settings = self.settings
        grid = model.prompt_encoder.image_embedding_size[0]
        return Index(
            count=self.data.size(split),
            model_size=settings.image_size,
            map_size=4 * grid if settings.probabilities else 0,
            fingerprint=_fingerprint(model, f"{self.data.digest}/{split}"),
        )

    @cache  # noqa: B019 - a task lives as long as its run
    def _split(self, split: str, masks: bool) -> ResizedSplit:
        return ResizedSplit(self.data, split, self.settings.image_size, masks)


def _normalised(image: Tensor) -> Tensor:
    mean, std = pixel_statistics(image.device)
    return (image.float() / 255 - mean) / std


def _logits(model: nn.Module, image: Tensor) -> Tensor:
    """Finite mask logits in single precision.

    Raises :class:`~snella.errors.UserError` for NaN, which would pass for an empty mask, and
    torch's out-of-memory error with the remedy.
    """
    try:
        low = mask_logits(model, image).float()
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"out of memory while predicting {len(image)} images of {image.shape[-1]} pixels at a "
            "time; use `precision: bf16` or a smaller `image_size`"
        ) from error
    if not low.isfinite().all():
        raise UserError(
            "The model predicts NaN: half precision (fp16) may overflow; use `precision: bf16` or "
            "fp32, or lower `lr`."
        )
    return low


def _fingerprint(model: nn.Module, salt: str) -> str:
    """A digest of the model's weights."""
    found = hashlib.sha256(salt.encode())
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return found.hexdigest()
