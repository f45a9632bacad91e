"""The community's VTAB-1k layout: what is read, and one clear line for all that can be wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from snella.data.folder import read_folder
from snella.data.prepared import Prepared
from snella.errors import UserError
from snella.tasks.classification.prepare import write_labelled

COUNTS = {"train800": 6, "val200": 4, "test": 5}


def make_folder(root, *, suffix=".png", size=8, copies=False, classes=3):
    """A tiny data set in the community's layout; `copies` stores the 1000 twice as NOAH does."""
    rng = np.random.default_rng(0)
    lists = {}
    for split, count in COUNTS.items():
        lists[split] = []
        for index in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            path = f"images/{split}/{index:06d}{suffix}"
            save(root / path, pixels)
            lists[split].append(f"{path} {index % classes}")
    union = lists["train800"] + lists["val200"]
    if copies:
        for number, line in enumerate(union):
            path, label = line.split()
            copy = f"images/train800val200/{number:06d}{suffix}"
            (root / copy).parent.mkdir(exist_ok=True)
            (root / copy).write_bytes((root / path).read_bytes())
            union[number] = f"{copy} {label}"
    for split, lines in (lists | {"train800val200": union}).items():
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def edit(root, split, number, line):
    """Replace line `number` (from 1) of a list; None removes it."""
    path = root / f"{split}.txt"
    lines = path.read_text().splitlines()
    lines[number - 1 : number] = [] if line is None else [line]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / "birds")


def test_small_images_come_back_as_arrays(root):
    splits, info = read_folder(root, "birds")
    images, labels = splits["val"]
    assert images.shape == (4, 8, 8, 3)
    assert labels.tolist() == [0, 1, 2, 0]
    assert np.array_equal(images[3], np.array(Image.open(root / "images/val200/000003.png")))
    assert (info["num_classes"], info["jpeg"], info["class_names"]) == (3, False, None)


@pytest.mark.parametrize("copies", [False, True])
def test_from_folder_to_prepared(tmp_path, copies):
    root = make_folder(tmp_path / "raw", suffix=".jpg", size=70, copies=copies)
    splits, info = read_folder(root, "birds")
    write_labelled(tmp_path / "birds", splits, info)
    data = Prepared.open(tmp_path / "birds")
    assert data.manifest["columns"]["image"] == "encoded"
    assert data.jpeg
    expected = np.array(Image.open(root / "images/train800/000002.jpg"))
    assert np.array_equal(data.image("trainval", 2), expected)
    assert Prepared.open(tmp_path / "birds").targets("test", "label").tolist() == [0, 1, 2, 0, 1]
    assert data.manifest["files"]["test_image.bin"] == sum(
        p.stat().st_size for p in (root / "images/test").iterdir()
    )


def test_images_of_different_sizes_keep_their_files(root):
    save(root / "images/test/000001.png", np.zeros((8, 9, 3), np.uint8))
    splits, _ = read_folder(root, "birds")
    assert splits["test"][0][1] == (root / "images/test/000001.png").read_bytes()


def test_grey_and_palette_images_become_rgb(root):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    grey.save(root / "images/test/000000.png")
    grey.convert("P").save(root / "images/test/000001.png")
    images, _ = read_folder(root, "birds")[0]["test"]
    assert np.array_equal(images[0], np.repeat(np.array(grey)[:, :, None], 3, axis=2))
    assert np.array_equal(images[1], images[0])


def test_class_names_and_unusual_lines(root):
    (root / "classes.txt").write_text("jay\nsnow bunting\nwren\nfinch\n")
    (root / "images/test/000000.png").rename(root / "images/test/a jay 2.png")
    edit(root, "test", 1, "./images/test/a jay 2.png   0\r\n")
    splits, info = read_folder(root, "birds")
    assert info["class_names"] == ["jay", "snow bunting", "wren", "finch"]
    assert info["num_classes"] == 4
    assert len(splits["test"][0]) == 5


def refuse(root, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        read_folder(root, "birds", **options)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_list(root):
    refuse(root / "nowhere", r"'birds': there is no folder .*nowhere")
    (root / "test.txt").unlink()
    refuse(root, r"test\.txt is missing: a data folder needs train800\.txt")


@pytest.mark.parametrize("line", ["images/test/000001.png", "7", "images/test/000001.png 1.0"])
def test_malformed_line(root, line):
    edit(root, "test", 2, line)
    refuse(root, rf"test\.txt:2: '{line}' is not a line `path label`")


def test_binary_list(root):
    (root / "test.txt").write_bytes(b"\xff\xfe\x00")
    refuse(root, r"test\.txt is not a text file")


@pytest.mark.parametrize("path", ["../x.png", "images/../../x.png", "/etc/x.png"])
def test_path_outside_the_folder(root, path):
    edit(root, "test", 2, f"{path} 1")
    refuse(root, r"test\.txt:2: path .* leaves the folder")


def test_empty_split(root):
    (root / "val200.txt").write_text("\n\n")
    refuse(root, r"val200\.txt is empty")


def test_missing_images(root):
    (root / "images/val200/000001.png").unlink()
    (root / "images/test/000001.png").unlink()
    refuse(root, r"val200\.txt:2: image .*val200/000001\.png is missing, and 1 more")


def test_truncated_image(root):
    path = root / "images/test/000003.png"
    path.write_bytes(path.read_bytes()[:-30])
    refuse(root, r"test\.txt:4: image .*000003\.png cannot be decoded")


def test_truncated_jpeg(tmp_path):
    root = make_folder(tmp_path, suffix=".jpg", size=40)
    path = root / "images/train800/000003.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    refuse(root, r"train800\.txt:4: image .*000003\.jpg cannot be decoded")


def test_damaged_pixels(root):
    path = root / "images/test/000003.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    refuse(root, r"test\.txt:4: image .* cannot be decoded")


def test_not_an_image_and_too_deep(root):
    path = root / "images/test/000002.png"
    path.write_text("<html>")
    refuse(root, r"test\.txt:3: image .* cannot be decoded")
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(path)
    refuse(root, "more than 8 bits")


@pytest.mark.parametrize(
    ("label", "num_classes", "match"),
    [(-1, None, r"test\.txt:2: label -1 is out of range"), (3, 3, "label 3 .*range, 0 to 2")],
)
def test_label_out_of_range(root, label, num_classes, match):
    edit(root, "test", 2, f"images/test/000001.png {label}")
    refuse(root, match, num_classes=num_classes)


def test_class_names_that_contradict(root):
    (root / "classes.txt").write_text("jay\nwren\n")
    refuse(root, "label 2 is out of range, 0 to 1")
    refuse(root, "names 2 classes, the config says 3", num_classes=3)


def test_image_in_training_and_test(root):
    edit(root, "test", 3, "images/train800/000001.png 1")
    refuse(root, r"test\.txt:3: images/train800/000001\.png is also in .*train800\.txt:2")


def test_image_twice_in_a_list(root):
    edit(root, "test", 3, "images//test/000001.png 1")
    refuse(root, r"test\.txt:3: .* is also in .*test\.txt:2")


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(
    ("number", "change", "match"),
    [
        (2, "label", r"train800val200\.txt:2: .* with label 9 is not in train800\.txt or val200"),
        (7, "drop", r"val200\.txt:1: .* with label 0 is not in train800val200\.txt"),
    ],
)
def test_union_must_be_the_two_lists(tmp_path, copies, number, change, match):
    root = make_folder(tmp_path, copies=copies)
    line = (root / "train800val200.txt").read_text().splitlines()[number - 1]
    edit(root, "train800val200", number, None if change == "drop" else line.split()[0] + " 9")
    refuse(root, match)
