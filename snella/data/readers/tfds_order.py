"""VTAB-1k from the original archives, in the order in which TFDS would have written them.

TFDS sorts the examples of a split by MD5 of the split's name followed by the example's key, and
cuts that sequence into shards; every builder of VTAB does so. The key is what the builder's
`_generate_examples` yields: a file's name, a path, or the position in an array. So the 1,000
images follow from the archive alone, but for Caltech101's.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snella.data.readers import original
from snella.data.readers.listing import Images, left_behind
from snella.data.readers.records import Column, Feature, Records, parse_example
from snella.data.readers.text import read_text, rows, whole_number
from snella.data.readers.tfds_pixels import Remade, retinopathy, sun397
from snella.errors import UserError

Features = dict[str, Feature]
SPLITS = ("train", "validation", "test")


class Examples(NamedTuple):
    """The examples of a TFDS split in their order.

    ``images`` gives those at some positions; without it they are the files that ``names`` name.
    """

    names: Sequence[str]
    features: Callable[[int], Features]
    images: Callable[[Sequence[int]], Images] | None = None


UNREAD = {
    "caltech101": "TFDS drew its 30 training images a class in the order in which its disk listed "
    "them",
}
"""The set whose images no archive gives as TFDS has them, and why."""


def tfds_order(split: str, keys: Iterable[str | int | bytes]) -> list[int]:
    """Positions of the examples with ``keys``, in the order of TFDS' split ``split``."""
    salt = hashlib.md5(split.encode(), usedforsecurity=False)

    def digest(key: str | int | bytes) -> bytes:
        salted = salt.copy()
        salted.update(key if isinstance(key, bytes) else str(key).encode())
        return salted.digest()

    hashes = [digest(key) for key in keys]
    return sorted(range(len(hashes)), key=hashes.__getitem__)


def read_originals(root: Path, name: str) -> dict[str, Examples]:
    """TFDS' splits of VTAB's set ``name`` from its unpacked archives in ``root``.

    Raises :class:`~snella.errors.UserError` where files are missing, or no archive gives the set.
    """
    if name not in SOURCES:
        why = UNREAD.get(name, "no reader for it")
        raise UserError(
            f"{root} holds no TFDS-prepared records (*.tfrecord-*, *.array_record-*), and its "
            f"original archive cannot take their place: {why}; prepare it with TFDS, or use an "
            "extracted copy (docs/data.md)."
        )
    held = [p for p in root.iterdir() if not left_behind(p.name)]
    if len(held) == 1 and held[0].is_dir():
        raise UserError(f"{root} holds nothing but {held[0].name}; set `path: {held[0]}`.")
    return SOURCES[name](root)


def _ordered(
    split: str,
    keys: Sequence[str | int | bytes],
    names: Sequence[str],
    features: Callable[[int], Features],
    images: Callable[[Sequence[int]], Images] | None = None,
) -> Examples:
    order = tfds_order(split, keys)
    return Examples(
        [names[i] for i in order],
        lambda i: features(order[i]),
        images and (lambda positions: images([order[i] for i in positions])),
    )


def _files(
    split: str, keys: Sequence[str], paths: Sequence[str], labels: Sequence[int]
) -> Examples:
    return _ordered(split, keys, paths, _labels(label=labels))


def _arrays(split: str, features: Callable[[int], Features], images: Any, count: int) -> Examples:
    """Examples whose key is their position."""
    names = [f"{split}[{i}]" for i in range(count)]
    return _ordered(split, range(count), names, features, partial(_taken, images))


def _labels(**columns: Any) -> Callable[[int], Features]:
    return lambda i: {name: np.asarray([column[i]]) for name, column in columns.items()}


def _taken(images: Any, positions: Sequence[int]) -> np.ndarray:
    """Rows of an array or of an HDF5 data set, which is read once and in its order; RGB."""
    taken: np.ndarray
    if isinstance(images, np.ndarray):
        taken = images[np.asarray(positions)]
    else:
        taken = np.empty((len(positions), *images.shape[1:]), images.dtype)
        wanted, step = np.asarray(positions), 4096
        for start in range(0, len(images), step):
            here = np.flatnonzero((wanted >= start) & (wanted < start + step))
            if len(here):
                taken[here] = images[start : start + step][wanted[here] - start]
    return taken if taken.ndim == 4 else np.repeat(taken[..., None], 3, axis=-1)


def _cifar(root: Path) -> dict[str, Examples]:
    """cifar-100-binary: coarse label, fine label and 3 x 32 x 32 bytes an image; or -python.

    Both archives hold the images in one order, as far as their first labels tell.
    """
    if (root / "meta").is_file():
        return _held("CIFAR-100 (python)", root)
    found = {}
    for split in ("train", "test"):
        table = _binary(root / f"{split}.bin").reshape(-1, 2 + 3 * 32 * 32)
        images = table[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        found[split] = _arrays(split, _labels(label=table[:, 1]), images, len(table))
    return found


def _held(release: str, root: Path) -> dict[str, Examples]:
    """A release that holds arrays."""
    listing = original.RELEASES[release].read(root)
    held = listing.images or {}
    return {
        split: _arrays(split, _labels(label=[x.label for x in lines]), held[split], len(lines))
        for split, lines in listing.lines.items()
    }


def _flowers(root: Path) -> dict[str, Examples]:
    found = {}
    for role, lines in original.RELEASES["Oxford Flowers 102"].read(root).lines.items():
        split = "validation" if role == "val" else role
        paths = [line.path for line in lines]
        found[split] = _files(split, [Path(p).name for p in paths], paths, [x.label for x in lines])
    return found


def _dtd(root: Path) -> dict[str, Examples]:
    """Official split 1 of the ten; the key is the path below images/."""
    parts = {"train": "train1", "validation": "val1", "test": "test1"}
    listed = {
        split: [entry for _, (entry,) in rows(root / "labels" / f"{file}.txt", 1)]
        for split, file in parts.items()
    }
    classes = sorted({Path(key).parent.name for keys in listed.values() for key in keys})
    return {
        split: _files(split, keys, [f"images/{key}" for key in keys],
                      [classes.index(Path(key).parent.name) for key in keys])
        for split, keys in listed.items()
    }  # fmt: skip


def _pets(root: Path) -> dict[str, Examples]:
    found = {}
    for split, file in (("train", "trainval.txt"), ("test", "test.txt")):
        place = root / "annotations" / file
        listed = rows(place, 4)
        keys = [f"{name}.jpg" for _, (name, *_) in listed]
        labels = [whole_number(line[1], f"{place}:{number}") - 1 for number, line in listed]
        found[split] = _files(split, keys, [f"images/{key}" for key in keys], labels)
    return found


def _class_folders(root: Path) -> dict[str, Examples]:
    """EuroSAT and RESISC45: a folder per class and one split; the key is class and file name."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not left_behind(p.name))
    files = [(label, p) for label, folder in enumerate(folders) for p in sorted(folder.iterdir())
             if p.suffix == ".jpg" and not left_behind(p.name)]  # fmt: skip
    if not folders:
        raise UserError(f"{root} has no class folders; correct `path:` (docs/data.md).")
    if without := set(folders) - {p.parent for _, p in files}:
        raise UserError(
            f"{min(without)} holds no images (*.jpg), where every folder is a class; remove it, or "
            "correct `path:` (docs/data.md)."
        )
    keys = [f"{p.parent.name}_{p.name}" for _, p in files]
    paths = [p.relative_to(root).as_posix() for _, p in files]
    return {"train": _files("train", keys, paths, [label for label, _ in files])}


def _sun397(root: Path) -> dict[str, Examples]:
    """SUN397/, and the lists of TFDS's own split; the key is the path as they give it."""
    lists = {split: root / f"sun397_tfds_{split[:2]}.txt" for split in SPLITS}
    if missing := next((file for file in lists.values() if not file.is_file()), None):
        raise UserError(
            f"{missing} is missing: TFDS splits SUN397 by three lists of its own; copy them from "
            "the package tensorflow-datasets (docs/data.md)."
        )
    listed = {split: [key for _, (key,) in rows(file, 1)] for split, file in lists.items()}
    classes = sorted({key.rpartition("/")[0] for keys in listed.values() for key in keys})
    found = {}
    for split, keys in listed.items():
        labels = [classes.index(key.rpartition("/")[0]) for key in keys]
        paths = [f"SUN397{key}" for key in keys]
        found[split] = _remade(split, root, keys, paths, labels, sun397)
    return found


def _retinopathy(root: Path) -> dict[str, Examples]:
    """Kaggle's train/ and test/, whose labels came later; the key is the file's name."""
    found = {}
    for split, file, usage in (
        ("train", "trainLabels.csv", None),
        ("validation", "retinopathy_solution.csv", "Public"),
        ("test", "retinopathy_solution.csv", "Private"),
    ):
        text = [line for line in read_text(root / file).splitlines() if line.strip()]
        lines = csv.DictReader(text)
        taken = [line for line in lines if usage is None or line["Usage"] == usage]
        keys = [line["image"] for line in taken]
        paths = [f"{'test' if usage else 'train'}/{key}.jpeg" for key in keys]
        labels = [whole_number(line["level"], f"{root / file}: level") for line in taken]
        found[split] = _remade(split, root, keys, paths, labels, retinopathy)
    return found


def _remade(
    split: str,
    root: Path,
    keys: Sequence[str],
    paths: Sequence[str],
    labels: Sequence[int],
    make: Callable[[bytes], bytes],
) -> Examples:
    """Files whose images TFDS changes."""
    return _ordered(
        split, keys, paths, _labels(label=labels),
        lambda positions: Remade([root / paths[i] for i in positions], make),
    )  # fmt: skip


def _clevr(root: Path) -> dict[str, Examples]:
    """CLEVR_v1.0: the scenes belong to the images in the order of their names."""
    found = {}
    for split, part in (("train", "train"), ("validation", "val")):
        file = root / "scenes" / f"CLEVR_{part}_scenes.json"
        scenes = _scenes(file)
        folder = root / "images" / part
        names = sorted(p.name for p in folder.glob("*.png") if p.name[0] != ".")
        if len(names) != len(scenes):
            raise UserError(
                f"{folder} has {len(names):,} images, {file.name} {len(scenes):,} scenes; unpack "
                "the archive completely."
            )

        found[split] = _ordered(
            split, names, [f"images/{part}/{n}" for n in names], partial(_objects, scenes)
        )
    return found


def _objects(scenes: list[list[Any]], i: int) -> Features:
    depths = np.asarray(scenes[i], np.float32)
    return {"objects/size": np.ones(len(depths)), "objects/pixel_coords": depths}


def _scenes(file: Path) -> list[list[Any]]:
    """Pixel coordinates of each scene's objects; the rest would fill the memory."""

    def kept(entry: dict[str, Any]) -> Any:
        if "pixel_coords" in entry:
            return entry["pixel_coords"]
        return entry["objects"] if "objects" in entry else {"scenes": entry.get("scenes")}

    try:
        with file.open("rb") as stream:
            found: list[list[Any]] = json.load(stream, object_hook=kept)["scenes"]
    except FileNotFoundError:
        raise UserError(f"{file} is missing; unpack the archive completely.") from None
    return found


def _kitti(root: Path) -> dict[str, Examples]:
    """The training half of KITTI's object benchmark, cut by video as TFDS draws them."""
    mapping = next((p for p in (root / "mapping", *root.glob("*/mapping")) if p.is_dir()), None)
    if mapping is None:
        raise UserError(f"{root} lacks mapping/train_rand.txt: unpack devkit_object.zip there.")
    videos: dict[str, list[int]] = defaultdict(list)
    listed = read_text(mapping / "train_mapping.txt").splitlines()
    for image, number in enumerate(read_text(mapping / "train_rand.txt").split(",")):
        videos[listed[int(number) - 1].split(" ")[1]].append(image)
    draw, tenth = np.random.RandomState(123), max(1, len(videos) // 10)
    test = set(draw.choice(sorted(videos), tenth, replace=False))
    validation = set(draw.choice(sorted(set(videos) - test), tenth, replace=False))
    parts = {"train": set(videos) - test - validation, "validation": validation, "test": test}
    found = {}
    for split, names in parts.items():
        images = sorted(i for video in names for i in videos[video])
        keys = [f"{i:06d}.png" for i in images]
        labels = [root / "training" / "label_2" / f"{i:06d}.txt" for i in images]
        found[split] = _ordered(split, keys, [f"training/image_2/{key}" for key in keys],
                                partial(_vehicles, labels))  # fmt: skip
    return found


def _vehicles(files: list[Path], i: int) -> Features:
    """Kinds (Car, Van and Truck are 0 to 2, all others 3) and places of the objects in an image."""
    objects = [line.split() for line in read_text(files[i]).splitlines() if line.strip()]
    kinds = ("Car", "Van", "Truck")
    return {
        "objects/type": np.asarray([kinds.index(o[0]) if o[0] in kinds else 3 for o in objects]),
        "objects/location": np.asarray([o[11:14] for o in objects], np.float32),
    }


def _dmlab(root: Path) -> dict[str, Examples]:
    """The archive's own records, in another order than TFDS'."""
    found = {}
    for split in SPLITS:
        shards = sorted(root.glob(f"dmlab-{split}.tfrecord*"))
        if not shards:
            raise UserError(
                f"{root} lacks dmlab-{split}.tfrecord-*; unpack the archive completely."
            )
        records = Records(shards)
        columns = [(x["filename"][0], x["label"][0]) for x in map(parse_example, records)]
        keys = [bytes(key) for key, _ in columns]
        names = [f"{split}/{key.decode()}" for key in keys]
        features = _labels(label=[int(label) for _, label in columns])
        found[split] = _ordered(split, keys, names, features, partial(Column, records))
    return found


def _camelyon(root: Path) -> dict[str, Examples]:
    """Six HDF5 files; the key is the part's name, an underscore and the position."""
    found = {}
    for split, part in (("train", "train"), ("validation", "valid"), ("test", "test")):
        images, labels = (
            _hdf5(root / f"camelyonpatch_level_2_split_{part}_{kind}.h5")[kind] for kind in "xy"
        )
        keys = [f"{part}_{i}" for i in range(len(images))]
        found[split] = _ordered(split, keys, keys, _labels(label=np.ravel(labels[:])),
                                partial(_taken, images))  # fmt: skip
    return found


def _dsprites(root: Path) -> dict[str, Examples]:
    content = _hdf5(root / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5")
    classes = content["latents"]["classes"][:]
    features = _labels(label_orientation=classes[:, 3], label_x_position=classes[:, 4])
    return {"train": _arrays("train", features, content["imgs"], len(classes))}


def _smallnorb(root: Path) -> dict[str, Examples]:
    """Images of two cameras, of which the left counts, and four numbers an image."""
    found = {}
    for split, stem in (("train", "46789x9x18x6x2x96x96-training"),
                        ("test", "01235x9x18x6x2x96x96-testing")):  # fmt: skip
        images, info = (_norb(root / f"smallnorb-5x{stem}-{kind}.mat") for kind in ("dat", "info"))
        features = _labels(label_elevation=info[:, 1], label_azimuth=info[:, 2] // 2)
        found[split] = _arrays(split, features, images[:, 0], len(images))
    return found


def _norb(file: Path) -> np.ndarray:
    """NORB's binary matrix: a kind, the number of dimensions, at least three sizes, the values."""
    content = _binary(file)
    kind, count = content[:8].view("<i4").tolist()
    shape = content[8 : 8 + 4 * count].view("<i4").tolist()
    types = {0x1E3D4C55: "u1", 0x1E3D4C54: "<i4"}
    return content[8 + 4 * max(3, count) :].view(types[kind]).reshape(shape)


def _binary(file: Path) -> np.ndarray:
    """The bytes of a file, mapped."""
    if not file.is_file():
        raise UserError(f"{file} is missing; unpack the archive there (docs/data.md).")
    return np.memmap(file, dtype=np.uint8, mode="r")


def _hdf5(file: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise UserError(f"{file}: reading it needs h5py; pip install snella[tfds].") from None
    _binary(file)
    try:
        return h5py.File(file)
    except OSError as error:
        raise UserError(f"{file} is damaged or no HDF5 file ({error}); fetch it anew.") from error


SOURCES: dict[str, Callable[[Path], dict[str, Examples]]] = {
    "cifar100": _cifar,
    "dtd": _dtd,
    "flowers102": _flowers,
    "pets": _pets,
    "svhn": partial(_held, "SVHN (cropped)"),
    "patch_camelyon": _camelyon,
    "eurosat": _class_folders,
    "resisc45": _class_folders,
    "clevr_count": _clevr,
    "clevr_dist": _clevr,
    "dmlab": _dmlab,
    "kitti_dist": _kitti,
    "dsprites_loc": _dsprites,
    "dsprites_ori": _dsprites,
    "smallnorb_azi": _smallnorb,
    "smallnorb_ele": _smallnorb,
    "sun397": _sun397,
    "retinopathy": _retinopathy,
}
