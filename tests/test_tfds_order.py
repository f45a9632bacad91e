"""VTAB-1k from original archives against TFDS's own writer.

`golden/tfds_order.json` was recorded once with tensorflow-datasets 4.9.9: its builders, fed with
the archives of `formats_vtab.py`, wrote records, whose keys and labels it holds in order. The
pixels of those records and of the archives were equal too.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path

import formats
import formats_vtab
import numpy as np
import pytest

from snella.data.images import decode
from snella.data.readers import read_images
from snella.data.readers.tfds import RECIPES
from snella.data.readers.tfds_order import SOURCES, UNREAD, tfds_order
from snella.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tfds_order.json").read_text())
PIXELS = Path(__file__).parent / "golden" / "tfds_pixels"
NEEDS = dict.fromkeys(("patch_camelyon", "dsprites_loc", "dsprites_ori"), "h5py")
NEEDS |= dict.fromkeys(("sun397", "retinopathy"), "cv2")


def make(root: Path, name: str) -> Path:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    formats_vtab.MAKERS[name](root)
    return root


def options(name: str) -> dict:
    return {"official": f"vtab1k/{name}", "layout": "tfds", "subset": [8, 2]}


def key(name: str) -> str | int:
    """A file's name, or a position: of "train[3]", and of TFDS's "train_00003"."""
    found = re.fullmatch(r"\w+\[(\d+)\]|(?:train_|test_)?(\d+)|(?:train|valid|test)_(\d+)", name)
    return int(next(filter(None, found.groups()))) if found else Path(name).name


def test_the_order_is_that_of_5000_real_records():
    """CIFAR-10's ids in train[:5000], as datarax's tests hold them, which read TFDS's files."""
    order = tfds_order("train", range(50_000))[:5000]
    ids = b"\n".join(f"train_{i:05d}".encode() for i in order)
    known = "826f1dad26a11a20249e95c71c6f1532d857fb35e648694f9758d4c5c1747679"
    assert hashlib.sha256(ids).hexdigest() == known


def test_every_task_has_a_source_or_a_reason():
    assert SOURCES.keys() == GOLDEN.keys()
    assert {*SOURCES, *UNREAD} == set(RECIPES)


@pytest.mark.parametrize("name", list(SOURCES))
def test_archives_in_the_order_that_tfds_wrote(tmp_path, name):
    found = SOURCES[name](make(tmp_path / "raw", name))
    assert found.keys() == GOLDEN[name].keys()
    for split, examples in found.items():
        labels = [RECIPES[name].label(examples.features(i)) for i in range(len(examples.names))]
        have = [[key(n), label] for n, label in zip(examples.names, labels, strict=True)]
        assert have == [[key(n), label] for n, label in GOLDEN[name][split]]


@pytest.mark.parametrize(
    "name, number",
    [("cifar100", 28), ("patch_camelyon", 7), ("dmlab", 9), ("dsprites_loc", 28),
     ("smallnorb_azi", 28), ("pets", 3)],
)  # fmt: skip
def test_images_go_with_their_keys(tmp_path, name, number):
    """The first training image of the golden order, by its number in the archive."""
    splits, _ = read_images(make(tmp_path / "raw", name), name, options=options(name))
    assert [len(splits[role]["label"]) for role in ("train", "val")] == [8, 2]
    image = splits["train"]["image"][0]
    image = image if isinstance(image, np.ndarray) else decode(image)
    sizes = {"patch_camelyon": (96, 96), "dmlab": (360, 480), "pets": (16, 20)}
    expected = formats.pixels(number, sizes.get(name, (32, 32)))
    if name == "dsprites_loc":
        expected = np.repeat(255 * (formats.pixels(number, (64, 64), 1) % 2)[..., None], 3, -1)
    if name == "smallnorb_azi":
        expected = np.repeat(formats.pixels(2 * number, (96, 96), 1)[..., None], 3, -1)
    if name == "dmlab":
        expected = decode(formats.encoded(expected // 8, "JPEG"))
    if name == "pets":
        expected = decode(formats.encoded(expected, "JPEG", quality=95))
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("name", ["sun397", "retinopathy"])
def test_images_that_tfds_changes_are_those_that_it_wrote(tmp_path, name):
    """To a grey level or two: with the OpenCV of the recording, 5.0.0, the bytes are the same."""
    splits, info = read_images(make(tmp_path / "raw", name), name, options=options(name))
    assert [len(splits[role]["label"]) for role in ("train", "val", "test")] == [8, 2, 15]
    assert info["jpeg"]
    train = SOURCES[name](tmp_path / "raw")["train"]
    first = next(i for i, path in enumerate(train.names) if re.search(r"/(sun_00)?0+[_.]", path))
    assert train.images is not None
    made, known = decode(train.images([first])[0]), decode((PIXELS / f"{name}.jpg").read_bytes())
    assert np.abs(made.astype(int) - known).max() <= 2


@pytest.mark.parametrize(
    "content, problem",
    [(b"<html>", "decoded: it is a web page"), (b"", "decoded: the file is empty"),
     (b"text", "read: no image in a format"), (None, "read: No such file")],
)  # fmt: skip
def test_an_eye_that_is_no_image_is_named(tmp_path, content, problem):
    root = make(tmp_path / "raw", "retinopathy")
    for file in (root / "train").iterdir():
        file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=rf"train/\d+_(left|right).jpeg cannot be {problem}"):
        read_images(root, "retinopathy", options=options("retinopathy"))


def test_both_archives_of_cifar_give_the_same_subset(tmp_path):
    binary = make(tmp_path / "binary", "cifar100")
    python = tmp_path / "python"
    python.mkdir()
    for part in ("train", "test"):
        table = np.fromfile(binary / f"{part}.bin", np.uint8).reshape(-1, 3074)
        content = {b"data": table[:, 2:], b"fine_labels": table[:, 1].tolist()}
        (python / part).write_bytes(pickle.dumps(content, protocol=2))
    meta = {b"fine_label_names": [f"f{i}".encode() for i in range(100)]}
    (python / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    found = [read_images(root, "cifar100", options=options("cifar100"))[0]
             for root in (binary, python)]  # fmt: skip
    for role in ("train", "val", "test"):
        for column in ("image", "label"):
            assert np.array_equal(*(splits[role][column] for splits in found))


def test_a_release_found_by_its_files_gives_the_subset_too(tmp_path):
    root = make(tmp_path / "raw", "flowers102")
    chosen = {"official": "vtab1k/flowers102"}
    with pytest.raises(UserError, match="holds 30 images where 800 are needed"):
        read_images(root, "flowers102", options=chosen)
    splits, _ = read_images(root, "flowers102")
    assert len(splits["train"]["label"]) == 30


@pytest.mark.parametrize("name", list(UNREAD))
def test_sets_that_no_archive_gives(tmp_path, name):
    with pytest.raises(UserError, match=r"original archive cannot take their place: TFDS .*docs"):
        read_images(tmp_path, name, options=options(name))


@pytest.mark.parametrize("name", list(SOURCES))
def test_incomplete_archives_are_named(tmp_path, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    with pytest.raises(UserError, match=r"missing|lacks|has no class folders"):
        read_images(tmp_path, name, options=options(name))


@pytest.mark.parametrize(
    "name, pattern, problem",
    [
        ("cifar100", "train.bin", "damaged or of another release"),
        ("smallnorb_azi", "*training-dat.mat", "damaged or of another release"),
        ("patch_camelyon", "*train_x.h5", "damaged or no HDF5 file"),
        ("kitti_dist", "mapping/train_rand.txt", "damaged or of another release"),
        ("clevr_count", "scenes/CLEVR_train_scenes.json", "damaged or of another release"),
        ("svhn", "train_32x32.mat", "damaged or no .mat file"),
    ],
)
def test_damaged_archives_are_named(tmp_path, name, pattern, problem):
    root = make(tmp_path / "raw", name)
    file = next(root.glob(pattern))
    file.write_bytes(file.read_bytes()[:-3] if pattern != "mapping/train_rand.txt" else b"<html>")
    with pytest.raises(UserError, match=problem):
        read_images(root, name, options=options(name))


def test_scenes_and_images_must_be_as_many(tmp_path):
    root = make(tmp_path / "raw", "clevr_count")
    next((root / "images" / "train").iterdir()).unlink()
    with pytest.raises(UserError, match=r"29 images, CLEVR_train_scenes.json 30 scenes"):
        read_images(root, "clevr_count", options=options("clevr_count"))
