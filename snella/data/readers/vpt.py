"""VPT's FGVC layout: train.json, val.json and test.json, one object of image path to class id.

Class ids are what the source used, often from 1; VPT renumbers the ids that occur from 0 in sorted
order, and so does this reader. Images lie below `images/` (CUB, NABirds), `Images/` (Stanford
Dogs) or the folder itself (Oxford Flowers, Stanford Cars).

The json files are the only record of which tenth of the training images VPT set aside: its code
holds no seed for them, so :func:`set_aside` cannot repeat that choice. It makes another 90/10
split, seeded, the same on every machine.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snella.data.options import Options
from snella.data.readers.listing import Line, Listing, few
from snella.data.readers.text import read_json, whole_number
from snella.errors import UserError

FILES = ("train", "val", "test")
IMAGE_FOLDERS = ("images", "Images", ".")


def found(root: Path) -> bool:
    """Whether ``root`` has VPT's lists."""
    return (root / "train.json").is_file() and (root / "test.json").is_file()


def read(root: Path, options: Options) -> Listing:
    """Read the lists and renumber their class ids from 0."""
    splits = {role: _read_json(root / f"{role}.json") for role in FILES
              if role != "val" or (root / "val.json").exists()}  # fmt: skip
    ids = {role: {line.label for line in lines} for role, lines in splits.items()}
    everywhere = sorted(set().union(*ids.values()))
    number = {class_id: index for index, class_id in enumerate(everywhere)}
    lines = {
        role: [Line(line.where, line.path, number[line.label]) for line in split]
        for role, split in splits.items()
    }
    notes = []
    if everywhere != list(range(len(everywhere))):
        notes.append(
            f"class ids {everywhere[0]} to {everywhere[-1]} were renumbered to 0 to "
            f"{len(everywhere) - 1}, as VPT does"
        )
    for role, present in ids.items():
        if role != "train" and (lacking := sorted(set(everywhere) - present)):
            notes.append(
                f"{role}.json lacks {len(lacking)} of the classes ({few(lacking)}); VPT's own "
                "loader, which numbers the ids of each file by themselves, would shift its labels"
            )
    first = lines["train"][0].path
    folder = next((f for f in IMAGE_FOLDERS if (root / f / first).is_file()), IMAGE_FOLDERS[0])
    return Listing("vpt", root, lines, image_root=root / folder, notes=notes)


def _read_json(file: Path) -> list[Line]:
    content: Any = read_json(file)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file} must hold one object of image path to class id, as VPT's lists.")
    lines = []
    for path, label in content.items():
        number = whole_number(str(label), f"{file}: class id of {path[:200]!r}")
        clean = posixpath.normpath(path.replace("\\", "/"))
        if posixpath.isabs(clean) or clean.split("/")[0] == "..":
            raise UserError(f"{file}: path {path!r} leaves the data set's folder.")
        lines.append(Line(str(file), clean, number))
    return lines


def set_aside(lines: Sequence[Line], share: float, seed: int) -> tuple[list[Line], list[Line]]:
    """Training and validation lines: a seeded draw of ``share``, the same on every machine.

    Images are ranked by a hash of seed and path, so neither file order nor a library's random
    generator matters.
    """
    ranked = sorted(
        lines, key=lambda line: hashlib.sha256(f"{seed}\0{line.path}".encode()).digest()
    )
    count = max(1, round(share * len(lines)))
    if count >= len(lines):
        raise UserError(
            f"{len(lines)} training images are too few to set a share of {share} aside."
        )
    held = {id(line) for line in ranked[:count]}
    return [x for x in lines if id(x) not in held], [x for x in lines if id(x) in held]
