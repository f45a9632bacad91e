"""The community's VTAB-1k folder: four lists of `path label` lines beside a tree of images.

The layout is that of NOAH's get_vtab1k.py, read by most published code: `train800.txt`,
`val200.txt`, `train800val200.txt` and `test.txt`, a path relative to the folder and an integer
label per line; `classes.txt`, one name per line, is optional. Copies made for the final training
alone lack `val200.txt`, and perhaps `train800.txt`; `train800val200.txt` may be missing where both
are there.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter
from pathlib import Path

from snella.data.options import Options
from snella.data.readers.listing import Line, Listing, few
from snella.data.readers.text import is_file, read_text, whole_number
from snella.errors import UserError

UNION = "train800val200"
LISTS = ("train800", "val200", UNION, "test")
ROLE = {"train800": "train", "val200": "val", "test": "test"}
DRIVE = re.compile(r"[A-Za-z]:/")
LINE = re.compile(r"(?P<path>\S.*?)\s+(?P<label>-?[0-9]+)")


def found(root: Path) -> bool:
    """Whether ``root`` has one of the lists."""
    return any((root / f"{split}.txt").exists() for split in LISTS)


def read(root: Path, options: Options) -> Listing:
    """Read the lists; what their images hold is checked later."""
    have = {split for split in LISTS if (root / f"{split}.txt").exists()}
    notes: list[str] = []
    listing = Listing("vtab", root, {}, notes=notes)
    if have >= {UNION, "test"} and "val200" not in have:
        _without_val(root, listing, "train800" in have)
    else:
        needed = [split for split in LISTS if split in have or split != UNION]
        lists = {split: read_list(root, split, notes) for split in needed}
        listing.lines = {ROLE[split]: lists[split] for split in needed if split in ROLE}
        listing.union = lists.get(UNION)
    listing.class_names = class_names(root)
    if twice := [name for name, n in Counter(listing.class_names).items() if n > 1]:
        notes.append(f"classes.txt names {few(twice)} twice; numbers by class name the last alone")
    return listing


def _without_val(root: Path, listing: Listing, has_train: bool) -> None:
    """A copy for the final training: the 200 are what the 800 leave of the 1000, if told apart."""
    union = read_list(root, UNION, listing.notes)
    train = read_list(root, "train800", listing.notes) if has_train else []
    test = read_list(root, "test", listing.notes)
    listed = {line.path for line in train}
    rest = [line for line in union if line.path not in listed]
    if train and len(rest) == len(union):  # the 1000 are stored a second time
        held = {digest for line in train if (digest := _digest(root / line.path))}
        rest = [line for line in union if _digest(root / line.path) not in held]
    if train and len(rest) == len(union) - len(train):
        listing.lines = {"train": train, "val": rest, "test": test}
        listing.notes.append(
            f"val200.txt is missing: the {len(rest)} images of {UNION}.txt that train800.txt "
            "does not list were taken for it"
        )
        return
    listing.lines = {"train": union, "test": test}
    listing.only_trainval = True
    listing.notes.append(
        "val200.txt is missing: only protocols that train on all of the training images "
        "(`train_split: trainval`) can use this copy"
    )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def read_list(root: Path, split: str, notes: list[str]) -> list[Line]:
    """The lines of one list. Backslashes of a list written on Windows are read as slashes."""
    file = root / f"{split}.txt"
    needed = ", ".join(f"{name}.txt" for name in LISTS)
    lines, windows = [], False
    for number, text in enumerate(
        read_text(file, f"a data folder needs {needed}").split("\n"), start=1
    ):
        if not text.strip():
            continue
        where = f"{file}:{number}"
        match = LINE.fullmatch(text.strip())
        if match is None:
            raise UserError(
                f"{where}: {text.strip()[:200]!r} is not a line `path label`, a path and a whole "
                "number with a space between them."
            )
        path = match["path"]
        if "\\" in path and not is_file(root / path):
            path, windows = path.replace("\\", "/"), True
        if path[0] == path[-1] and path[0] in "\"'" and not is_file(root / path):
            path = path[1:-1]
        path = posixpath.normpath(path)
        if posixpath.isabs(path) or path.split("/")[0] == ".." or DRIVE.match(path):
            raise UserError(
                f"{where}: path {match['path'][:200]!r} leaves the folder {root}; make the paths "
                "of the list relative to it."
            )
        lines.append(Line(where, path, whole_number(match["label"], f"{where}: label")))
    if not lines:
        raise UserError(f"{file} is empty: every split needs at least one image.")
    if windows:
        notes.append(f"{file.name} has backslashes in its paths, read as slashes")
    return lines


def class_names(root: Path) -> list[str] | None:
    """The lines of classes.txt, if there is one."""
    file = root / "classes.txt"
    if not file.is_file():
        return None
    names = [name.strip() for name in read_text(file).split("\n") if name.strip()]
    if not names:
        raise UserError(f"{file} is empty; name the classes, one a line, or remove the file.")
    return names
