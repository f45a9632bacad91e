"""VTAB-1k as TFDS has it: the examples by whose order it is defined, and their labels.

VTAB's 1000 images are positions in the TFDS example order: the first 800 of its training part and
the first 200 of its validation part, which is official or begins at a percentage of the records
(`task_adaptation/data/*.py` of google-research/task_adaptation). Pixels never went through
another JPEG here. Labels of Clevr, KITTI, dSprites and sNORB are computed from annotations.

The folder holds the records that TFDS wrote (`<data_dir>/cifar100/3.0.2`, or a folder above it with
one version), or the unpacked original archives, of which `tfds_order` makes the same sequence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snella.data.images import decode
from snella.data.options import Options
from snella.data.readers.listing import Images, Line, Listing
from snella.data.readers.records import Column, Feature, Records, parse_example
from snella.data.readers.text import read_json
from snella.data.readers.tfds_order import Examples, read_originals
from snella.errors import UserError

SHARD = re.compile(
    r"(?P<name>.+)-(?P<split>[a-z_]+)\.(?:tfrecord|array_record)(?P<part>-\d+-of-\d+)?$"
)

Label = Callable[[dict[str, Feature]], int]


class Part(NamedTuple):
    """A piece of a TFDS split: from and to a share of its examples, in percent."""

    split: str
    start: int = 0
    stop: int = 100


class Recipe(NamedTuple):
    """Where VTAB's parts lie, and how a record gives a label."""

    train: Part
    val: Part | None
    test: Part
    label: Label
    scale: int = 1


def _stored(name: str, divide: float = 1.0) -> Label:
    return lambda features: int(np.floor(float(features[name][0]) / divide))


def clevr_count(features: dict[str, Feature]) -> int:
    """Number of objects minus 3, 0 to 7."""
    return len(features["objects/size"]) - 3


def clevr_distance(features: dict[str, Feature]) -> int:
    """Bin of the nearest object's depth; a value on an edge goes to the lower bin."""
    depth = np.asarray(features["objects/pixel_coords"], dtype=np.float32).reshape(-1, 3)[:, 2]
    return _bin(depth.min(), (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0))


def kitti_distance(features: dict[str, Feature]) -> int:
    """Distance of the nearest Car, Van or Truck: near, middle, far, none."""
    kinds = np.asarray(features.get("objects/type", ()), dtype=np.int64)
    location = np.asarray(features.get("objects/location", ()), dtype=np.float32).reshape(-1, 3)
    z = location[kinds < 3, 2]
    return _bin(min([*z.tolist(), 1000.0]), (-100.0, 8.0, 20.0, 999.0))


def _bin(value: float, edges: tuple[float, ...]) -> int:
    """Index of the last edge below ``value``."""
    return int(np.flatnonzero(np.asarray(edges, np.float32) < np.float32(value)).max())


def _official(label: Label) -> Recipe:
    return Recipe(Part("train"), Part("validation"), Part("test"), label)


def _ninety(label: Label, share: int = 90, test: str = "test") -> Recipe:
    return Recipe(Part("train", 0, share), Part("train", share), Part(test), label)


def _sixty(label: Label, first: int, second: int) -> Recipe:
    parts = Part("train", 0, first), Part("train", first, second), Part("train", second)
    return Recipe(*parts, label)


_LABEL = _stored("label")
_NORB = Part("train"), Part("test", 0, 50), Part("test", 50)
RECIPES: dict[str, Recipe] = {
    "cifar100": _ninety(_LABEL),
    "caltech101": _ninety(_LABEL),
    "dtd": _official(_LABEL),
    "flowers102": _official(_LABEL),
    "pets": _ninety(_LABEL, 80),
    "svhn": _ninety(_LABEL),
    "sun397": _official(_LABEL),
    "patch_camelyon": _official(_LABEL),
    "eurosat": _sixty(_LABEL, 60, 80),
    "resisc45": _sixty(_LABEL, 60, 80),
    "retinopathy": _official(_LABEL),
    "clevr_count": _ninety(clevr_count, test="validation"),
    "clevr_dist": _ninety(clevr_distance, test="validation"),
    "dmlab": _official(_LABEL),
    "kitti_dist": _official(kitti_distance),
    "dsprites_loc": _sixty(_stored("label_x_position", 2), 80, 90)._replace(scale=255),
    "dsprites_ori": _sixty(_stored("label_orientation", 2.5), 80, 90)._replace(scale=255),
    "smallnorb_azi": Recipe(*_NORB, _stored("label_azimuth")),
    "smallnorb_ele": Recipe(*_NORB, _stored("label_elevation")),
}
FULL: dict[str, Recipe] = {
    "cifar100": Recipe(Part("train"), None, Part("test"), _LABEL),
    "svhn": Recipe(Part("train"), None, Part("test"), _LABEL),
    "food101": Recipe(Part("train"), None, Part("validation"), _LABEL),
}
SUBSET = (800, 200)


def found(root: Path) -> bool:
    """Whether ``root`` holds TFDS-prepared records."""
    return bool(_folder(root))


def _folder(root: Path) -> Path | None:
    """The folder with the records: ``root`` or its only version."""
    below = sorted(p for p in root.iterdir() if p.is_dir() and re.fullmatch(r"[\d.]+", p.name))
    for folder in (root, *reversed(below)):
        if any(SHARD.match(p.name) for p in folder.iterdir() if p.is_file()):
            return folder
    return None


def read(root: Path, options: Options) -> Listing:
    """The images and labels of the set that ``options.official`` names, by TFDS order."""
    folder = _folder(root)
    suite, _, name = (options.official or "").partition("/")
    table = {"vtab1k": RECIPES, "full_image": FULL}.get(suite, {})
    if name not in table:
        known = [f"vtab1k/{n}" for n in RECIPES] + [f"full_image/{n}" for n in FULL]
        raise UserError(
            f"{root}: which data set this is must be said, since labels and parts "
            f"depend on it: `options: {{official: ...}}`, one of {', '.join(known)}."
        )
    recipe = table[name]
    if folder is not None and (name != "dmlab" or (folder / "dataset_info.json").is_file()):
        splits, notes = _recorded(folder), _version_notes(folder)
    else:  # DMLab's own archive holds records too
        splits, notes = read_originals(root, name), []
    limits = dict(zip(("train", "val"), options.subset or SUBSET, strict=True))
    lines: dict[str, list[Line]] = {}
    images: dict[str, Images] = {}
    for role in ("train", "val", "test"):
        part = getattr(recipe, role)
        if part is None:
            continue
        limit = limits.get(role) if suite == "vtab1k" else None
        span = _span(folder or root, splits, part, limit)
        names, features, pixels = splits[part.split]
        lines[role] = [Line(str(folder or root), names[i], recipe.label(features(i))) for i in span]
        if pixels is not None:
            found = pixels(span)
            images[role] = found if recipe.scale == 1 else _scaled(found, recipe.scale)
    return Listing("tfds", folder or root, lines, images=images or None, notes=notes)


def _recorded(folder: Path) -> dict[str, Examples]:
    """The splits that TFDS wrote, in their order."""
    found = {}
    for split, shards in _shards(folder).items():
        records = Records(shards)
        names = [f"{split}[{i}]" for i in range(len(records))]
        found[split] = Examples(names, partial(_parse, records, folder), partial(Column, records))
    return found


def _shards(folder: Path) -> dict[str, list[Path]]:
    """Shards of each split in order; a split whose parts are not all there is an error."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := SHARD.match(path.name):
            splits.setdefault(match["split"], []).append(path)
    for split, shards in splits.items():
        total = re.search(r"-of-(\d+)$", shards[0].name)
        if total and len(shards) != int(total[1]):
            remedy = (
                "copy the others" if len(shards) < int(total[1]) else "remove those of another copy"
            )
            raise UserError(
                f"{folder}: {len(shards)} of {int(total[1])} shards of split {split} are there; "
                f"{remedy}."
            )
    return splits


def _span(folder: Path, splits: dict[str, Examples], part: Part, limit: int | None) -> range:
    if part.split not in splits:
        raise UserError(
            f"{folder} has no split {part.split!r} (it has {', '.join(sorted(splits)) or 'none'})."
        )
    total = len(splits[part.split].names)
    start, stop = part.start * total // 100, part.stop * total // 100
    if limit is not None:
        if stop - start < limit:
            raise UserError(
                f"{folder}: split {part.split} holds {stop - start} images where {limit} are "
                "needed; it is not the complete data set."
            )
        stop = start + limit
    return range(start, stop)


def _parse(records: Records, folder: Path, index: int) -> dict[str, Feature]:
    features = parse_example(records[index])
    if "image" not in features:
        raise UserError(f"{folder}: record {index} has no image (it has {', '.join(features)}).")
    return features


def _scaled(images: Images, scale: int) -> np.ndarray:
    """dSprites: one-bit images, decoded and brought to 0 and 255."""
    if not isinstance(images, np.ndarray):
        images = np.stack([decode(image) for image in images])
    return images * np.uint8(scale)


def _version_notes(folder: Path) -> list[str]:
    file = folder / "dataset_info.json"
    if not file.is_file():
        return []
    try:
        info = read_json(file)
    except UserError as error:
        return [str(error)]
    if not isinstance(info, dict):
        return [f"{file} is no description of a TFDS version"]
    return [f"TFDS {info.get('name', '?')} version {info.get('version', folder.name)}"]
