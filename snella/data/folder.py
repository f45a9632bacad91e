"""The community's VTAB-1k folder: four lists of `path label` lines beside a tree of images.

The layout is that of NOAH's get_vtab1k.py, read by most published code:
`train800.txt`, `val200.txt`, `train800val200.txt` and `test.txt`, a path relative to the folder
and an integer label per line; `classes.txt`, one name per line, is optional.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snella.data.images import EncodedFiles, decode
from snella.data.prepared import Column
from snella.data.storage import hash_image
from snella.errors import UserError

UNION = "train800val200"
STORED = {"train800": "train", "val200": "val", "test": "test"}
"""The lists that are stored, and the split each becomes."""
LISTS = ("train800", "val200", UNION, "test")
LINE = re.compile(r"(?P<path>\S.*?)\s+(?P<label>-?[0-9]+)")
SMALL = 64 * 64  # pixels up to which images of one size are stored decoded


@dataclass(frozen=True)
class Line:
    """One line of a list: where it stands, the image it names, and its label."""

    where: str
    path: str
    label: int


@dataclass(frozen=True)
class Seen:
    """What a complete look at an image found: height and width, encoding, hash of its pixels."""

    shape: tuple[int, int]
    encoding: str
    pixels: bytes


def read_folder(
    root: Path, name: str, num_classes: int | None = None
) -> tuple[dict[str, tuple[Column, np.ndarray]], dict[str, Any]]:
    """Read and check a data set in the community's layout.

    Every image is decoded completely once. Images of one size of at most 64x64 pixels come back
    decoded, all others as their encoded files.

    Args:
        root: the folder with the four lists.
        name: the data set's name in messages and in the manifest.
        num_classes: labels must be below it; if absent it is the number of lines of classes.txt
            or else one more than the highest label.

    Returns:
        Splits (images, labels int64 (N,)) by name and info, ready for `write_prepared`.

    Raises:
        UserError: the first thing wrong, with file and line.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"Data set {name!r}: there is no folder {root}.")
    lists = {split: _read_list(root, split) for split in LISTS}
    class_names = _class_names(root)
    num_classes = _check_labels(lists, num_classes, class_names, root)
    _check_distinct(lists)
    seen = _look_at_all(root, lists)
    _check_union(root, lists, seen)
    info = {
        "name": name,
        "source": f"folder {root}",
        "licence": "see the folder's owner",
        "num_classes": num_classes,
        "class_names": class_names,
        "jpeg": any(image.encoding == "JPEG" for image in seen.values()),
    }
    stored = [seen[line.path].shape for split in STORED for line in lists[split]]
    height, width = stored[0]
    small = len(set(stored)) == 1 and height * width <= SMALL
    splits: dict[str, tuple[Column, np.ndarray]] = {}
    for split, role in STORED.items():
        paths = [root / line.path for line in lists[split]]
        images = _decoded(paths, stored[0]) if small else EncodedFiles(paths)
        splits[role] = (images, np.asarray([line.label for line in lists[split]], dtype=np.int64))
    return splits, info


def _read_list(root: Path, split: str) -> list[Line]:
    file = root / f"{split}.txt"
    lines = []
    for number, text in enumerate(_read_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{file}:{number}"
        match = LINE.fullmatch(text.strip())
        if match is None:
            raise UserError(f"{where}: {text.strip()!r} is not a line `path label`.")
        path = posixpath.normpath(match["path"])
        if posixpath.isabs(path) or path.split("/")[0] == "..":
            raise UserError(f"{where}: path {match['path']!r} leaves the folder {root}.")
        lines.append(Line(where, path, int(match["label"])))
    if not lines:
        raise UserError(f"{file} is empty: every split needs at least one image.")
    return lines


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        needed = ", ".join(f"{split}.txt" for split in LISTS)
        raise UserError(f"{file} is missing: a data folder needs {needed}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file in UTF-8.") from None


def _class_names(root: Path) -> list[str] | None:
    file = root / "classes.txt"
    if not file.is_file():
        return None
    return [name.strip() for name in _read_text(file).split("\n") if name.strip()]


def _check_labels(
    lists: dict[str, list[Line]], given: int | None, class_names: list[str] | None, root: Path
) -> int:
    """Return the number of classes after checking every label against it."""
    if given is not None and class_names is not None and given != len(class_names):
        raise UserError(
            f"{root / 'classes.txt'} names {len(class_names)} classes, the config says {given}."
        )
    known = given if given is not None else len(class_names) if class_names else None
    lines = [line for split in LISTS for line in lists[split]]
    classes = known if known is not None else 1 + max(line.label for line in lines)
    for line in lines:
        if not 0 <= line.label < classes:
            allowed = f"0 to {classes - 1}" if known is not None else "0 and upwards"
            raise UserError(f"{line.where}: label {line.label} is out of range, {allowed}.")
    return classes


def _check_distinct(lists: dict[str, list[Line]]) -> None:
    """No image twice in a list, none in two of the splits; the union is allowed to repeat."""
    for group in (STORED, (UNION,)):
        first: dict[str, Line] = {}
        for line in (line for split in group for line in lists[split]):
            if line.path in first:
                raise UserError(f"{line.where}: {line.path} is also in {first[line.path].where}.")
            first[line.path] = line


def _look_at_all(root: Path, lists: dict[str, list[Line]]) -> dict[str, Seen]:
    """Decode every image of every list once, or name the first that is missing or corrupt."""
    lines: dict[str, Line] = {}
    for line in (line for split in (*STORED, UNION) for line in lists[split]):
        lines.setdefault(line.path, line)
    missing = [line for line in lines.values() if not (root / line.path).is_file()]
    if missing:
        first, more = missing[0], len(missing) - 1
        others = f", and {more} more" if more else ""
        raise UserError(f"{first.where}: image {first.path} is missing{others}.")
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda line: _look_at(root, line), lines.values())
        return dict(zip(lines, found, strict=True))


def _look_at(root: Path, line: Line) -> Seen:
    from PIL import Image

    try:
        data = (root / line.path).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            encoding = image.format or "unknown"
            image.verify()  # checksums, which decoding does not look at
        pixels = decode(data)
    except Exception as error:  # Pillow's decoders raise whatever went wrong inside them
        raise UserError(f"{line.where}: image {line.path} cannot be decoded: {error}.") from error
    height, width = pixels.shape[:2]
    return Seen((height, width), encoding, hash_image(pixels.tobytes()))


def _check_union(root: Path, lists: dict[str, list[Line]], seen: dict[str, Seen]) -> None:
    """train800val200 must be train800 and val200 together, else two protocols hide in a folder.

    Copies made by NOAH's script keep the 1000 images a second time under other names; they are
    then compared by their pixels.
    """
    parts = [*lists["train800"], *lists["val200"]]
    by_path = bool({line.path for line in parts} & {line.path for line in lists[UNION]})

    def key(line: Line) -> tuple[str | bytes, int]:
        return (line.path if by_path else seen[line.path].pixels, line.label)

    for extra, others, state in (
        (lists[UNION], parts, "is not in train800.txt or val200.txt"),
        (parts, lists[UNION], f"is not in {UNION}.txt"),
    ):
        left = Counter(key(line) for line in others)
        for line in extra:
            left[key(line)] -= 1
            if left[key(line)] < 0:
                raise UserError(
                    f"{line.where}: {line.path} with label {line.label} {state}; "
                    f"{root / UNION}.txt must be the two lists together."
                )


def _decoded(paths: Sequence[Path], shape: tuple[int, int]) -> np.ndarray:
    images = np.empty((len(paths), *shape, 3), dtype=np.uint8)
    for row, path in zip(images, paths, strict=True):
        row[:] = decode(path.read_bytes())
    return images
