"""Segmentation's part of a protocol."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from snella.tasks.base import TaskSettings


class SegmentationSettings(TaskSettings):
    """Pixels, and how masks are made and scored.

    ``image_size`` is the side of the square that images are resized to (SAM's is 1024).
    ``probabilities`` stores the maps beside the masks at 0.5: they are needed for any other
    threshold, for S-measure and MAE. ``threshold`` is the probability above which a pixel is
    foreground; ``val`` chooses it on the validation split, by mean Dice, among 0.05, 0.10, ...
    0.95. ``boundary_tolerance`` is a share of the image's diagonal.
    """

    scoring: ClassVar[frozenset[str]] = frozenset({"threshold", "boundary_tolerance"})

    image_size: int = Field(1024, gt=0)
    augmentation: Literal["none", "flip"] = "flip"
    threshold: float | Literal["val"] = 0.5
    probabilities: bool = True
    boundary_tolerance: float = Field(0.0075, gt=0, lt=0.5)

    @field_validator("threshold")
    @classmethod
    def _probability(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("a threshold is a probability between 0 and 1, or val")
        return value
