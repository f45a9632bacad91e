"""What an entry of labelled images may say under `options:`; free of numpy, for planning."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from snella.data.official import OFFICIAL
from snella.errors import UserError, unknown
from snella.validation import Strict, message_of, shown

LAYOUTS = {"test": "classes", "subset": "tfds"}
"""Options that mean something in one layout only."""


class Options(Strict):
    """A data set's ``options:`` in the configuration, for sets of labelled images."""

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
        found = Options.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"Data set {name!r}: options.{place}: {message_of(first)} "
            f"(got {shown(first['input'])}); correct it."
        ) from error
    if found.official is not None and found.official not in OFFICIAL:
        raise unknown(f"official data set of {name!r}:", found.official, OFFICIAL)
    return found


def check_layout(name: str, options: Options, layout: str, has_val: bool) -> None:
    """Refuse options that would do nothing for a folder in ``layout``."""
    for option in options.model_fields_set & set(LAYOUTS):
        if LAYOUTS[option] != layout:
            raise UserError(
                f"Data set {name!r}: options.{option} is for the layout {LAYOUTS[option]}, this "
                f"folder is in {layout} layout; remove it."
            )
    if options.val_share is not None and has_val:
        raise UserError(
            f"Data set {name!r}: options.val_share sets training images aside where a copy has no "
            "validation images; this one has some, so remove it."
        )
