"""The original releases, as their archives unpack: FGVC's five, CIFAR-100, SVHN and Food-101.

CUB-200-2011, NABirds, Oxford Flowers 102, Stanford Dogs, Stanford Cars with the official training
and test images (labels counted from 1 there, from 0 here); Flowers alone has an official
validation set. A tenth can be set aside with ``options: {val_share: 0.1}``, which is not VPT's
tenth (see `vpt`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snella.data.options import Options
from snella.data.readers.listing import Line, Listing
from snella.data.readers.text import read_text, rows, whole_number
from snella.errors import UserError


class _Release(NamedTuple):
    """Files by which a release is known, and its reader."""

    marks: tuple[str, ...]
    read: Callable[[Path], Listing]


def found(root: Path) -> bool:
    """Whether ``root`` is an unpacked original release."""
    return _release(root) is not None


def read(root: Path, options: Options) -> Listing:
    """Read the release that ``root`` holds."""
    release = _release(root)
    if release is None:
        raise UserError(
            f"{root} holds none of the original releases that are read "
            f"({', '.join(RELEASES)}); see docs/data.md."
        )
    return release.read(root)


def _release(root: Path) -> _Release | None:
    return next(
        (r for r in RELEASES.values() if all((root / mark).is_file() for mark in r.marks)), None
    )


def _birds(root: Path) -> Listing:
    """CUB-200-2011 and NABirds share one set of text files."""
    paths = _table(root / "images.txt")
    labels, flags = (
        {key: whole_number(value, f"{root / file}: image {key}")
         for key, value in _table(root / file).items()}
        for file in ("image_class_labels.txt", "train_test_split.txt")
    )  # fmt: skip
    present = sorted(set(labels.values()))
    index = {class_id: i for i, class_id in enumerate(present)}
    file = root / "classes.txt"
    names = {whole_number(k, str(file)): name for k, name in _table(file).items()}
    lines: dict[str, list[Line]] = {"train": [], "test": []}
    if unknown := sorted({*labels, *flags} - set(paths)):
        raise UserError(
            f"{root / 'images.txt'} lacks image {unknown[0]}, which has a class or split."
        )
    for key, path in paths.items():
        if key not in labels or flags.get(key) not in (0, 1):
            raise UserError(f"{root}: image {key} ({path}) has no class, or no split of 0 or 1.")
        role = "train" if flags[key] == 1 else "test"
        lines[role].append(Line(str(root / "images.txt"), path, index[labels[key]]))
    listing = Listing("original", root, lines, image_root=root / "images")
    if set(present) <= set(names):
        listing.class_names = [names[class_id] for class_id in present]
    return listing


def _table(file: Path) -> dict[str, str]:
    """The second column of a text file by the first, in which nothing may stand twice."""
    found: dict[str, str] = {}
    for number, (key, value) in rows(file, 2):
        if key in found:
            raise UserError(f"{file}:{number}: {key} stands there twice; fetch the original file.")
        found[key] = value
    return found


def _flowers(root: Path) -> Listing:
    labels = np.ravel(_mat(root / "imagelabels.mat")["labels"]).astype(int)
    sets = _mat(root / "setid.mat")
    lines = {
        role: [
            Line(
                str(root / "setid.mat"), f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1
            )
            for number in np.ravel(sets[key]).astype(int)
        ]
        for role, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
    }
    return Listing("original", root, lines)


def _dogs(root: Path) -> Listing:
    folder = root / "lists" if (root / "lists").is_dir() else root
    lines = {}
    for role in ("train", "test"):
        file = folder / f"{role}_list.mat"
        content = _mat(file)
        names = [str(np.ravel(item)[0]) for item in np.ravel(content["file_list"])]
        labels = np.ravel(content["labels"]).astype(int)
        lines[role] = [Line(str(file), n, int(k) - 1) for n, k in zip(names, labels, strict=True)]
    images = next((root / n for n in ("Images", "images") if (root / n).is_dir()), root / "Images")
    return Listing("original", root, lines, image_root=images)


def _cars(root: Path) -> Listing:
    """The split annotations of the devkit, or the older single file."""
    if (root / "cars_annos.mat").is_file():
        file = root / "cars_annos.mat"
        lines: dict[str, list[Line]] = {"train": [], "test": []}
        for item in np.ravel(_mat(file)["annotations"]):
            role = "test" if int(np.ravel(item["test"])[0]) else "train"
            path = str(np.ravel(item["relative_im_path"])[0])
            lines[role].append(Line(str(file), path, int(np.ravel(item["class"])[0]) - 1))
        return Listing("original", root, lines)
    train = root / "devkit" / "cars_train_annos.mat"
    candidates = [root / "cars_test_annos_withlabels.mat",
                  root / "devkit" / "cars_test_annos_withlabels.mat"]  # fmt: skip
    test = next((file for file in candidates if file.is_file()), None)
    if test is None:
        raise UserError(
            f"{root} lacks cars_test_annos_withlabels.mat: the devkit's test annotations have no "
            "classes; the file with them is a separate download."
        )
    lines = {}
    for role, file in (("train", train), ("test", test)):
        lines[role] = [
            Line(str(file), f"cars_{role}/{np.ravel(item['fname'])[0]}",
                 int(np.ravel(item["class"])[0]) - 1)
            for item in np.ravel(_mat(file)["annotations"])
        ]  # fmt: skip
    return Listing("original", root, lines)


def _food(root: Path) -> Listing:
    names = [line.strip() for line in read_text(root / "meta" / "classes.txt").split() if line]
    lines: dict[str, list[Line]] = {}
    for role in ("train", "test"):
        file = root / "meta" / f"{role}.txt"
        lines[role] = []
        for number, (entry,) in rows(file, 1):
            label = entry.partition("/")[0]
            if label not in names:
                raise UserError(f"{file}:{number}: class {label!r} is not in meta/classes.txt.")
            lines[role].append(Line(f"{file}:{number}", f"images/{entry}.jpg", names.index(label)))
    return Listing("original", root, lines, class_names=names)


def _cifar(root: Path) -> Listing:
    """cifar-100-python: pickles of uint8 rows, read without running anything in them."""
    lines, images = {}, {}
    for role in ("train", "test"):
        content = _safe_pickle(root / role)
        pixels = np.asarray(content[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        images[role] = _squares(root / role, pixels)
        lines[role] = _numbered(root / role, role, content[b"fine_labels"])
    meta = _safe_pickle(root / "meta")
    names = [name.decode() for name in meta[b"fine_label_names"]]
    return Listing("original", root, lines, images=dict(images), class_names=names)


def _svhn(root: Path) -> Listing:
    """SVHN's cropped digits; the source stores the digit 0 as 10."""
    lines, images = {}, {}
    for role in ("train", "test"):
        file = root / f"{role}_32x32.mat"
        content = _mat(file)
        images[role] = _squares(file, np.moveaxis(content["X"], -1, 0))
        digits = [0 if y == 10 else int(y) for y in np.ravel(content["y"])]
        lines[role] = _numbered(file, role, digits)
    return Listing("original", root, lines, images=dict(images))


def _squares(file: Path, images: np.ndarray) -> np.ndarray:
    """Colour images of 32 pixels in bytes, as the releases have them, in C's order."""
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise UserError(
            f"{file} holds images of {images.dtype} {images.shape[1:]} where the release has uint8 "
            "(32, 32, 3); fetch the original file."
        )
    return np.ascontiguousarray(images)


def _numbered(file: Path, role: str, labels: Any) -> list[Line]:
    return [Line(str(file), f"{role}[{i}]", int(label)) for i, label in enumerate(labels)]


RELEASES = {
    "NABirds and CUB-200-2011": _Release(
        ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"), _birds
    ),
    "Oxford Flowers 102": _Release(("imagelabels.mat", "setid.mat"), _flowers),
    "Stanford Dogs": _Release(("train_list.mat", "test_list.mat"), _dogs),
    "Stanford Dogs (lists/)": _Release(("lists/train_list.mat", "lists/test_list.mat"), _dogs),
    "Stanford Cars": _Release(("devkit/cars_train_annos.mat",), _cars),
    "Stanford Cars (car_ims)": _Release(("cars_annos.mat",), _cars),
    "Food-101": _Release(("meta/train.txt", "meta/test.txt", "meta/classes.txt"), _food),
    "CIFAR-100 (python)": _Release(("train", "test", "meta"), _cifar),
    "SVHN (cropped)": _Release(("train_32x32.mat", "test_32x32.mat"), _svhn),
}


def _mat(file: Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            f"{file}: reading .mat files needs scipy; pip install snella[bench]."
        ) from None
    try:
        with open(file, "rb") as stream:
            content: dict[str, Any] = loadmat(stream)
        return content
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except NotImplementedError as error:  # HDF5
        raise UserError(
            f"{file} is of MATLAB's version 7.3, the release's is not; fetch that one, or save it "
            "anew with `-v7`."
        ) from error
    except Exception as error:
        raise UserError(f"{file} is damaged or no .mat file of version 5 ({error}).") from error


class _NumpyOnly(pickle.Unpickler):
    """An unpickler that builds numpy arrays and plain values, and nothing else."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not read")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _safe_pickle(file: Path) -> dict[bytes, Any]:
    try:
        with open(file, "rb") as stream:
            content = _NumpyOnly(stream, encoding="bytes").load()
    except Exception as error:
        raise UserError(f"{file} is not a file of cifar-100-python ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a file of cifar-100-python.")
    return content
