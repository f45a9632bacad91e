"""A raw folder as pairs of images and labels per split role; the readers do the work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from snella.data.prepared import Column
from snella.data.readers import read_images


def read_folder(
    root: Path,
    name: str,
    num_classes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, tuple[Column, np.ndarray]], dict[str, Any]]:
    """Splits (images, labels int64 (N,)) by role and info, as :func:`read_images` reads them."""
    splits, info = read_images(root, name, num_classes, options)
    return {role: (part["image"], part["label"]) for role, part in splits.items()}, info
