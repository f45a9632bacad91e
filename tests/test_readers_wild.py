"""Copies of data sets as they lie on real disks: what systems add, what a download loses."""

from __future__ import annotations

import itertools
import pickle
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import formats
import formats_vtab
import numpy as np
import pytest

from snella.data.check import check
from snella.data.images import decode
from snella.data.readers import read_images
from snella.errors import UserError


def classes(root: Path) -> Path:
    for i, place in enumerate(("train/ant/0", "train/bee/0", "test/ant/0", "test/bee/0")):
        formats.save(root / f"{place}.jpg", formats.pixels(i))
    return root


def community(root: Path) -> Path:
    return formats.community(root, {"train800": [0, 1], "val200": [0, 1], "test": [0, 1]})


def tfds(root: Path) -> Path:
    rows = [{"image": formats.encoded(formats.pixels(i)), "label": [i % 2]} for i in range(20)]
    return formats.tfds(root, "cifar100", "3.0.2", {"train": rows, "test": rows[:4]})


def resisc45(root: Path) -> Path:
    formats_vtab.resisc45(root)
    return root


def retinopathy(root: Path) -> Path:
    pytest.importorskip("cv2")
    formats_vtab.retinopathy(root)
    return root


OPTIONS = {
    tfds: {"official": "vtab1k/cifar100", "subset": [8, 2]},
    resisc45: {"official": "vtab1k/resisc45", "layout": "tfds", "subset": [4, 2]},
    retinopathy: {"official": "vtab1k/retinopathy", "layout": "tfds", "subset": [4, 2]},
}


def contents(root: Path, make) -> dict:
    splits, _ = read_images(root, "x", options=OPTIONS.get(make))
    return {
        role: (part["label"].tolist(), [
            (x if isinstance(x, np.ndarray) else decode(x)).tobytes() for x in part["image"]
        ])
        for role, part in splits.items()
    }  # fmt: skip


def left_by_systems(root: Path) -> None:
    """macOS' and Windows' files, thumbnails of a NAS, an archive's second tree, beside all files.

    A folder like that, taken for a class, shifts every label behind it.
    """
    for folder in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        for name in (".DS_Store", "._0.jpg", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"\0\5\x16\7")
        for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
            formats.save(folder / name / "0.jpg", formats.pixels(77))


def links(root: Path) -> None:
    """Files are links into a store, as in the Hugging Face cache."""
    store = root.parent / "store"
    store.mkdir()
    for number, path in enumerate([p for p in root.rglob("*") if p.is_file()]):
        shutil.move(path, store / str(number))
        path.symlink_to(store / str(number))


def linked_folders(root: Path) -> None:
    for number, path in enumerate([p for p in root.iterdir() if p.is_dir()]):
        shutil.move(path, root.parent / f"store{number}")
        path.symlink_to(root.parent / f"store{number}")


def blanks(root: Path) -> None:
    for path in [*root.rglob("*.txt"), *root.rglob("*.csv")]:
        text = path.read_bytes().replace(b"\n", b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + text + b"  \r\n\r\n")


MAKERS = (
    community, classes, tfds, resisc45, formats.cub, formats.flowers, formats.dogs,
    formats.cars, formats.food, formats.cifar, formats.svhn,
)  # fmt: skip


CHANGES = (left_by_systems, links, linked_folders, blanks)


@pytest.mark.parametrize(
    ("make", "change"), [*itertools.product(MAKERS, CHANGES), (retinopathy, blanks)]
)
def test_what_systems_do_to_a_folder_changes_no_label_and_no_pixel(tmp_path, make, change):
    root = make(tmp_path / "x")
    expected = contents(root, make)
    change(root)
    assert contents(root, make) == expected


def replace(name: str, old: str, new: str):
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return change


def matrix(name: str, key: str, edit):
    def change(root: Path) -> None:
        from scipy.io import loadmat, savemat

        content = {k: v for k, v in loadmat(root / name).items() if k[0] != "_"}
        savemat(root / name, {**content, key: edit(content[key])})

    return change


def hdf5(root: Path) -> None:
    """MATLAB's version 7.3: HDF5 behind a header of its own."""
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM"
    (root / "imagelabels.mat").write_bytes(header.ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n" * 9)


def batch(key: bytes, edit):
    def change(root: Path) -> None:
        content = pickle.loads((root / "train").read_bytes())
        (root / "train").write_bytes(pickle.dumps({**content, key: edit(content[key])}, 2))

    return change


def deeper(name: str):
    def change(root: Path) -> None:
        shutil.move(root / name, root / "moving")
        (root / name).mkdir()
        shutil.move(root / "moving", root / name / name)

    return change


def accents(root: Path) -> None:
    """A list of one form of an accent, names on the disk of the other."""
    for path in (root / "images" / "test").iterdir():
        path.rename(path.with_name(unicodedata.normalize("NFD", "é") + path.name))
    replace("test.txt", "test/0", unicodedata.normalize("NFC", "test/é0"))(root)


def first_shard(edit):
    def change(root: Path) -> None:
        edit(root / "cifar100-train.tfrecord-00000-of-00010")

    return change


def of_another_copy(shard: Path) -> None:
    shutil.copy(shard, shard.with_name("cifar100-train.tfrecord-00000-of-00012"))


def wrapped(root: Path) -> None:
    inner = root / "NWPU-RESISC45"
    inner.mkdir()
    for path in [p for p in root.iterdir() if p != inner]:
        shutil.move(path, inner)


def cut_eye(root: Path) -> None:
    for path in root.rglob("*.jpeg"):
        path.write_bytes(path.read_bytes()[:-20])


REFUSED = {
    "dangling link": (
        classes, lambda r: (r / "train/ant/9.jpg").symlink_to("nowhere"), "leads nowhere",
    ),
    "link to a folder": (
        classes, lambda r: (r / "train/ant/more").symlink_to(r / "test"), "more is a link to a",
    ),
    "accents": (community, accents, "there is images/test/.*000000.jpg: correct"),
    "nested images": (formats.cars, deeper("cars_train"), "one folder deeper, in .*cars_train"),
    "id twice": (formats.cub, replace("images.txt", "\n2 ", "\n1 "), r"images.txt:2: 1 .* twice"),
    "two classes": (
        formats.cub, replace("image_class_labels.txt", "8 2", "8 2\n8 1"), ":9: 8 stands .* twice",
    ),
    "split 2": (formats.cub, replace("train_test_split.txt", "8 0", "8 2"), "no split of 0 or 1"),
    "no test": (
        formats.flowers, matrix("setid.mat", "tstid", lambda v: v[:, :0]), "has no test images",
    ),
    "from 0": (
        formats.flowers, matrix("imagelabels.mat", "labels", lambda v: v - 1), "classes from 1",
    ),
    "version 7.3": (formats.flowers, hdf5, "version 7.3.*-v7"),
    "a label too few": (
        formats.cifar, batch(b"fine_labels", lambda v: v[:-1]), "6 images and 5 labels",
    ),
    "pixels as fractions": (formats.cifar, batch(b"data", lambda v: v / 255), "float64.*uint8"),
    "grey digits": (
        formats.svhn, matrix("train_32x32.mat", "X", lambda v: v[:, :, 0]), r"\(32, 32\) where",
    ),
    "empty shard": (tfds, first_shard(lambda p: p.write_bytes(b"")), "00000-of-00010 is empty"),
    "two copies": (tfds, first_shard(of_another_copy), "11 of 10 .* remove those"),
    "folder around": (resisc45, wrapped, "nothing but NWPU-RESISC45; set `path: .*NWPU-RESISC45`"),
    "empty class": (resisc45, lambda r: (r / "zoo").mkdir(), "zoo holds no images"),
    "cut eyes": (retinopathy, cut_eye, "left.jpeg cannot be read: .*; unpack it again"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_download_loses_is_one_line(tmp_path, case):
    make, change, words = REFUSED[case]
    root = make(tmp_path / "x")
    change(root)
    with pytest.raises(UserError, match=words):
        read_images(root, "x", options=OPTIONS.get(make))
    entry = SimpleNamespace(path=str(root), num_classes=None, options=OPTIONS.get(make, {}))
    assert check("x", entry)[-1].level == "error"


def test_class_folders_beside_one_called_meta_are_no_cifar(tmp_path):
    (classes(tmp_path) / "meta").mkdir()
    assert read_images(tmp_path, "x")[1]["layout"] == "classes"
