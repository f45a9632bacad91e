"""What every reader hands on: labelled lines per split role, before any pixel is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROLES = ("train", "val", "test")
MAX_CLASSES = 2**15
"""Predicted classes are stored as int16; more is hardly ever meant, but a mistake in a list."""

LEFT_BEHIND = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "lost+found"})

Images = np.ndarray | Sequence[bytes]


@dataclass(frozen=True)
class Line:
    """One labelled image: where it is listed, its path or name, and its label."""

    where: str
    path: str
    label: int


@dataclass
class Listing:
    """A data set before its images are looked at.

    ``lines`` has ``train`` and ``test`` and, where there is one, ``val``. Images are files below
    ``image_root``, unless ``images`` holds them, in the order of the lines.
    ``only_trainval`` says that ``train`` holds the validation images too and cannot be told apart.
    """

    layout: str
    root: Path
    lines: dict[str, list[Line]]
    image_root: Path | None = None
    images: dict[str, Images] | None = None
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    only_trainval: bool = False
    union: list[Line] | None = None

    @property
    def files_root(self) -> Path:
        """The folder that paths of images are relative to."""
        return self.image_root or self.root


def left_behind(name: str) -> bool:
    """Whether a file or folder is none of the data's: hidden, or what systems leave in folders."""
    return name.startswith(".") or name in LEFT_BEHIND


def picked(images: Images, rows: Sequence[int]) -> Images:
    """Some images of a sequence, in the order of ``rows``; encoded ones stay where they are."""
    return images[np.asarray(rows)] if isinstance(images, np.ndarray) else _Picked(images, rows)


class _Picked(Sequence[bytes]):
    def __init__(self, images: Sequence[bytes], rows: Sequence[int]) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self.images[self.rows[index]]


def few(items: Sequence[object], limit: int = 5) -> str:
    """The first items and how many more there are."""
    shown = ", ".join(str(item) for item in items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown
