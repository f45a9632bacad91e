"""All metrics of predicted masks on disk, per image and pooled; no model, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from snella.errors import UserError
from snella.tasks.base import Score, Scorer
from snella.tasks.segmentation.collapse import collapsed
from snella.tasks.segmentation.masks import decode_mask, resize_mask
from snella.tasks.segmentation.metrics import (
    Counts,
    boundary_f,
    mean_absolute_error,
    s_measure,
)
from snella.tasks.segmentation.predictions import (
    Prediction,
    read_index,
    read_predictions,
)

THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 20))

Mask = NDArray[np.bool_]
Outcome = tuple[Mask, Mask]
"""Predicted and true mask of one image at its original size."""


@dataclass
class _Image:
    """What one image contributes."""

    original: Counts
    model_size: Counts
    values: dict[str, float]
    shares: tuple[float, float]
    """Of foreground, predicted and true."""


class SegmentationScorer(Scorer):
    """Dice, IoU, the released foreground recall, boundaries, S-measure and MAE.

    The value of a metric is over the data set's own test images; further test sets are groups.
    Means are over images; the pooled metrics and the released ones are of pooled pixels.
    """

    def score(self, predictions: Path, split: str) -> dict[str, Score]:
        """All metrics; S-measure and MAE only where probability maps are stored.

        Raises :class:`~snella.errors.UserError` for predictions that do not fit the images.
        """
        cut = self._threshold(predictions, split)
        images = [
            self._image(prediction, truth, cut)
            for prediction, truth in self._pairs(predictions, split)
        ]
        members = self._members(split)
        own = self._own(split)
        groups = {
            name: index
            for i, name in enumerate(self.data.manifest.get("test_sets", []))
            if split == "test" and len(index := np.flatnonzero(members == i))
        }
        scores = {}
        for name in images[0].values:
            values = np.array([image.values[name] for image in images], dtype=np.float32)
            spread = {g: float(values[index].mean()) for g, index in groups.items()}
            scores[name] = Score(float(values[own].mean()), spread, values[own])
        pooled = {g: _pooled([images[i] for i in index]) for g, index in groups.items()}
        for name, value in _pooled([images[i] for i in own]).items():
            scores[name] = Score(value, {g: found[name] for g, found in pooled.items()})
        if problem := collapsed([image.shares for image in images]):
            scores["dice"] = replace(scores["dice"], warnings=(problem,))
        return scores

    def outcomes(self, predictions: Path, split: str = "test") -> Iterator[Outcome]:
        """Predicted and true masks of a split, in order: what a figure shows."""
        cut = self._threshold(predictions, split)
        for prediction, truth in self._pairs(predictions, split):
            yield _mask(prediction, truth.shape, cut), truth

    def chance(self) -> dict[str, float]:
        """What foreground everywhere reaches in Dice: 2 a / (1 + a) for a share a of foreground."""
        own = set(self._own("test").tolist())
        shares = [float(t.mean()) for i, t in enumerate(self._truths("test")) if i in own]
        return {"dice": float(np.mean([2 * a / (1 + a) for a in shares]))}

    def _own(self, split: str) -> NDArray[np.int64]:
        """Which images make the value: those of the data set itself."""
        members = self._members(split)
        pooled = self.data.manifest.get("pool_test_sets", False)
        return np.arange(len(members)) if pooled else np.flatnonzero(members == 0)

    def _members(self, split: str) -> NDArray[np.int64]:
        if split != "test":
            return np.zeros(self.data.size(split), dtype=np.int64)
        return self.data.column(split, "test_set")

    def _truths(self, split: str) -> Iterator[Mask]:
        masks = self.data.targets(split, "mask")
        return (decode_mask(masks.encoded(i)) for i in range(len(masks)))

    def _pairs(self, predictions: Path, split: str) -> Iterator[tuple[Prediction, Mask]]:
        sizes = self.data.column(split, "size").tolist()
        found = read_predictions(predictions, sizes)
        return zip(found, self._truths(split), strict=True)

    def _image(self, prediction: Prediction, truth: Mask, cut: float | None) -> _Image:
        mask = _mask(prediction, truth.shape, cut)
        side = prediction.model_mask.shape[0]
        small = _mask(prediction, (side, side), cut)
        counts = Counts.of(mask, truth)
        at_model_size = Counts.of(small, resize_mask(truth, side))
        tolerance = self.settings.boundary_tolerance * float(np.hypot(*truth.shape))
        values = {
            "dice": counts.dice,
            "iou": counts.iou,
            "dice-model-size": at_model_size.dice,
            "iou-model-size": at_model_size.iou,
            "boundary-f": boundary_f(mask, truth, max(1.0, tolerance)),
        }
        if prediction.probabilities is not None:
            level = enlarged(prediction.probabilities, truth.shape)
            values |= {
                "s-measure": s_measure(level, truth),
                "mae": mean_absolute_error(level, truth),
            }
        shares = (counts.tp + counts.fp) / mask.size, (counts.tp + counts.fn) / mask.size
        return _Image(counts, at_model_size, values, shares)

    # ------------------------------------------------------------------------- threshold

    def _threshold(self, predictions: Path, split: str) -> float | None:
        """The threshold to apply to the maps, or None: the masks are as stored, at 0.5."""
        threshold = self.settings.threshold
        if threshold == 0.5:
            return None
        # in a search's trial the validation images play the test split, and there are no others
        chosen = threshold == "val" and split != "val" and self.data.scored != "val"
        place = predictions.parent / "val" if chosen else predictions
        if not place.is_dir() or not read_index(place).map_size:
            raise UserError(
                f"threshold: {threshold} needs the probability maps of {place}, which are not "
                "there; train with probabilities: true"
                + (" and train_split: train." if chosen else ".")
            )
        if threshold == "val":
            return self._best(place, "val" if chosen else split)
        return float(threshold)

    @cache  # noqa: B019 - a scorer lives as long as one scoring
    def _best(self, place: Path, split: str) -> float:
        """The threshold with the best mean Dice of the split in ``place``, nearest to 0.5."""
        totals = np.zeros(len(THRESHOLDS))
        for prediction, truth in self._pairs(place, split):
            assert prediction.probabilities is not None
            level = enlarged(prediction.probabilities, truth.shape)
            totals += [Counts.of(level > t, truth).dice for t in THRESHOLDS]
        best = np.flatnonzero(totals == totals.max())
        return THRESHOLDS[int(best[np.abs(best - len(THRESHOLDS) // 2).argmin()])]


def _mask(prediction: Prediction, shape: tuple[int, ...], cut: float | None) -> Mask:
    """The mask at the original or the model's size, as stored or above ``cut``."""
    if cut is not None:
        assert prediction.probabilities is not None
        return enlarged(prediction.probabilities, shape) > cut
    return prediction.mask if prediction.mask.shape == shape else prediction.model_mask


def enlarged(levels: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A map of 256 levels at (H, W) pixels, bilinear, in [0, 1]."""
    picture = Image.fromarray(levels.astype(np.float32))
    size = (shape[1], shape[0])
    levels32 = np.asarray(picture.resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
    return levels32 / np.float32(255)


def _pooled(images: list[_Image]) -> dict[str, float]:
    """Metrics of pooled pixels: ours at the original size, the released ones at the model's."""
    zero = Counts(0, 0, 0)
    counts = sum((image.original for image in images), zero)
    dice, iou = sum((image.model_size for image in images), zero).foreground_recall
    return {
        "dice-pooled": counts.dice,
        "iou-pooled": counts.iou,
        "released-dice": dice,
        "released-iou": iou,
    }
