"""What a segmentation data set's entry may say under `options:`, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from snella.errors import UserError, unknown
from snella.validation import Strict, message_of, shown


class Options(Strict):
    """How a folder of images and masks becomes train, val and test.

    ``split: disjoint`` keeps near-duplicates together and test images out of training. With
    ``split: released`` every image trains, as in the released configuration of GPS, and
    ``released_test`` (a folder of images and masks, or a list of names) is tested on, although it
    was trained on. ``test_sets`` adds further folders to the test split, each scored on its own.
    """

    split: Literal["disjoint", "released"] = "disjoint"
    train_list: str | None = None
    test_list: str | None = None
    released_test: str | None = None
    test_sets: dict[str, str] = {}
    val_fraction: float = Field(0.1, gt=0, lt=1)
    test_fraction: float = Field(0.12, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    near_duplicate_bits: int = Field(6, ge=0, le=32)
    allow_empty: bool = False


def parse_options(name: str, options: dict[str, Any]) -> Options:
    """Check the options of data set ``name``.

    Raises :class:`~snella.errors.UserError` with the closest match for an unknown key, and for
    values that contradict each other.
    """
    for key in options:
        if key not in Options.model_fields:
            raise unknown(f"option of data set {name!r}:", key, Options.model_fields)
    try:
        parsed = Options(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"Data set {name!r}: options.{where}: {message_of(first)} "
            f"(got {shown(first['input'])}); correct it."
        ) from error
    if (parsed.train_list is None) != (parsed.test_list is None):
        raise UserError(f"Data set {name!r}: give both train_list and test_list, or neither.")
    if name in parsed.test_sets:
        raise UserError(
            f"Data set {name!r}: a test set under `test_sets:` has its name, too; give it another."
        )
    if (parsed.released_test is None) != (parsed.split == "disjoint"):
        raise UserError(
            f"Data set {name!r}: `split: released` and `released_test:` (the folder or list of "
            "test images) go together."
        )
    return parsed


def lists_of(kind: str, root: Path, options: Options) -> tuple[Path, Path] | None:
    """The lists of training and test images: those given, or Kvasir-SEG's own if they are there.

    The data set's authors distribute `train.txt` (880 names) and `val.txt` (120) with it; the 120
    are tested on here, and a validation split is taken from the 880. In a folder of another kind
    files of these names may mean anything, and count only where the options name them. Raises
    :class:`~snella.errors.UserError` where one of the two is missing.
    """
    if options.train_list and options.test_list:
        return root / options.train_list, root / options.test_list
    own = root / "train.txt", root / "val.txt"
    found = [path for path in own if path.is_file()] if kind == "kvasir" else []
    if len(found) == 1:
        raise UserError(
            f"{found[0]} is one of Kvasir-SEG's two lists, train.txt and val.txt; add the other, "
            "or remove it to split by seed."
        )
    return own if found else None
