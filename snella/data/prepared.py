"""Prepared data sets: what every run reads, written once, checked, and sealed.

`data/prepared/<dataset>/` holds images, labels and `manifest.json`. Images of one small size are
an array `<split>_images.npy`; all others keep their original encoded bytes in one file
`<split>_images.bin` with an index `<split>_offsets.npy`. Test labels lie in a file of their own
that only the scorer opens.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snella.data.images import JPEG_MAGIC, ArrayImages, EncodedImages, JoinedImages
from snella.data.storage import digest_files, durable, hash_image, swap, write_array
from snella.errors import UserError, unknown

SCHEMA = 1
MANIFEST = "manifest.json"
STORED = ("train800", "val200", "test")
SPLITS = ("train800", "val200", "trainval", "test")

# Decoded pixels uint8 (N, H, W, 3), or the encoded bytes of one file per image.
Images = np.ndarray | Sequence[bytes]


class SealedTestLabels(Exception):
    """Something other than the scorer asked for the labels of the test split."""


def write_prepared(
    folder: Path, splits: Mapping[str, tuple[Images, np.ndarray]], *, info: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a prepared data set and return its manifest.

    The folder appears complete or not at all, replaces an older one, and has the same digest
    whenever the same data are prepared.

    Args:
        folder: where to; its name is the data set's unless `info` has a name.
        splits: for each of train800, val200 and test the images and their labels (N,). Either
            all splits hold arrays uint8 (N, H, W, 3) or all hold encoded files.
        info: goes into the manifest as it is (source, licence, class_names, group, ...).
            Absent, `num_classes` is one more than the highest label, and `jpeg` (whether the
            pixels went through JPEG) is true if any of the encoded files is one.

    Raises:
        UserError: no space left, or the folder holds other files than prepared data.
        ValueError: splits or labels that break this contract.
    """
    manifest = _describe(folder, splits, info)
    needed = sum(_nbytes(images) + 8 * len(labels) for images, labels in splits.values())
    token = secrets.token_hex(4)
    partial = folder.with_name(f".{folder.name}.{token}.partial")
    _require_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.mkdir()
        hashes = {split: _write_split(partial, split, *splits[split]) for split in STORED}
        training = {*hashes["train800"], *hashes["val200"]}
        manifest["test_images_also_in_trainval"] = sum(h in training for h in hashes["test"])
        manifest["files"] = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
        manifest["digest"] = digest_files(partial, manifest["files"])
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        swap(partial, folder, folder.with_name(f".{folder.name}.{token}.old"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"No space left in {folder.parent}: preparing {manifest['name']!r} needs about "
            f"{needed:,} bytes. Free some or choose another folder; nothing was written."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


@dataclass(frozen=True)
class Prepared:
    """A prepared data set, opened read-only; nothing is read before it is asked for."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Open a prepared data set after checking that it is there, current and complete.

        Raises:
            UserError: it is missing, of another schema, or a file is missing or cut short.
        """
        folder = Path(folder)
        again = f"run `snella prepare {folder.name}`"
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"No prepared data set in {folder}: {again}.") from None
        except ValueError:
            raise UserError(f"{folder / MANIFEST} is damaged: {again}.") from None
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise UserError(
                f"The prepared data in {folder} have schema {schema}, "
                f"this version reads schema {SCHEMA}: {again}."
            )
        for name, size in manifest["files"].items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "missing" if found is None else f"{found} bytes long instead of {size}"
                raise UserError(f"{path} is {state}: {again}.")
        return cls(folder, manifest)

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.manifest["name"]

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without an image in some split."""
        return self.manifest["num_classes"]

    @property
    def jpeg(self) -> bool:
        """Whether the pixels went through JPEG before they were prepared."""
        return self.manifest["jpeg"]

    def __len__(self) -> int:
        """Number of images in all splits together."""
        return sum(self.size(split) for split in STORED)

    def size(self, split: str) -> int:
        """Number of images in a split."""
        return sum(self.manifest["counts"][part] for part in _parts(split))

    def image(self, split: str, index: int) -> np.ndarray:
        """One image as stored, RGB uint8 (H, W, 3)."""
        return self.images(split)[index]

    def images(self, split: str) -> Sequence[np.ndarray]:
        """All images of a split, lazily: item `i` is RGB uint8 (H, W, 3)."""
        parts = [self._stored_images(part) for part in _parts(split)]
        return parts[0] if len(parts) == 1 else JoinedImages(parts)

    def labels(self, split: str) -> np.ndarray:
        """Labels of a training or validation split, int64 (N,).

        Raises:
            SealedTestLabels: for "test", whose labels belong to the scorer alone.
        """
        if split == "test":
            raise SealedTestLabels(f"The test labels of {self.name!r} are for the scorer only.")
        return np.concatenate([_load_labels(self.folder, part) for part in _parts(split)])

    def verify(self) -> None:
        """Read every file and compare with the digest in the manifest.

        Raises:
            UserError: some byte has changed since the data set was prepared.
        """
        if digest_files(self.folder, self.manifest["files"]) != digest(self.folder):
            raise UserError(
                f"The files in {self.folder} do not match the digest in {MANIFEST}: "
                f"run `snella prepare {self.folder.name}`."
            )

    def _stored_images(self, split: str) -> Sequence[np.ndarray]:
        count = self.manifest["counts"][split]
        if self.manifest["storage"] == "array":
            return ArrayImages(self.folder / f"{split}_images.npy", count)
        blob, offsets = f"{split}_images.bin", f"{split}_offsets.npy"
        return EncodedImages(self.folder / blob, self.folder / offsets, count)


def test_labels(folder: Path) -> np.ndarray:
    """Labels of the test split, int64 (N,): for the scorer (`snella.runs.evaluate`) alone."""
    return _load_labels(Prepared.open(folder).folder, "test")


test_labels.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


def digest(folder: Path) -> str:
    """SHA-256 over all arrays of a prepared data set, as recorded when it was written."""
    return Prepared.open(folder).manifest["digest"]


def _parts(split: str) -> tuple[str, ...]:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return ("train800", "val200") if split == "trainval" else (split,)


def _load_labels(folder: Path, split: str) -> np.ndarray:
    return np.load(folder / f"{split}_labels.npy", allow_pickle=False)


def _describe(
    folder: Path, splits: Mapping[str, tuple[Images, np.ndarray]], info: Mapping[str, Any]
) -> dict[str, Any]:
    """Check the splits and say in the manifest what they hold."""
    if set(splits) != set(STORED):
        raise ValueError(f"splits must be {STORED}, got {tuple(splits)}")
    kinds = {isinstance(images, np.ndarray) for images, _ in splits.values()}
    if len(kinds) != 1:
        raise ValueError("either all splits are arrays or all are encoded files")
    for split, (images, labels) in splits.items():
        if len(images) == 0 or labels.shape != (len(images),):
            raise ValueError(f"{split}: {len(images)} images, labels of shape {labels.shape}")
        if isinstance(images, np.ndarray) and (images.dtype, images.shape[3:]) != (np.uint8, (3,)):
            raise ValueError(f"{split}: images must be uint8 (N, H, W, 3), got {images.shape}")
    is_array = kinds.pop()
    num_classes = int(
        info.get("num_classes") or 1 + max(int(labels.max()) for _, labels in splits.values())
    )
    for split, (_, labels) in splits.items():
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"{split}: a label is outside 0 to {num_classes - 1}")
    jpeg = info["jpeg"] if "jpeg" in info else not is_array and _any_jpeg(splits.values())
    return {
        "schema": SCHEMA,
        "name": folder.name,
        **info,
        "num_classes": num_classes,
        "storage": "array" if is_array else "encoded",
        "jpeg": jpeg,
        "counts": {split: len(splits[split][1]) for split in STORED},
        "class_counts": {
            split: np.bincount(splits[split][1], minlength=num_classes).tolist() for split in STORED
        },
    }


def _any_jpeg(splits: Iterable[tuple[Images, np.ndarray]]) -> bool:
    return any(bytes(data[:3]) == JPEG_MAGIC for images, _ in splits for data in images)


def _nbytes(images: Images) -> int:
    known = getattr(images, "nbytes", None)
    return known if known is not None else sum(len(data) for data in images)


def _write_split(folder: Path, split: str, images: Images, labels: np.ndarray) -> list[bytes]:
    """Write one split; return a hash per image, to find images that occur in two splits."""
    write_array(folder / f"{split}_labels.npy", labels.astype(np.int64))
    if isinstance(images, np.ndarray):
        write_array(folder / f"{split}_images.npy", images)
        return [hash_image(image.tobytes()) for image in images]
    hashes, offsets = [], [0]
    with durable(folder / f"{split}_images.bin") as file:
        for data in images:
            file.write(data)
            offsets.append(offsets[-1] + len(data))
            hashes.append(hash_image(data))
    write_array(folder / f"{split}_offsets.npy", np.asarray(offsets, dtype=np.int64))
    return hashes


def _require_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but prepared data."""
    ours = {MANIFEST} | {
        f"{split}_{kind}" for split in STORED
        for kind in ("images.npy", "images.bin", "offsets.npy", "labels.npy")
    }  # fmt: skip
    if not folder.exists():
        return
    for path in sorted(folder.iterdir()):
        if path.name not in ours and not path.name.startswith(".snakemake"):
            raise UserError(
                f"{folder} holds {path.name}, which is not prepared data: "
                "choose another folder or move it away."
            )
