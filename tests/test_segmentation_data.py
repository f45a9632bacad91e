"""Folders of images and masks: splits, near-duplicates, and one clear line for what is wrong."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snella.data.prepared import Prepared, SealedTargets
from snella.errors import UserError
from snella.tasks.base import DatasetSpec
from snella.tasks.segmentation.duplicates import near_groups, perceptual_hash, share_out
from snella.tasks.segmentation.masks import decode_mask, encode_mask, read_mask
from snella.tasks.segmentation.prepare import prepare, sources


def picture(seed: int, height: int = 40, width: int = 52) -> np.ndarray:
    """A smooth random colour picture, so that perceptual hashes differ."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def square(height: int = 40, width: int = 52, at: int = 8) -> np.ndarray:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[at : at + 14, at : at + 18] = 255
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twenty pairs; image19 is image00 saved again with more compression."""
    folder = tmp_path / "polyps"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(20):
        pixels = Image.fromarray(picture(i % 19))
        pixels.save(folder / "images" / f"image{i:02d}.jpg", quality=95 if i < 19 else 60)
        Image.fromarray(square()).convert("RGB").save(folder / "masks" / f"image{i:02d}.jpg")
    (folder / "kavsir_bboxes.json").write_text("{}")
    return folder


def spec(root: Path, kind: str = "kvasir", **options) -> DatasetSpec:
    return DatasetSpec(kind=kind, path=root.as_posix(), task="segmentation", options=options)


def prepared(root: Path, tmp_path: Path, **options) -> Prepared:
    prepare("polyps", spec(root, **options), tmp_path / "prepared" / "polyps")
    return Prepared.open(tmp_path / "prepared" / "polyps")


def names(data: Prepared, split: str) -> list[str]:
    return [bytes(name).decode() for name in data.encoded(split, "name")]


def test_disjoint_split_keeps_near_duplicates_together(root: Path, tmp_path: Path) -> None:
    data = prepared(root, tmp_path)
    parts = {split: set(names(data, split)) for split in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 20 == len(set.union(*parts.values()))
    assert all(parts.values())
    assert any({"image00", "image19"} <= part for part in parts.values())
    assert data.manifest["test_equal_to_training"] == 0
    assert data.manifest["test_near_to_training"] == 0
    again = prepared(root, tmp_path / "again")
    assert again.digest == data.digest


def test_images_are_the_original_files_and_test_masks_are_sealed(
    root: Path, tmp_path: Path
) -> None:
    data = prepared(root, tmp_path)
    first = names(data, "train")[0]
    assert data.encoded("train", "image")[0] == (root / "images" / f"{first}.jpg").read_bytes()
    true = square() > 0
    np.testing.assert_array_equal(decode_mask(data.encoded("train", "mask")[0]), true)
    np.testing.assert_array_equal(data.images("train", "mask")[0][..., 0] > 127, true)
    assert data.column("test", "size").tolist() == [[40, 52]] * data.size("test")
    with pytest.raises(SealedTargets):
        data.encoded("test", "mask")
    assert data.targets("test", "mask")[0].shape == (40, 52, 3)


def test_kvasirs_own_lists_are_used(root: Path, tmp_path: Path) -> None:
    (root / "train.txt").write_text("\n".join(f"image{i:02d}" for i in range(1, 18)))
    (root / "val.txt").write_text("image00.jpg\nimage18\n")
    data = prepared(root, tmp_path)
    assert names(data, "test") == ["image00", "image18"]
    assert data.size("trainval") == 17 and data.size("val") == 2
    (root / "val.txt").write_text("image00\nimage05\n")
    with pytest.raises(UserError, match="image05 is also in"):
        prepared(root, tmp_path)
    (root / "val.txt").unlink()
    with pytest.raises(UserError, match=r"train.txt is one of .* two lists.*add the other"):
        sources(spec(root))


def test_lists_of_another_folder_mean_nothing_unless_they_are_named(
    root: Path, tmp_path: Path
) -> None:
    """Many data sets hold a val.txt that validates; only Kvasir-SEG's own is tested on."""
    (root / "train.txt").write_text("image01\n")
    (root / "val.txt").write_text("image00\n")
    assert sources(spec(root))[2:] == [root / "train.txt", root / "val.txt"]
    own = spec(root, kind="image-mask")
    assert sources(own) == [root / "images", root / "masks"]
    prepare("mine", own, tmp_path / "mine")
    assert Prepared.open(tmp_path / "mine").size("train") > 1
    named = spec(root, kind="image-mask", train_list="train.txt", test_list="val.txt")
    assert sources(named) == sources(spec(root))


def test_released_split_trains_on_all_and_says_so(root: Path, tmp_path: Path) -> None:
    (root / "sessile.txt").write_text("image03\nimage04\n")
    data = prepared(root, tmp_path, split="released", released_test="sessile.txt")
    assert data.size("trainval") == 20 and names(data, "test") == ["image03", "image04"]
    assert data.manifest["test_equal_to_training"] == 2
    assert any("2 of 2 test images are training images" in w for w in data.manifest["warnings"])


def test_further_test_sets_are_numbered(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "clinic"
    for name in ("images", "masks"):
        (other / name).mkdir(parents=True)
    Image.fromarray(picture(77, 30, 30)).save(other / "images" / "1.png")
    Image.fromarray(square(30, 30)).save(other / "masks" / "1.png")
    data = prepared(root, tmp_path, test_sets={"CVC-ClinicDB": other.as_posix()})
    assert data.manifest["test_sets"] == ["polyps", "CVC-ClinicDB"]
    assert data.column("test", "test_set")[-1] == 1
    assert other in sources(spec(root, test_sets={"CVC-ClinicDB": other.as_posix()}))


def _drop_mask(root: Path) -> None:
    (root / "masks" / "image05.jpg").unlink()


def _drop_image(root: Path) -> None:
    (root / "images" / "image05.jpg").unlink()


def _other_size(root: Path) -> None:
    Image.fromarray(square(40, 50)).save(root / "masks" / "image05.jpg")


def _grey(root: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 52).astype(np.uint8), (40, 1))
    Image.fromarray(ramp).save(root / "masks" / "image05.jpg")


def _empty(root: Path) -> None:
    Image.fromarray(np.zeros((40, 52), np.uint8)).save(root / "masks" / "image05.jpg")


def _colour(root: Path) -> None:
    mask = np.zeros((40, 52, 3), np.uint8)
    mask[5:20, 5:20, 0] = 255
    (root / "masks" / "image05.jpg").unlink()
    Image.fromarray(mask).save(root / "masks" / "image05.png")


def _classes(root: Path) -> None:
    (root / "masks" / "image05.jpg").unlink()
    Image.fromarray((square() > 0).astype(np.uint8) * 2).save(root / "masks" / "image05.png")


def _alpha(root: Path) -> None:
    (root / "masks" / "image05.jpg").unlink()
    white = np.full((40, 52, 3), 255, np.uint8)
    Image.fromarray(np.dstack([white, square()])).save(root / "masks" / "image05.png")


def _deep_mask(root: Path) -> None:
    (root / "masks" / "image05.jpg").unlink()
    deep = Image.fromarray(square().astype(np.uint16) * 257)
    deep.save(root / "masks" / "image05.png")


def _deep_image(root: Path) -> None:
    (root / "images" / "image05.jpg").unlink()
    Image.fromarray(square().astype(np.uint16) * 257).save(root / "images" / "image05.png")


def _deep_colour(root: Path) -> None:
    """Sixteen bits per channel, which Pillow would cut to eight."""
    (root / "images" / "image05.jpg").unlink()
    rows = zlib.compress(b"".join(b"\0" + bytes(range(104)) * 3 for _ in range(40)))
    header = struct.pack(">IIBBBBB", 52, 40, 16, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    ]
    (root / "images" / "image05.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def _void(root: Path) -> None:
    """VOC's way: objects are 1, their uncertain rim is 255."""
    (root / "masks" / "image05.jpg").unlink()
    mask = (square() > 0).astype(np.uint8)
    mask[8] = 255
    Image.fromarray(mask).save(root / "masks" / "image05.png")


def _suffixed(root: Path) -> None:
    (root / "masks" / "image05.jpg").rename(root / "masks" / "image05_mask.jpg")


def _unread(root: Path) -> None:
    (root / "masks" / "image05.jpg").rename(root / "masks" / "image05.gif")


def _nested(root: Path) -> None:
    (root / "images").rename(root / "moving")
    (root / "images").mkdir()
    (root / "moving").rename(root / "images" / "images")


def _truncated(root: Path) -> None:
    file = root / "images" / "image05.jpg"
    file.write_bytes(file.read_bytes()[:300])


def _twice(root: Path) -> None:
    Image.fromarray(picture(5)).save(root / "images" / "image05.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_mask, r"image05.jpg has no mask"),
        (_drop_image, r"image05.jpg has no image"),
        (_other_size, r"50 x 40 pixels, its image 52 x 40"),
        (_grey, r"neither black nor white"),
        (_empty, r"the mask is empty.*allow_empty: true"),
        (_colour, r"the mask is coloured"),
        (_classes, r"the largest value is 2, and only values above 128 are"),
        (_alpha, r"parts of the mask are transparent"),
        (_deep_mask, r"more than 8 bits"),
        (_deep_image, r"image05.png: the image cannot be decoded"),
        (_deep_colour, r"image05.png: .* more than 8 bits \(16\)"),
        (_void, r"three values \(0, 1, 255\)"),
        (_suffixed, r"there is .*image05_mask.jpg: give it the same name"),
        (_unread, r"there is .*image05.gif: give it the same name, as JPEG or PNG"),
        (_nested, r"images holds no picture .*; move up what .*images/images holds"),
        (_truncated, r"image05.jpg: the image cannot be decoded"),
        (_twice, r"have the same name"),
    ],
)
def test_bad_pictures_are_one_clear_line(root: Path, tmp_path: Path, damage, message: str) -> None:
    damage(root)
    with pytest.raises(UserError, match=message) as caught:
        prepared(root, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "prepared" / "polyps").exists()


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_image_under_an_upright_mask_is_refused(
    root: Path, tmp_path: Path, orientation: int
) -> None:
    """Upside down it would train on a wrong mask without a word; turned alike, both fit."""
    exif = Image.Exif()
    exif[274] = orientation
    file = root / "images" / "image05.jpg"
    Image.open(file).save(file, exif=exif)
    with pytest.raises(UserError, match=rf"image05.jpg and its mask .*EXIF {orientation} and 1"):
        prepared(root, tmp_path)
    file = root / "masks" / "image05.jpg"
    Image.open(file).save(file, exif=exif)
    assert prepared(root, tmp_path).size("train") > 1


def test_near_duplicates_of_training_images_are_counted_and_said(
    root: Path, tmp_path: Path
) -> None:
    """Lists may cut through them, and a released test set may be saved anew."""
    (root / "train.txt").write_text("\n".join(f"image{i:02d}" for i in range(18)))
    (root / "val.txt").write_text("image18\nimage19\n")
    data = prepared(root, tmp_path)
    assert data.manifest["test_equal_to_training"] == 0
    assert data.manifest["test_near_to_training"] == 1
    warning = "1 of 2 test images are near-duplicates of training images"
    assert data.manifest["warnings"] == [warning]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_sets": {"polyps": "x"}}, "a test set .* has its name, too"),
        ({"splt": "disjoint"}, "Did you mean 'split'"),
        ({"split": "random"}, "options.split"),
        ({"train_list": "a.txt"}, "both train_list and test_list"),
        ({"split": "released"}, "released_test"),
        ({"train_list": "no.txt", "test_list": "no.txt"}, "is missing"),
        ({"val_fraction": 0.001}, "leave none for val"),
    ],
)
def test_wrong_options_are_one_clear_line(root, tmp_path, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(root, tmp_path, **options)


def test_a_list_with_an_unknown_name_names_its_line(root: Path, tmp_path: Path) -> None:
    (root / "a.txt").write_text("image01\n\nimage77\n")
    with pytest.raises(UserError, match=r"a.txt:3: there is no image 'image77'"):
        prepared(root, tmp_path, train_list="a.txt", test_list="a.txt")
    with pytest.raises(UserError, match="no folder"):
        prepare("x", spec(tmp_path / "nowhere"), tmp_path / "p")
    with pytest.raises(UserError, match="Unknown kind"):
        prepare("x", spec(root, kind="kvasr"), tmp_path / "p")


def test_masks_of_zeros_and_ones_and_through_jpeg(tmp_path: Path) -> None:
    true = square() > 0
    Image.fromarray(true.astype(np.uint8)).save(tmp_path / "ones.png")
    Image.fromarray(square()).save(tmp_path / "jpeg.jpg", quality=80)
    Image.fromarray(true).save(tmp_path / "bits.png")
    for name in ("ones.png", "jpeg.jpg", "bits.png"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), true)
    np.testing.assert_array_equal(decode_mask(encode_mask(true)), true)


def test_hash_finds_copies_and_not_others() -> None:
    hashes = [perceptual_hash(picture(i)) for i in range(30)]
    small = np.asarray(Image.fromarray(picture(3)).resize((47, 37), Image.Resampling.BILINEAR))
    groups = near_groups([*hashes, perceptual_hash(small)], 6)
    assert groups[30] == groups[3] and len(set(groups)) == 30


def test_groups_are_chains_and_are_shared_out_whole() -> None:
    groups = near_groups([0, 0b11, 0b1111, (1 << 40) - 1], 2)
    assert groups.tolist() == [0, 0, 0, 3]
    many = np.repeat(np.arange(30), 3)
    parts = share_out(many, [9, 12, 69], 1)
    assert [len(part) for part in parts] == [9, 12, 69]
    assert not set(many[parts[0]]) & set(many[parts[1]])
