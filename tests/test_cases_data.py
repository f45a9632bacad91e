"""Folders, images and weights as users really have them: what works, and the line where not.

The kinds of faults of public reports, each on a small folder that the test writes. Every look is
through the command line: `snella prepare` for data, `snella execute` for weights.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from snella.cli import main
from snella.data.readers import read_images
from snella.errors import UserError
from snella.models.checkpoint import read_tensors

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"train800": 8, "val200": 4, "test": 6}
ONE = "images/test/000.png"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Work in a folder of its own, where a log of an internal error would be seen."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good copy in the VTAB-1k layout: three classes, 18 images."""
    root = tmp_path / "copy"
    rng = np.random.default_rng(0)
    for split, count in SPLITS.items():
        (root / "images" / split).mkdir(parents=True)
        lines = []
        for i in range(count):
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"images/{split}/{i:03}.png")
            lines.append(f"images/{split}/{i:03}.png {i % 3}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    union = (root / "train800.txt").read_text() + (root / "val200.txt").read_text()
    (root / "train800val200.txt").write_text(union)
    return root


def prepare(capsys, folder: Path, name: str = "mine", *settings: str) -> tuple[int, str]:
    """Status, and what was said on stdout or, for a mistake, the one line on stderr."""
    places = [f"datasets.{name}.path={folder}", f"data={folder.parent}/data"]
    status = main(["prepare", name, "--config", *places, *settings])
    said = capsys.readouterr()
    if status:
        assert said.err.startswith("snella: ") and said.err.count("\n") == 1, said.err
        prepared = folder.parent / "data/prepared"
        assert not prepared.exists() or not any(prepared.iterdir())
    return status, said.err or said.out


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob(name):
            file.write_text(file.read_text().replace(old, new))

    return change


def put(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / ONE).write_bytes(content) and None


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def recode(name: str, encoding: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_text().encode(encoding)
    ) and None  # fmt: skip


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def quoted(folder: Path) -> None:
    lines = [line.split() for line in (folder / "test.txt").read_text().splitlines()]
    (folder / "test.txt").write_text("".join(f'"{path}" {label}\n' for path, label in lines))


def vpt(**changes: str) -> Callable[[Path], None]:
    """VPT's json lists, class ids from 1, in place of the text lists."""

    def change(folder: Path) -> None:
        for role, split in (("train", "train800"), ("val", "val200"), ("test", "test")):
            lines = (folder / f"{split}.txt").read_text().splitlines()
            content = {x.split()[0].removeprefix("images/"): int(x[-1]) + 1 for x in lines}
            (folder / f"{role}.json").write_text(changes.get(role, json.dumps(content)))
        for file in folder.glob("*.txt"):
            file.unlink()

    return change


def classes(folder: Path) -> None:
    """Class folders in place of lists."""
    for role, split in (("train", "train800"), ("val", "val200"), ("test", "test")):
        for line in (folder / f"{split}.txt").read_text().splitlines():
            place = folder / role / f"c{line[-1]}"
            place.mkdir(parents=True, exist_ok=True)
            shutil.move(folder / line.split()[0], place)
    shutil.rmtree(folder / "images")
    for file in folder.glob("*.txt"):
        file.unlink()


def untested(folder: Path) -> None:
    classes(folder)
    shutil.rmtree(folder / "test")


def flat(folder: Path) -> None:
    classes(folder)
    for file in [*folder.glob("train/*/*")]:
        shutil.move(file, folder / "train" / f"{file.parent.name}-{file.name}")
    for inner in folder.glob("train/c*/"):
        inner.rmdir()


def twice_in(folder: Path) -> None:
    classes(folder)
    (folder / "train").rename(folder / "x")
    (folder / "train").mkdir()
    (folder / "x").rename(folder / "train/train")


def deeper(folder: Path) -> None:
    folder.rename(folder.with_name("x"))
    (folder / "a").mkdir(parents=True)
    folder.with_name("x").rename(folder / "a/b")


def left_by_macos(folder: Path) -> None:
    classes(folder)
    (folder / "train/c0/._000.png").write_bytes(b"resource fork")
    (folder / "train/.DS_Store").write_bytes(b"x")


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def as_folder(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def sparse(name: str) -> Callable[[Path], None]:
    """A file of three gigabytes that takes no room."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(3 << 30)

    return change


def further_kinds(folder: Path) -> None:
    classes(folder)
    next(folder.glob("train/*")).joinpath("more.heic").write_bytes(b"")


def png16() -> bytes:
    """Colour of 16 bits, which Pillow would cut to 8 without a word."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(range(96))) * 16)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
DEEP = Image.fromarray(np.full((16, 16), 40000, np.uint16))
REFUSED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no test list": (without("test.txt"), ["test.txt is missing", "train800.txt"]),
    "no val, no union": (without("val200.txt", "train800val200.txt"), ["val200.txt is missing"]),
    "twice in the union": (
        lambda f: (f / "train800val200.txt").open("a").write(f"{ONE.replace('test', 'val200')} 0\n")
        and None, ["train800val200.txt:13", "train800val200.txt:9", "list it once"],
    ),
    "commas": (edit("train800.txt", ".png ", ".png,"), ["train800.txt:1", "`path label`"]),
    "header": (edit("test.txt", "images/test/000", "path label\nimages/test/000"), ["test.txt:1"]),
    "names as labels": (edit("*.txt", "png 1", "png cat"), [":2:", "a whole number"]),
    "absolute": (edit("test.txt", "images", "/home/x/cifar/images"), ["test.txt:1", "relative"]),
    "drive": (edit("test.txt", "images/", "C:\\vtab\\images\\"), ["test.txt:1", "relative"]),
    "parent": (edit("test.txt", "images", "../copy/images"), ["test.txt:1", "leaves the folder"]),
    "utf-16": (recode("test.txt", "utf-16"), ["test.txt", "save it as UTF-8"]),
    "digits": (edit("test.txt", "000.png 0", f"000.png {'9' * 5000}"), ["test.txt:1", "number"]),
    "huge label": (edit("test.txt", "000.png 0", "000.png 1000000000"), ["test.txt:1", "indices"]),
    "long name": (edit("test.txt", "000.png", "x" * 5000), ["test.txt:1", "is missing"]),
    "case": (edit("*.txt", ".png", ".PNG"), ["17 more of 18", "/000.png: correct"]),
    "suffix": (edit("test.txt", ".png", ".jpg"), ["5 more of 18", "/000.png: correct"]),
    "prefix": (edit("*.txt", "images/", "cifar/images/"), ["without the beginning cifar/"]),
    "half": (lambda f: shutil.rmtree(f / "images/test"), ["5 more of 18", "unpack the archive"]),
    "pipe": (pipe("val200.txt"), ["val200.txt is no regular file"]),
    "list a folder": (as_folder("val200.txt"), ["val200.txt is a folder"]),
    "image a folder": (as_folder(ONE), ["test.txt:1", "is missing"]),
    "image a pipe": (pipe(ONE), ["test.txt:1", "is missing", "no regular file"]),
    "classes.txt": (
        lambda f: (f / "classes.txt").write_text("a\nb\n") and None,
        ["label 2 is out of range, 0 to 1", "classes.txt names that many"],
    ),
    "empty image": (put(b""), ["test.txt:1", "the file is empty", "download"]),
    "web page": (put(b"<html>404</html>"), ["a web page, not an image"]),
    "json": (put(b'{"error": "denied"}'), ["a text in JSON"]),
    "zeros": (put(bytes(1000)), ["no image in a format that is read (JPEG, PNG", "again"]),
    "cut short": (lambda f: put((f / ONE).read_bytes()[:-30])(f), ["test.txt:1", "again"]),
    "a JPEG whose rest is zeros": (
        lambda f: put((data := encoded(NOISE, "JPEG"))[:-900] + bytes(900))(f) or data,
        ["test.txt:1", "its end marker is missing"],
    ),
    "link": (
        lambda f: (f / ONE).unlink() or (f / ONE).symlink_to("nowhere"),
        ["test.txt:1", "is missing", "a link that leads nowhere"],
    ),
    "no class names": (
        lambda f: (f / "classes.txt").write_text("\n"), ["classes.txt is empty", "or remove"],
    ),
    "eps": (put(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ["format that is read"]),
    "16-bit colour": (put(png16()), ["more than 8 bits (16)", "convert it"]),
    "16-bit grey": (put(encoded(DEEP, "PNG")), ["more than 8 bits (16)"]),
    "16-bit TIFF": (put(encoded(DEEP, "TIFF")), ["more than 8 bits (16)"]),
    "16-bit PPM": (put(b"P6\n# by a scanner\n2 2\n65535\n" + bytes(24)), ["more than 8 bits (16)"]),
    "too large": (put(encoded(Image.new("1", (9000, 9000)), "PNG")), ["9000 x 9000", "convert"]),
    "bomb": (put(encoded(Image.new("1", (20000, 20000)), "PNG")), ["400000000 pixels", "convert"]),
    "no class folders": (flat, ["train holds images but no class folders"]),
    "train in train": (twice_in, ["train/train holds the class folders", "move them up"]),
    "no test folder": (
        untested, ["options: {test: val}"],
    ),
    "two levels": (deeper, ["set `path:", "copy/a/b`"]),
    "json cut": (vpt(test='{"a": '), ["test.json is not valid JSON"]),
    "json deep": (vpt(test="[" * 100_000), ["test.json is not valid JSON"]),
    "json list": (vpt(test="[1]"), ["test.json must hold one object"]),
    "json null": (vpt(test='{"test/000.png": null}'), ["class id of 'test/000.png'"]),
    "json superscript": (vpt(test='{"test/000.png": "\u00b2"}'), ["class id of"]),
    "json digits": (vpt(test='{"test/000.png": "%s"}' % ("9" * 5000)), ["class id of"]),
    "json outside": (vpt(test='{"../000.png": 1}'), ["leaves the data set's folder"]),
    "json twice": (vpt(test='{"a.png": 1, "a.png": 2}'), ["test.json", "'a.png' occurs twice"]),
    "huge list": (sparse("test.txt"), ["test.txt has over 128 MB"]),
    "huge image": (sparse(ONE), ["test.txt:1", "so it is no image"]),
    "more classes than are stored": (
        edit("test.txt", "000.png 0", "000.png 32768"), ["test.txt:1", "32,769 classes"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_and_nothing_half_prepared(capsys, folder, case):
    change, words = REFUSED[case]
    change(folder)
    status, said = prepare(capsys, folder)
    assert status == 2 and not Path("logs").exists(), said
    assert [word for word in words if word not in said] == [], said


def damaged_mat(folder: Path) -> None:
    """SVHN's files, of which one lacks the labels."""
    from scipy.io import savemat

    shutil.rmtree(folder)
    folder.mkdir()
    for role, content in (("train", {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [1, 2]}),
                          ("test", {"X": np.zeros((32, 32, 3, 2), np.uint8)})):  # fmt: skip
        savemat(folder / f"{role}_32x32.mat", content)


def test_a_damaged_release_is_one_line_and_its_traceback_is_logged(capsys, folder):
    pytest.importorskip("scipy")
    damaged_mat(folder)
    status, said = prepare(capsys, folder)
    assert status == 2 and "KeyError: 'y'" in said and "fetch it anew" in said
    assert "Traceback" in Path("logs/snella.log").read_text()


ACCEPTED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "as it is": (lambda f: None, []),
    "white space": (edit("*.txt", ".png ", ".png \t "), []),
    "windows": (edit("*.txt", "\n", "\r\n"), []),
    "byte order mark": (recode("test.txt", "utf-8-sig"), []),
    "backslashes": (edit("train800.txt", "/", "\\"), ["backslashes"]),
    "quotes": (quoted, []),
    "no union": (without("train800val200.txt"), []),
    "no val": (without("val200.txt"), ["4 images of train800val200.txt"]),
    "union alone": (without("val200.txt", "train800.txt"), ["train_split: trainval"]),
    "from 1": (
        lambda f: [edit("*.txt", f" {k}\n", f" {k + 1}\n")(f) for k in (2, 1, 0)] and None,
        ["class 0 never occurs", "first_label: 1"],
    ),
    "empty classes": (edit("*.txt", " 2\n", " 7\n"), ["classes 2, 3, 4, 5, 6 never occur"]),
    "test image trained on": (
        lambda f: shutil.copy(f / "images/train800/001.png", f / "images/test/001.png") and None,
        ["1 test image is also a training image"],
    ),
    "two labels": (
        lambda f: shutil.copy(f / "images/train800/001.png", f / "images/train800/002.png")
        and None, ["different labels"],
    ),
    "palette": (put(encoded(Image.new("P", (16, 16), 3), "PNG")), []),
    "one bit": (put(encoded(Image.new("1", (16, 16), 1), "PNG")), []),
    "grey and alpha": (put(encoded(Image.new("LA", (16, 16), (9, 9)), "PNG")), []),
    "transparent": (put(encoded(Image.new("RGBA", (16, 16), (1, 2, 3, 4)), "PNG")), []),
    "CMYK": (put(encoded(Image.new("CMYK", (16, 16), (1, 2, 3, 4)), "JPEG")), []),
    "moving": (
        put(encoded(Image.new("P", (16, 16)), "GIF", save_all=True,
                    append_images=[Image.new("P", (16, 16), 3)])), [],
    ),
    "another size": (put(encoded(Image.new("RGB", (3, 50)), "PNG")), []),
    "vpt": (vpt(), ["renumbered"]),
    "class folders": (classes, []),
    "macOS": (left_by_macos, []),
    "files of other kinds": (further_kinds, ["1 files are of no kind that is read (.heic)"]),
    "one class": (
        lambda f: [edit("*.txt", f" {k}\n", " 0\n")(f) for k in (1, 2)] and None,
        ["one class alone"],
    ),
    "a class named twice": (
        lambda f: (f / "classes.txt").write_text("a\nb\na\n") and None, ["names a twice"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_works_and_what_prepare_warns_of(capsys, folder, case):
    change, words = ACCEPTED[case]
    change(folder)
    status, said = prepare(capsys, folder)
    assert status == 0, said
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert [word for word in words if word not in "\n".join(warnings)] == [], said
    assert words or not warnings, said


def test_labels_that_the_entry_contradicts(capsys, folder):
    edit("test.txt", "000.png 0", "000.png 40")(folder)
    status, said = prepare(capsys, folder, "pets")
    assert status == 2 and "`num_classes` of data set 'pets' is 37" in said


def test_a_shipped_column_with_other_counts_is_said(capsys, folder):
    status, said = prepare(capsys, folder, "svhn")
    assert status == 0 and "6 test images, SVHN of VTAB-1k has 26,032" in said


def model() -> dict[str, torch.Tensor]:
    """Weights of the backbone of ``make_run``."""
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    made = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    return dict(made.state_dict())


class Evil:
    """An object that writes a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("opened", "w")


def saved(content: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(content, folder / "w.pth")
        return folder / "w.pth"

    return write


def written(content: bytes, name: str = "w.pth") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        state = {name: tensor.clone() for name, tensor in model().items()}
        change(state)
        save_file(state, folder / "w.safetensors")
        return folder / "w.safetensors"

    return write


def sharded(index: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "m").mkdir()
        (folder / "m/model.safetensors.index.json").write_text(index)
        return folder / "m"

    return write


def zeroed(folder: Path) -> Path:
    """A block that a disk or a download lost: torch itself would load the rest."""
    weights = model()
    file = saved(weights)(folder)
    lost = weights[QKV].numpy().tobytes()[:64]
    file.write_bytes(file.read_bytes().replace(lost, bytes(64)))
    return file


def weights_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "w.pth")
    return folder / "w.pth"


NORM = "blocks.0.norm1.weight"
QKV = "blocks.0.attn.qkv.weight"
WEIGHTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "missing": (lambda f: f / "none.pth", ["none.pth is missing", "docs/backbones.md"]),
    "empty": (written(b""), ["is empty; download it again"]),
    "web page": (written(b"<!DOCTYPE html>"), ["a web page instead of the weights"]),
    "git lfs": (written(b"version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
    "another format": (
        written(b"\x89HDF\r\n\x1a\n" + bytes(900)), ["neither a torch nor a safetensors file"],
    ),
    "cut short": (written(b"PK\x03\x04" + bytes(300)), ["is damaged or not a weights file"]),
    "header": (written(b"\xff" * 8 + b"{}", "w.safetensors"), ["is damaged"]),
    "zeros within": (zeroed, ["is damaged", "Bad CRC-32", "download it again"]),
    "list": (saved([1, 2]), ["holds a list instead of named tensors"]),
    "nothing": (saved({}), ["holds no tensors"]),
    "optimizer": (saved({"optimizer": {"state": {}}, "epoch": 3}), ["holds no tensors"]),
    "whole model": (saved(torch.nn.Linear(2, 2)), ["torch.nn.modules.linear.Linear", "python -c"]),
    "evil": (saved({"state_dict": Evil()}), ["io.open"]),
    "evil, old": (written(pickle.dumps({"state_dict": Evil()}, 2)), ["io.open"]),
    "NaN": (tensors(lambda s: s[NORM].fill_(torch.nan)), [NORM, "holds NaN"]),
    "infinity": (tensors(lambda s: s[NORM].fill_(torch.inf)), [NORM, "infinity"]),
    "integers": (tensors(lambda s: s.update({QKV: s[QKV].int()})), [QKV, "int32"]),
    "complex": (tensors(lambda s: s.update({QKV: s[QKV] * 1j})), [QKV, "complex64"]),
    "truth values": (tensors(lambda s: s.update({QKV: s[QKV] > 0})), ["is quantised"]),
    "eight bits": (
        tensors(lambda s: s.update({QKV: s[QKV].to(torch.float8_e4m3fn)})), ["is quantised"],
    ),
    "sparse": (saved({NORM: torch.eye(3).to_sparse()}), [NORM, "a sparse tensor"]),
    "meta": (saved({NORM: torch.ones(3, device="meta")}), [NORM, "no values"]),
    "git lfs in a folder": (
        lambda f: f.joinpath("m").mkdir() or written(
            b"version https://git-lfs.github.com/spec/v1\n", "m/model.safetensors"
        )(f).parent,
        ["model.safetensors is damaged", "git lfs pull"],
    ),
    "quantised": (
        tensors(lambda s: s.update({QKV: s[QKV].to(torch.int8)})), ["is quantised", "original"],
    ),
    "lacking": (tensors(lambda s: s.pop(NORM)), ["lacks", NORM]),
    "more": (
        tensors(lambda s: s.update({"blocks.9.norm1.weight": s[NORM].clone()})),
        ["no place for blocks.9.norm1.weight", "ignore:"],
    ),
    "other shape": (tensors(lambda s: s.update({NORM: torch.ones(3)})), [NORM, "arch:"]),
    "pipe": (weights_pipe, ["no regular file"]),
    "index": (sharded("["), ["no index of weights"]),
    "shard": (sharded('{"weight_map": {"a": "x.safetensors"}}'), ["lacks x.safetensors"]),
    "shard outside": (sharded('{"weight_map": {"a": "../../x"}}'), ["no index of weights"]),
    "no folder": (lambda f: f.joinpath("e").mkdir() or f / "e", ["is empty"]),
    "long": (lambda f: f / ("x" * 5000), ["correct `file:`"]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_known_by_their_content_and_not_by_their_name(tmp_path, suffix):
    state = model()
    torch.save(state, tmp_path / f"torch{suffix}")
    save_file(state, tmp_path / f"safe{suffix}")
    for name in ("torch", "safe"):
        found = read_tensors(tmp_path / f"{name}{suffix}", state.keys())
        assert found.keys() == state.keys()
        assert torch.equal(found[QKV], state[QKV])


def test_a_tensor_beside_the_container_of_the_weights_is_not_taken_for_them(tmp_path):
    torch.save({"model": model(), "rng": torch.get_rng_state()}, tmp_path / "w.pth")
    assert read_tensors(tmp_path / "w.pth", model().keys()).keys() == model().keys()


OPTIONS = {
    "test": ("val", "is for the layout classes"),
    "subset": ([2, 2], "is for the layout tfds"),
    "val_share": (0.5, "this one has some"),
    "first_label": (2, "taken off every label"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_would_do_nothing_is_refused(capsys, folder, option):
    value, words = OPTIONS[option]
    status, said = prepare(capsys, folder, "mine", f"datasets.mine.options={{{option}: {value}}}")
    assert status == 2 and words in said, said


def test_a_release_names_no_image_outside_its_folder(tmp_path):
    root = formats.cub(tmp_path / "x")
    file = root / "images.txt"
    file.write_text(file.read_text().replace("1 ", "1 ../../", 1))
    with pytest.raises(UserError, match="leaves the folder"):
        read_images(root, "cub")


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_none(tmp_path, capsys, make_run, case):
    write, words = WEIGHTS[case]
    run = make_run(epochs=1, warmup_epochs=0)
    backbone = run.backbone.model_copy(update={"file": write(tmp_path).as_posix()})
    settings = run.model_copy(update={"backbone": backbone}).to_json()
    assert main(["execute", "--settings", settings]) == 2
    said = capsys.readouterr().err
    assert said.startswith("snella: ") and said.count("\n") == 1 and len(said) < 1000, said
    assert [word for word in words if word not in said] == [], said
    assert not Path("opened").exists()


def test_a_folder_of_another_case_is_named(tmp_path):
    root = formats.community(tmp_path / "x", {"train800": [0, 1], "val200": [0], "test": [1]})
    (root / "images" / "test").rename(root / "images" / "Test")
    with pytest.raises(UserError, match=r"there is images/Test/000000.jpg: correct the name"):
        read_images(root, "x")


def test_images_in_hidden_folders_are_no_images(tmp_path):
    """Notebooks leave copies in .ipynb_checkpoints beside the images."""
    for place in ("train/a/0", "train/a/.ipynb_checkpoints/0-checkpoint", "train/b/0", "test/a/0"):
        formats.save(tmp_path / f"{place}.png", formats.pixels(len(place)))
    splits, _ = read_images(tmp_path, "x")
    assert len(splits["train"]["label"]) == 2
