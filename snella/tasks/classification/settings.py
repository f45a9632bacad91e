"""What a protocol says about classification besides optimisation and selection."""

from __future__ import annotations

from pydantic import Field

from snella.data.pixels import PixelSettings
from snella.tasks.base import TaskSettings

PREDICTIONS = "top1.npy"
"""The file of predicted classes, int16 (N,), in the order of the split."""


class ClassificationSettings(PixelSettings, TaskSettings):
    """Pixels, and the regularisers of the published scripts that belong to the task."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0, le=100)
    cutmix: float = Field(0.0, ge=0, le=100)
    drop_last: bool = Field(False, description="Train without an epoch's last, smaller batch.")
