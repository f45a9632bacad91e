"""The metrics of binary segmentation, each of one image: masks bool (H, W), maps float in [0, 1].

Pooled values and means over images are made of these by the scorer. ``Counts`` are pixels; the
background counts everywhere but in the released metric, which is said at `foreground_recall`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Map = NDArray[np.floating]


@dataclass(frozen=True)
class Counts:
    """Pixels that are foreground in both (tp), in the prediction only (fp), in the truth only."""

    tp: int
    fp: int
    fn: int

    @classmethod
    def of(cls, predicted: Mask, true: Mask) -> Counts:
        """Count the pixels of one image; raises ``ValueError`` where the shapes differ."""
        if predicted.shape != true.shape:
            raise ValueError(f"prediction {predicted.shape} and mask {true.shape} differ in shape")
        tp = int(np.count_nonzero(predicted & true))
        ours, truth = int(np.count_nonzero(predicted)), int(np.count_nonzero(true))
        return cls(tp, ours - tp, truth - tp)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN); 1 where neither has foreground."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN); 1 where neither has foreground."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def foreground_recall(self) -> tuple[float, float]:
        """What the released evaluation of GPS prints as mDice and mIoU, of pooled counts.

        It drops every pixel whose truth is background, so false positives never count: "mIoU" is
        TP / (TP + FN), recall, and "mDice" is 2 TP / (2 TP + FN). A prediction of foreground
        everywhere has 1.0 in both. NaN without true foreground, as there.
        """
        if self.tp + self.fn == 0:
            return float("nan"), float("nan")
        return 2 * self.tp / (2 * self.tp + self.fn), self.tp / (self.tp + self.fn)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def boundary_f(predicted: Mask, true: Mask, tolerance: float) -> float:
    """F-score of the boundaries within ``tolerance`` pixels (Perazzi et al., CVPR 2016).

    Precision is the share of the prediction's boundary pixels that have a true boundary pixel
    within the tolerance, recall the reverse. 1 where both masks have no boundary, else 0 where
    one has none.
    """
    ours, truth = _pixels(_boundary(predicted)), _pixels(_boundary(true))
    if not len(ours) or not len(truth):
        return float(len(ours) == len(truth))
    precision, recall = _near(ours, truth, tolerance), _near(truth, ours, tolerance)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _near(points: NDArray[np.int64], others: NDArray[np.int64], tolerance: float) -> float:
    """The share of ``points`` (N, 2) with one of ``others`` within ``tolerance``.

    A tree of the few boundary pixels; a distance map of all pixels takes thirty times as long.
    """
    from scipy.spatial import cKDTree

    distance, _ = cKDTree(others).query(points, distance_upper_bound=tolerance + 1)
    return float((distance <= tolerance).mean())


def _pixels(mask: Mask) -> NDArray[np.int64]:
    """Rows and columns (N, 2) of the pixels of a mask."""
    return np.stack(np.divmod(np.flatnonzero(mask), mask.shape[1]), axis=1)


def _boundary(mask: Mask) -> Mask:
    """Foreground pixels with a background pixel among their four neighbours inside the image."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def mean_absolute_error(predicted: Map, true: Mask) -> float:
    """Mean of |p - t| over the pixels: of p where t is 0, of 1 - p where it is 1."""
    inside = predicted[true]
    total = predicted.sum(dtype=np.float64) - 2 * inside.sum(dtype=np.float64) + inside.size
    return float(total / predicted.size)


def s_measure(predicted: Map, true: Mask, alpha: float = 0.5) -> float:
    """Structure measure of a foreground map (Fan et al., ICCV 2017), at least 0.

    ``alpha`` weighs the object-aware part against the region-aware part. Without true foreground
    it is one minus the map's mean, with nothing but foreground its mean.
    """
    p = predicted.astype(np.float64)
    share = float(true.mean())
    if share in (0.0, 1.0):
        return float(p.mean() if share else 1 - p.mean())
    value = alpha * _object_part(p, true, share) + (1 - alpha) * _region_part(p, true)
    return max(0.0, value)


def _object_part(p: Map, true: Mask, share: float) -> float:
    return share * _object(p[true]) + (1 - share) * _object(1 - p[~true])


def _object(values: Map) -> float:
    """2 m / (m^2 + 1 + s), m and s mean and sample deviation of the map in one part."""
    mean = float(values.mean())
    deviation = math.sqrt(_squares(values - mean) / (values.size - 1)) if values.size > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + deviation + np.finfo(np.float64).eps)


def _squares(values: Map) -> float:
    """The sum of squares."""
    flat = values.ravel()
    return float(flat @ flat)


def _region_part(p: Map, true: Mask) -> float:
    """Similarity in the four rectangles around the truth's centroid, weighted by their area."""
    y, x = (_centre(true, axis) + 1 for axis in (0, 1))
    total = 0.0
    for rows in (np.s_[:y], np.s_[y:]):
        for columns in (np.s_[:x], np.s_[x:]):
            part = p[rows, columns]
            if part.size:
                total += part.size / p.size * _similarity(part, true[rows, columns])
    return total


def _centre(true: Mask, axis: int) -> int:
    """The mean row (axis 0) or column (axis 1) of the foreground, rounded."""
    counts = np.count_nonzero(true, axis=1 - axis)
    return round(float(np.arange(len(counts)) @ counts / counts.sum()))


def _similarity(p: Map, true: Mask) -> float:
    """Structural similarity of one rectangle, without stabilising constants.

    That the truth is 0 or 1 saves most passes over the pixels.
    """
    n, inside = p.size, int(np.count_nonzero(true))
    x, y, scale = float(p.mean()), inside / n, max(n - 1, 1)
    apart = p - x
    var_x, var_y = _squares(apart) / scale, n * y * (1 - y) / scale
    covariance = 0.0 if inside in (0, n) else float(apart[true].sum()) / scale
    above = 4 * x * y * covariance
    below = (x**2 + y**2) * (var_x + var_y)
    if above != 0:
        return above / (below + float(np.finfo(np.float64).eps))
    return 1.0 if below == 0 else 0.0
