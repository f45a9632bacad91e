"""Raw data in the layouts of the community, VPT, class folders, original releases and TFDS."""

from __future__ import annotations

import json
import pickle

import formats
import numpy as np
import pytest
import torch
from PIL import Image

from snella.data.images import decode
from snella.data.official import differences
from snella.data.readers import read_images
from snella.data.readers.records import Records, parse_example
from snella.errors import UserError

LABELS = {"train800": [0, 1, 2, 0, 1, 2], "val200": [0, 1, 2], "test": [0, 1, 2, 0]}


def counts(splits):
    return {role: len(part["label"]) for role, part in splits.items()}


def first(splits, role="train"):
    image = splits[role]["image"][0]
    return image if isinstance(image, np.ndarray) else decode(image)


def refuse(match, root, **options):
    with pytest.raises(UserError, match=match) as caught:
        read_images(root, "birds", **options)
    assert "\n" not in str(caught.value)


def test_community_folder(tmp_path):
    splits, info = read_images(formats.community(tmp_path / "x", LABELS), "birds")
    assert counts(splits) == {"train": 6, "val": 3, "test": 4}
    assert (info["layout"], info["jpeg"], info["warnings"]) == ("vtab", True, [])


def test_copies_for_the_final_training_only(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    (root / "val200.txt").unlink()
    splits, info = read_images(root, "birds")
    assert counts(splits) == {"train": 6, "val": 3, "test": 4}
    assert not info["only_trainval"]
    assert "the 3 images" in info["warnings"][0]
    (root / "train800.txt").unlink()
    splits, info = read_images(root, "birds")
    assert counts(splits) == {"train": 9, "test": 4}
    assert info["only_trainval"]
    assert "train_split: trainval" in info["warnings"][0]


def relabel(root, change):
    for file in root.glob("*.txt"):
        lines = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
        file.write_text("".join(f"{path} {change(int(label))}\n" for path, label in lines))


def test_labels_from_one(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    relabel(root, lambda label: label + 1)
    _, info = read_images(root, "birds")
    assert info["num_classes"] == 4
    assert "class 0 never occurs" in info["warnings"][0]
    refuse("labels start at 0.*first_label: 1", root, num_classes=3)
    splits, info = read_images(root, "birds", num_classes=3, options={"first_label": 1})
    assert info["warnings"] == []
    assert splits["train"]["label"].tolist() == LABELS["train800"]


def test_empty_classes_and_classes_of_one_split(tmp_path):
    labels = {"train800": [0, 1, 7], "val200": [0, 3], "test": [0, 1, 5]}
    _, info = read_images(formats.community(tmp_path / "x", labels), "birds")
    assert info["warnings"] == [
        "classes 2, 4, 6 never occur",
        "class 5 occurs in test only and cannot be learned",
        "classes 3, 7 never occur in test",
        "class 3 occurs in val but not in train",
    ]


@pytest.mark.parametrize("label", [1_000_000_000, 10**20])
def test_absurd_labels_are_refused_at_once(tmp_path, label):
    root = formats.community(tmp_path / "x", LABELS)
    text = (root / "test.txt").read_text()
    (root / "test.txt").write_text(text.replace("000001.jpg 1", f"000001.jpg {label}"))
    refuse(r"test\.txt:2: label 1000+ would make .* classes", root)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>no</html>", "a web page, not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x00\x01\x02 nothing", "no image in a format that is read"),
    ],
)
def test_files_that_are_no_images(tmp_path, content, match):
    root = formats.community(tmp_path / "x", LABELS)
    (root / "images/test/000001.jpg").write_bytes(content)
    refuse(rf"test\.txt:2: image images/test/000001\.jpg cannot be decoded: .*{match}", root)


def deep_png(tmp_path, channels):
    import struct
    import zlib

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    colour = {1: 0, 3: 2}[channels]
    row = b"\x00" + b"\x12\x34" * 4 * channels
    header = struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_refused_in_grey_and_colour(tmp_path, channels):
    root = formats.community(tmp_path / "x", LABELS)
    (root / "images/test/000001.jpg").write_bytes(deep_png(tmp_path, channels))
    refuse(r"pixels of more than 8 bits \(16\)", root)


def test_windows_lists(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    text = (root / "test.txt").read_text()
    (root / "test.txt").write_text(text.replace("/", "\\").replace("\n", "\t\r\n"))
    _, info = read_images(root, "birds")
    assert "backslashes" in info["warnings"][0]


def test_lists_that_are_folders_and_data_that_is_a_file(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    (root / "test.txt").unlink()
    (root / "test.txt").mkdir()
    refuse(r"test\.txt is a folder", root)
    (tmp_path / "file").write_text("")
    refuse("is a file, not a folder", tmp_path / "file")


def test_duplicates_by_content(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    images = root / "images"
    (images / "test/000000.jpg").write_bytes((images / "train800/000000.jpg").read_bytes())
    (images / "test/000003.jpg").write_bytes((images / "test/000002.jpg").read_bytes())
    _, info = read_images(root, "birds")
    assert info["warnings"] == [
        "1 test image is also a training image "
        "(e.g. images/test/000000.jpg = images/train800/000000.jpg)",
        "1 image occurs with different labels "
        "(e.g. images/test/000002.jpg and images/test/000003.jpg: 0, 2)",
        "1 image repeats another of the same split",
    ]


def test_images_of_one_colour_repeat_only_those_of_their_size(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    grey = np.full((20, 24, 3), 128, np.uint8)
    formats.save(root / "images/test/000000.jpg", grey)
    formats.save(root / "images/test/000003.jpg", grey.reshape(24, 20, 3))
    assert read_images(root, "birds")[1]["warnings"] == []


def test_counts_against_the_official_ones(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    _, info = read_images(root, "svhn", 10, {"official": "vtab1k/svhn"})
    assert "9 training images, SVHN of VTAB-1k has 1,000" in info["warnings"]
    assert "4 test images, SVHN of VTAB-1k has 26,032" in info["warnings"]
    refuse("Did you mean 'vtab1k/svhn'", root, options={"official": "vtab1k/svnh"})
    refuse("Did you mean 'official'", root, options={"offical": "vtab1k/svhn"})


def test_pixel_variants(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    _, info = read_images(root, "birds", options={"variant": "lossless"})
    assert "are the community-jpeg variant, not lossless" in info["warnings"][0]
    assert "JPEG quality 75, 4:2:0 in 100%" in info["warnings"][0]
    formats.save(root / "images/test/000000.jpg", formats.pixels(90), quality=92, subsampling=0)
    _, info = read_images(root, "birds", options={"variant": "community-jpeg"})
    assert "are the original variant" in info["warnings"][0]


@pytest.mark.parametrize("images", ["images", "Images", "."])
def test_vpt_lists(tmp_path, images):
    splits, info = read_images(formats.vpt(tmp_path / "x", images), "birds")
    assert counts(splits) == {"train": 4, "val": 2, "test": 4}
    assert splits["train"]["label"].tolist() == [0, 1, 0, 1]
    assert info["warnings"] == ["class ids 1 to 2 were renumbered to 0 to 1, as VPT does"]


def test_vpt_lists_that_are_wrong(tmp_path):
    root = formats.vpt(tmp_path / "x", "images")
    (root / "test.json").write_text(json.dumps({"001.Bird/b_test_0.jpg": 1}))
    assert "test.json lacks 1 of the classes" in read_images(root, "birds")[1]["warnings"][1]
    (root / "test.json").write_text(json.dumps({"../x.jpg": 1}))
    refuse("leaves the data set", root)
    (root / "test.json").write_text(json.dumps({"x.jpg": "cat"}))
    refuse("class id of .x.jpg.: .cat. is not a whole number", root)
    (root / "test.json").write_text("[1, 2]")
    refuse("one object of image path to class id", root)
    (root / "test.json").write_text("{")
    refuse("not valid JSON", root)
    (root / "test.json").write_text('{"a.jpg": 1, "b.jpg": 2, "a.jpg": 2}')
    refuse("'a.jpg' occurs twice", root)


def class_folders(root, folders=("train", "val", "test")):
    for number, split in enumerate(folders):
        for offset, name in enumerate(("cat", "dog")):
            formats.save(root / split / name / "0.jpg", formats.pixels(2 * number + offset))
    return root


def test_class_folders(tmp_path):
    splits, info = read_images(class_folders(tmp_path / "x"), "pets")
    assert counts(splits) == {"train": 2, "val": 2, "test": 2}
    assert info["class_names"] == ["cat", "dog"]
    root = class_folders(tmp_path / "y", ("train", "val"))
    refuse(r"no folder of test images.*test: val", root)
    refuse(
        r"no folder of train images, train/<class>/ \(it has cat, dog\)",
        root / "train",
        options={"layout": "classes"},
    )
    (root / "val/cat/1.jpg").symlink_to("gone.jpg")
    refuse("a link that leads nowhere", root, options={"test": "val"})
    (root / "val/cat/1.jpg").unlink()
    splits, _ = read_images(root, "pets", options={"test": "val"})
    assert counts(splits) == {"train": 2, "test": 2}
    formats.save(root / "val/emu/0.jpg", formats.pixels(9))
    refuse("has classes that .*train lacks: emu", root, options={"test": "val"})


def test_nested_folders_and_archives_are_named(tmp_path):
    formats.community(tmp_path / "x" / "cifar", LABELS)
    refuse(r"set `path: .*x/cifar`", tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "data.zip").write_bytes(b"")
    refuse(r"holds an archive \(data\.zip\); unpack", tmp_path / "y")
    (tmp_path / "z").mkdir()
    refuse("in no known layout", tmp_path / "z")
    root = class_folders(tmp_path / "flat", ("train",)) / "train"
    refuse(r"holds images \(cat, dog\), but neither .* below train/ and test/", root)


@pytest.mark.parametrize(
    ("make", "expected", "labels"),
    [
        (formats.cub, {"train": 5, "test": 3}, [0, 1, 0, 1, 0]),
        (lambda root: formats.cub(root, nabirds=True), {"train": 5, "test": 3}, [0, 1, 0, 1, 0]),
        (formats.flowers, {"train": 2, "val": 2, "test": 4}, [0, 1]),
        (formats.dogs, {"train": 4, "test": 4}, [0, 1, 0, 1]),
        (formats.cars, {"train": 4, "test": 4}, [0, 1, 0, 1]),
        (lambda root: formats.cars(root, single=True), {"train": 4, "test": 4}, [0, 1, 0, 1]),
        (formats.food, {"train": 4, "test": 4}, [0, 1, 0, 1]),
        (formats.cifar, {"train": 6, "test": 6}, [0, 1, 2, 0, 1, 2]),
        (formats.svhn, {"train": 10, "test": 10}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]),
    ],
)
def test_original_releases(tmp_path, make, expected, labels):
    splits, info = read_images(make(tmp_path / "x"), "set")
    assert info["layout"] == "original"
    assert counts(splits) == expected
    assert splits["train"]["label"].tolist() == labels
    assert info["warnings"] == []
    assert first(splits).shape[2] == 3


def test_original_arrays_are_the_pixels(tmp_path):
    splits, _ = read_images(formats.cifar(tmp_path / "c"), "c")
    assert np.array_equal(splits["test"]["image"][0], formats.pixels(6, (32, 32)))
    splits, _ = read_images(formats.svhn(tmp_path / "s"), "s")
    assert np.array_equal(splits["test"]["image"][1], formats.pixels(11, (32, 32)))


def test_pickles_run_nothing(tmp_path):
    root = formats.cifar(tmp_path / "c")

    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    (root / "train").write_bytes(pickle.dumps({b"data": Evil()}))
    refuse("not a file of cifar-100-python", root)


def test_a_share_can_be_set_aside(tmp_path):
    root = formats.cub(tmp_path / "x")
    splits, info = read_images(root, "cub", options={"val_share": 0.4})
    assert counts(splits) == {"train": 3, "val": 2, "test": 3}
    assert "2 training images were set aside" in info["warnings"][0]
    assert "only its json files say" in info["warnings"][0]
    again, _ = read_images(root, "cub", options={"val_share": 0.4})
    assert np.array_equal(again["val"]["image"], splits["val"]["image"])
    other, _ = read_images(root, "cub", options={"val_share": 0.4, "split_seed": 1})
    assert not np.array_equal(other["val"]["image"], splits["val"]["image"])


def test_a_share_of_images_without_files_is_set_aside(tmp_path):
    """Arrays and records have no files, and were left whole without a word."""
    root = formats.tfds(tmp_path, "svhn", "3.1.0", {"train": labelled(10), "test": labelled(2)})
    records = {"official": "full_image/svhn", "layout": "tfds"}
    for folder, options, images in (
        (formats.cifar(tmp_path / "c"), {}, [formats.pixels(i, (32, 32)) for i in range(6)]),
        (root, records, [formats.pixels(i) for i in range(10)]),
    ):
        splits, _ = read_images(folder, "set", options={**options, "val_share": 0.5})
        whole, _ = read_images(folder, "set", options=options)
        labels = whole["train"]["label"].tolist()
        found = []
        for role in ("train", "val"):
            assert len(splits[role]["image"]) == len(images) // 2
            for image, label in zip(splits[role]["image"], splits[role]["label"], strict=True):
                pixels = image if isinstance(image, np.ndarray) else decode(image)
                place = next(i for i, x in enumerate(images) if np.array_equal(x, pixels))
                assert labels[place] == label
                found.append(place)
        assert sorted(found) == list(range(len(images)))


def test_fine_grained_sets_without_validation_images_are_told():
    counted = {"train": 5994, "test": 5794}
    assert "`train` is the whole training set" in differences("fgvc/cub", counted, 200)[0]
    assert differences("fgvc/cub", {"train": 5394, "val": 600, "test": 5794}, 200) == []


def labelled(count, **extra):
    return [
        {"image": formats.encoded(formats.pixels(i)), "label": [i % 3], **extra}
        for i in range(count)
    ]


def test_tfds_subsets_are_positions(tmp_path):
    root = formats.tfds(tmp_path, "cifar100", "3.0.2", {"train": labelled(20), "test": labelled(5)})
    options = {"official": "vtab1k/cifar100", "subset": [4, 2]}
    splits, info = read_images(root.parent, "cifar", 100, options)
    assert counts(splits) == {"train": 4, "val": 2, "test": 5}
    assert np.array_equal(decode(splits["val"]["image"][0]), formats.pixels(18))
    assert splits["val"]["label"].tolist() == [0, 1]
    assert "TFDS cifar100 version 3.0.2" in info["warnings"]
    refuse("where 800 are needed", root, options={"official": "vtab1k/cifar100"})
    refuse("options: {official:", root)
    full, _ = read_images(root, "cifar", options={"official": "full_image/cifar100"})
    assert counts(full) == {"train": 20, "test": 5}


def test_tfds_files_that_are_incomplete(tmp_path):
    root = formats.tfds(tmp_path, "cifar100", "3.0.2", {"train": labelled(20), "test": labelled(5)})
    options = {"official": "vtab1k/cifar100", "subset": [4, 2]}
    shard = sorted(root.glob("*train*"))[3]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    refuse("is cut short after 1 records", root, options=options)
    shard.write_bytes(b"\0" * len(whole))
    refuse("damaged at record 0", root, options=options)
    shard.unlink()
    refuse("9 of 10 shards of split train", root, options=options)


COMPUTED = {
    "clevr_count": ("clevr", {"objects/size": [1] * 5}, 2),
    "clevr_dist": ("clevr", {"objects/pixel_coords": [0.0, 0.0, 9.2, 1.0, 1.0, 8.5]}, 1),
    "kitti_dist": (
        "kitti",
        {"objects/type": [4, 2, 0], "objects/location": [0.0, 0, 3, 0, 0, 21.0, 0, 0, 20.5]},
        2,
    ),
    "smallnorb_azi": ("smallnorb", {"label_azimuth": [7], "label_elevation": [3]}, 7),
    "smallnorb_ele": ("smallnorb", {"label_azimuth": [7], "label_elevation": [3]}, 3),
    "dsprites_loc": ("dsprites", {"label_x_position": [31], "label_orientation": [39]}, 15),
    "dsprites_ori": ("dsprites", {"label_x_position": [31], "label_orientation": [39]}, 15),
}  # fmt: skip


@pytest.mark.parametrize("name", list(COMPUTED))
def test_computed_labels(tmp_path, name):
    builder, features, label = COMPUTED[name]
    grey = builder in ("smallnorb", "dsprites")
    image = formats.pixels(1, (16, 16), 1 if grey else 3)
    image = image % 2 if builder == "dsprites" else image
    split = [{"image": formats.encoded(image), **features}] * 20
    parts = {"train": split, "validation": split, "test": split}
    root = formats.tfds(tmp_path, builder, "2.0.0", parts)
    splits, _ = read_images(root, name, options={"official": f"vtab1k/{name}", "subset": [2, 1]})
    assert set(splits["test"]["label"]) == {label}
    assert first(splits).shape == (16, 16, 3)
    if builder == "dsprites":
        assert set(np.unique(first(splits))) == {0, 255}


def test_kitti_without_vehicles_and_edges():
    from snella.data.readers.tfds import clevr_distance, kitti_distance

    assert kitti_distance({"objects/type": np.array([5]), "objects/location": np.zeros(3)}) == 3
    assert kitti_distance({}) == 3
    near = {"objects/type": np.array([0]), "objects/location": np.array([0, 0, 8.0], np.float32)}
    assert kitti_distance(near) == 0
    assert clevr_distance({"objects/pixel_coords": np.array([0, 0, 8.0], np.float32)}) == 0


def test_records_round_trip(tmp_path):
    features = {"a": b"\x00\xff", "b": [1.5, -2.0], "c": [3, -4, 10**12]}
    formats.tfrecord(tmp_path / "x-train.tfrecord-00000-of-00001", [formats.example(features)] * 3)
    records = Records([tmp_path / "x-train.tfrecord-00000-of-00001"])
    assert len(records) == 3
    found = parse_example(records[-1])
    assert found["a"] == [b"\x00\xff"]
    assert found["b"].tolist() == [1.5, -2.0]
    assert found["c"].tolist() == [3, -4, 10**12]


def test_array_records(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    root = tmp_path / "cifar100" / "3.0.2"
    root.mkdir(parents=True)
    for split, count in (("train", 20), ("test", 3)):
        name = root / f"cifar100-{split}.array_record-00000-of-00001"
        writer = module.ArrayRecordWriter(str(name), "group_size:1")
        for features in labelled(count):
            writer.write(formats.example(features))
        writer.close()
    splits, _ = read_images(root, "c", options={"official": "vtab1k/cifar100", "subset": [4, 2]})
    assert np.array_equal(decode(splits["val"]["image"][0]), formats.pixels(18))


def test_grey_cmyk_and_palette_images(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    image = Image.fromarray(formats.pixels(70))
    image.convert("CMYK").save(root / "images/test/000000.jpg")
    image.convert("L").save(root / "images/test/000001.jpg")
    image.convert("P").save(root / "images/test/000002.jpg", "PNG")
    image.convert("1").save(root / "images/test/000003.jpg", "PNG")
    splits, _ = read_images(root, "birds")
    assert [image.shape for image in splits["test"]["image"]] == [(20, 24, 3)] * 4


def test_prepared_copies_without_val_serve_protocols_on_all_images(tmp_path):
    from snella.data.prepared import Prepared
    from snella.tasks.base import DatasetSpec
    from snella.tasks.classification.prepare import prepare

    root = formats.community(tmp_path / "x", LABELS)
    (root / "val200.txt").unlink()
    (root / "train800.txt").unlink()
    prepare("birds", DatasetSpec(path=str(root)), tmp_path / "birds")
    data = Prepared.open(tmp_path / "birds")
    assert data.size("trainval") == 9
    assert data.manifest["warnings"]
    with pytest.raises(UserError, match="has no train split"):
        data.size("train")


def test_views_follow_the_order_of_the_batches():
    from snella.data.pixels import PixelSettings
    from snella.data.transforms import batches
    from snella.data.views import view_batches

    images = np.stack([np.full((40, 48, 3), 20 * i, np.uint8) for i in range(10)])
    settings = PixelSettings(image_size=16, normalisation="none")
    views = list(view_batches(images, settings, 2, 4, 7))
    plain = batches(torch.from_numpy(images).permute(0, 3, 1, 2), None, 4, 7)
    assert [v.shape for v in views] == [(4, 2, 3, 16, 16), (4, 2, 3, 16, 16), (2, 2, 3, 16, 16)]
    for v, batch in zip(views, plain, strict=True):
        grey = batch["image"].float().mean((1, 2, 3)) / 255
        assert (v.mean((2, 3, 4)) - grey[:, None]).abs().max() < 0.4
    again = list(view_batches(images, settings, 2, 4, 7))
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert not torch.equal(views[0][:, 0], views[0][:, 1])
