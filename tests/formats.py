"""Miniature data sets in exactly the formats in which the 24 tasks of Table 1 are passed around."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from snella.data.readers.records import masked_crc32c


def pixels(index: int, size: tuple[int, int] = (20, 24), channels: int = 3) -> np.ndarray:
    """A random image of its own, uint8 (H, W, C) or (H, W)."""
    rng = np.random.default_rng(index)
    shape = size if channels == 1 else (*size, channels)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, image: np.ndarray, **options: Any) -> None:
    """Write an image file, its folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def encoded(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """An image's encoded bytes."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def example(features: dict[str, Any]) -> bytes:
    """A serialised tf.train.Example: bytes, lists of floats or lists of integers by name."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            kind = _field(1, _field(1, value))
        elif np.asarray(value).dtype.kind == "f":
            kind = _field(2, _field(1, np.asarray(value, dtype="<f4").ravel().tobytes()))
        else:
            numbers = b"".join(_varint(int(v)) for v in np.ravel(value))
            kind = _field(3, _field(1, numbers))
        entries += _field(1, _field(1, name.encode()) + _field(2, kind))
    return _field(1, entries)


def tfrecord(file: Path, records: list[bytes]) -> None:
    """A TFRecord file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream:
        for data in records:
            length = struct.pack("<Q", len(data))
            stream.write(length + struct.pack("<I", masked_crc32c(length)))
            stream.write(data + struct.pack("<I", masked_crc32c(data)))


def tfds(folder: Path, builder: str, version: str, splits: dict[str, list[dict]]) -> Path:
    """A TFDS-prepared data set: shards of two records, and the JSON beside them."""
    root = folder / builder / version
    for split, examples in splits.items():
        shards = [examples[i : i + 2] for i in range(0, len(examples), 2)]
        for number, shard in enumerate(shards):
            name = f"{builder}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
            tfrecord(root / name, [example(e) for e in shard])
    (root / "dataset_info.json").write_text(json.dumps({"name": builder, "version": version}))
    return root


def community(root: Path, labels: dict[str, list[int]], size=(20, 24), first: int = 0) -> Path:
    """NOAH's VTAB-1k layout: JPEG by Pillow's defaults, the 1000 stored a second time."""
    lists: dict[str, list[str]] = {}
    number = first
    for split in ("train800", "val200", "test"):
        lists[split] = []
        for index, label in enumerate(labels[split]):
            path = f"images/{split}/{index:06d}.jpg"
            save(root / path, pixels(number, size))
            lists[split].append(f"{path} {label}")
            number += 1
    union = []
    for index, line in enumerate(lists["train800"] + lists["val200"]):
        path, label = line.split()
        copy = f"images/train800val200/{index:06d}.jpg"
        (root / copy).parent.mkdir(parents=True, exist_ok=True)
        (root / copy).write_bytes((root / path).read_bytes())
        union.append(f"{copy} {label}")
    for split, lines in (lists | {"train800val200": union}).items():
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def vpt(root: Path, images: str, counts=(4, 2, 4), classes: int = 2, first: int = 0) -> Path:
    """VPT's json lists, ids from 1, beside ``images`` (the name of the image folder)."""
    number = first
    for role, count in zip(("train", "val", "test"), counts, strict=True):
        content = {}
        for index in range(count):
            label = index % classes + 1
            path = f"{label:03d}.Bird/b_{role}_{index}.jpg"
            save(root / images / path, pixels(number))
            content[path] = label
            number += 1
        (root / f"{role}.json").write_text(json.dumps(content))
    return root


def cub(root: Path, nabirds: bool = False) -> Path:
    """CUB-200-2011's text files, or NABirds' with its ids."""
    ids = [f"0{i:05x}-aa" if nabirds else str(i + 1) for i in range(8)]
    classes = [5, 9] if nabirds else [1, 2]
    folders = {c: f"{c:04d}" if nabirds else f"{c:03d}.Black_bird" for c in classes}
    rows: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    for i, key in enumerate(ids):
        label = classes[i % 2]
        path = f"{folders[label]}/{key}.jpg"
        save(root / "images" / path, pixels(i))
        rows["images"].append(f"{key} {path}")
        rows["image_class_labels"].append(f"{key} {label}")
        rows["train_test_split"].append(f"{key} {int(i < 5)}")
    for name, lines in rows.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    names = [*classes, 7] if nabirds else classes
    (root / "classes.txt").write_text("".join(f"{c} Bird number {c}\n" for c in names))
    if nabirds:
        (root / "hierarchy.txt").write_text("5 0\n9 0\n")
    return root


def flowers(root: Path) -> Path:
    """102flowers.tgz, imagelabels.mat and setid.mat."""
    from scipy.io import savemat

    for i in range(1, 9):
        save(root / "jpg" / f"image_{i:05d}.jpg", pixels(i))
    savemat(root / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1, 2, 1, 2]], np.uint8)})
    sets = {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6, 7, 8]]}
    savemat(root / "setid.mat", {k: np.array(v, np.uint16) for k, v in sets.items()})
    return root


def dogs(root: Path) -> Path:
    """images.tar and lists.tar of Stanford Dogs."""
    from scipy.io import savemat

    for role, numbers in (("train", range(0, 4)), ("test", range(4, 8))):
        names = np.empty((4, 1), dtype=object)
        for row, i in enumerate(numbers):
            names[row, 0] = f"n0208562{i % 2}-Chihuahua/n0208562{i % 2}_{i}.jpg"
            save(root / "Images" / names[row, 0], pixels(i))
        labels = np.array([[i % 2 + 1] for i in numbers], np.uint8)
        savemat(root / f"{role}_list.mat", {"file_list": names, "labels": labels})
    return root


def cars(root: Path, single: bool = False) -> Path:
    """cars_train.tgz, cars_test.tgz and the devkit, or the older single archive."""
    from scipy.io import savemat

    if single:
        kinds = [("relative_im_path", "O"), ("class", "O"), ("test", "O")]
        table = np.empty((1, 8), dtype=kinds)
        for i in range(8):
            path = f"car_ims/{i + 1:06d}.jpg"
            save(root / path, pixels(i))
            table[0, i] = (path, i % 2 + 1, int(i >= 4))
        savemat(root / "cars_annos.mat", {"annotations": table})
        return root
    (root / "devkit").mkdir(parents=True)
    for role, file in (("train", "devkit/cars_train_annos.mat"),
                       ("test", "cars_test_annos_withlabels.mat")):  # fmt: skip
        kinds = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
        table = np.empty((1, 4), dtype=kinds)
        for i in range(4):
            name = f"{i + 1:05d}.jpg"
            save(root / f"cars_{role}" / name, pixels(i + 4 * (role == "test")))
            table[0, i] = (1, i % 2 + 1, name)
        savemat(root / file, {"annotations": table})
    return root


def food(root: Path) -> Path:
    """food-101.tar.gz."""
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "classes.txt").write_text("apple_pie\nbaby_back_ribs\n")
    number = 0
    for role in ("train", "test"):
        entries = []
        for _ in range(4):
            entry = f"{('apple_pie', 'baby_back_ribs')[number % 2]}/{1000 + number}"
            save(root / "images" / f"{entry}.jpg", pixels(number))
            entries.append(entry)
            number += 1
        (root / "meta" / f"{role}.txt").write_text("\n".join(entries) + "\n")
    return root


def cifar(root: Path) -> Path:
    """cifar-100-python."""
    import pickle

    root.mkdir(parents=True, exist_ok=True)
    for role, start in (("train", 0), ("test", 6)):
        images = np.stack([pixels(start + i, (32, 32)) for i in range(6)])
        content = {
            b"data": images.transpose(0, 3, 1, 2).reshape(6, -1),
            b"fine_labels": [0, 1, 2, 0, 1, 2], b"coarse_labels": [0] * 6,
        }  # fmt: skip
        (root / role).write_bytes(pickle.dumps(content, protocol=2))
    (root / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"a", b"b", b"c"]}, protocol=2))
    return root


def svhn(root: Path) -> Path:
    """train_32x32.mat and test_32x32.mat; the digit 0 is stored as 10."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for role, start in (("train", 0), ("test", 10)):
        images = np.stack([pixels(start + i, (32, 32)) for i in range(10)], axis=-1)
        labels = np.array([[i + 1] for i in range(10)], np.uint8)
        savemat(root / f"{role}_32x32.mat", {"X": images, "y": labels})
    return root


def onnx(
    file: Path, tensors: dict[str, np.ndarray], nodes: list[tuple[str, str, list[str]]]
) -> None:
    """An ONNX file with float initialisers and nodes (name, kind, inputs)."""
    graph = b""
    for name, kind, inputs in nodes:
        parts = b"".join(_field(1, part.encode()) for part in inputs)
        graph += _field(1, parts + _field(3, name.encode()) + _field(4, kind.encode()))
    for name, array in tensors.items():
        dims = b"".join(_varint(1 << 3) + _varint(n) for n in array.shape)
        data = _field(9, np.ascontiguousarray(array, dtype="<f4").tobytes())
        graph += _field(5, dims + _varint(2 << 3) + _varint(1) + _field(8, name.encode()) + data)
    file.write_bytes(_varint(1 << 3) + _varint(7) + _field(7, graph))
