"""What every reader hands on: labelled lines per split role, before any pixel is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from snella.errors import UserError, unknown

ROLES = ("train", "val", "test")
MAX_CLASSES = 100_000
"""Labels are class indices; a head of more classes is a mistake in a list, and takes gigabytes."""

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
    sources: list[Path] = field(default_factory=list)

    @property
    def files_root(self) -> Path:
        """The folder that paths of images are relative to."""
        return self.image_root or self.root


class Options(BaseModel):
    """A data set's ``options:`` in the configuration, for sets of labelled images."""

    model_config = ConfigDict(extra="forbid")

    layout: Literal["auto", "vtab", "vpt", "classes", "original", "tfds"] = "auto"
    official: str | None = Field(None, description="id whose published counts the copy must have")
    variant: Literal["original", "lossless", "community-jpeg"] | None = Field(
        None, description="which pixels are expected; another variant is reported"
    )
    first_label: int = Field(0, ge=0, description="the label of the first class in the files")
    test: str | None = Field(None, description="folder of the test images where it is not `test`")
    val_share: float | None = Field(
        None, gt=0, lt=1, description="share of the training images to set aside as val"
    )
    split_seed: int = Field(0, ge=0)
    subset: tuple[int, int] | None = Field(
        None, description="VTAB-1k from complete data: numbers of train and val images"
    )


def options_of(name: str, options: dict[str, Any]) -> Options:
    """Validate a data set's options; the first problem becomes one line."""
    for key in options:
        if key not in Options.model_fields:
            raise unknown(f"option of data set {name!r}:", key, Options.model_fields)
    try:
        return Options.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"Data set {name!r}: options.{place}: {first['msg']} (got {first['input']!r})."
        ) from error


def few(items: Sequence[object], limit: int = 5) -> str:
    """The first items and how many more there are."""
    shown = ", ".join(str(item) for item in items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown
