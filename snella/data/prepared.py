"""Prepared data sets: what every run reads, written once, checked, and sealed.

``data/prepared/<dataset>/`` holds named columns per split and ``manifest.json``. Images of one
small size are an array ``<split>_<column>.npy``; others keep their original encoded bytes in one
file ``<split>_<column>.bin`` with an index ``<split>_<column>_offsets.npy``. What scoring alone may
see of the test split lies under ``sealed/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snella.data.images import (
    JPEG_MAGIC,
    ArrayImages,
    EncodedBytes,
    EncodedImages,
    JoinedImages,
)
from snella.data.storage import hash_image, write_array
from snella.errors import UserError, unknown
from snella.files import atomic_folder, digest_file, digest_files, digest_json, durable

SCHEMA = 2
MANIFEST = "manifest.json"
OWN = "manifest_digest"
"""The manifest's key for the digest of all else in it."""
SEALED = "sealed"
STORED = ("train", "val", "test")
ROLES = ("train", "val", "trainval", "test")
SMALL_BYTES = 1 << 29
"""Up to this size every opening reads all bytes and compares them with the manifest."""

Column = np.ndarray | Sequence[bytes]
"""An array with one row per example, or the bytes of one file per example."""
Splits = Mapping[str, Mapping[str, Column]]


class SealedTargets(Exception):
    """Something other than a scorer asked for a sealed column of the test split."""


def write_prepared(
    folder: Path, splits: Splits, *, sealed: Sequence[str] = ("label",), info: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a prepared data set and return its manifest.

    The folder appears complete or not at all, replaces an older one, and has the same digest
    whenever the same data are prepared.

    Args:
        folder: where to; its name is the data set's unless ``info`` has a name.
        splits: for each of train, test and, where there is one, val, the columns by name.
            Images are uint8 (N, H, W, 3) or encoded files.
        sealed: columns of the test split that scorers alone may open.
        info: goes into the manifest as it is (source, licence, class_names, warnings, ...).
            Absent, ``jpeg`` (whether the pixels went through JPEG) is true if any of the encoded
            files is one.

    Raises:
        UserError: no space left, or the folder holds other files than prepared data.
        ValueError: splits that break this contract.
    """
    manifest = _describe(folder, splits, sealed, info)
    needed = sum(_nbytes(column) for columns in splits.values() for column in columns.values())
    _require_replaceable(folder)
    purpose = f"preparing {manifest['name']!r}"
    with atomic_folder(folder, bytes_needed=needed, purpose=purpose) as partial:
        hashes: dict[str, list[bytes]] = {}
        for split, columns in splits.items():
            for name, column in columns.items():
                place = partial / SEALED if split == "test" and name in sealed else partial
                place.mkdir(exist_ok=True)
                found = _write_column(place, f"{split}_{name}", column)
                if name == "image":
                    hashes[split] = found
        if "image" in manifest["columns"]:
            manifest |= _repetitions(hashes)
        files = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
        manifest["files"] = {name: (partial / name).stat().st_size for name in files}
        manifest["sha256"] = {name: digest_file(partial / name) for name in files}
        manifest["digest"] = digest_files(partial, files)
        own = digest_json(json.loads(json.dumps(manifest)))  # as it is read
        text = json.dumps(manifest | {OWN: own}, indent=2, ensure_ascii=False) + "\n"
        (partial / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


@dataclass(frozen=True)
class Prepared:
    """A prepared data set, opened read-only; nothing is read before it is asked for.

    With ``scored="val"`` the validation split plays the test split, whose own examples cannot be
    reached: what a search of settings may see.
    """

    folder: Path
    manifest: dict[str, Any]
    scored: str = "test"

    @classmethod
    def open(cls, folder: Path, scored: str = "test") -> Prepared:
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
        except (ValueError, OSError):
            raise UserError(f"{folder / MANIFEST} is damaged: {again}.") from None
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise UserError(
                f"The prepared data in {folder} have schema {schema}, "
                f"this version reads schema {SCHEMA}: {again}."
            )
        if manifest.pop(OWN, None) not in (None, digest_json(manifest)):
            raise UserError(f"{folder / MANIFEST} has changed since it was written: {again}.")
        if scored not in manifest["counts"]:
            raise UserError(
                f"Data set {manifest['name']!r} has no {scored} split, so that no settings can be "
                "searched on it; name others under `search: {datasets: [...]}` of the suite."
            )
        found = cls(folder, manifest, scored)
        for name, size in found.files.items():
            path = folder / name
            length = path.stat().st_size if path.is_file() else None
            if length != size:
                state = "missing" if length is None else f"{length} bytes long instead of {size}"
                raise UserError(f"{path} is {state}: {again}.")
        return found

    @property
    def name(self) -> str:
        """The data set's name."""
        return str(self.manifest["name"])

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without an image in some split."""
        return int(self.manifest["num_classes"])

    @property
    def jpeg(self) -> bool:
        """Whether the pixels went through JPEG before they were prepared."""
        return bool(self.manifest["jpeg"])

    @property
    def digest(self) -> str:
        """SHA-256 over all columns, as recorded when they were written."""
        return str(self.manifest["digest"])

    @property
    def files(self) -> dict[str, int]:
        """Sizes in bytes of the files that may be read, by name."""
        sizes: dict[str, int] = self.manifest["files"]
        if self.scored == "test":
            return sizes
        return {n: size for n, size in sizes.items() if not Path(n).name.startswith("test_")}

    def __len__(self) -> int:
        """Number of examples in all splits together."""
        return sum(self.manifest["counts"].values())

    def has(self, split: str) -> bool:
        """Whether a split, or both parts of trainval, exist; train alone is a trainval too."""
        return bool(self._parts(split))

    def size(self, split: str) -> int:
        """Number of examples in a split."""
        return sum(self.manifest["counts"][part] for part in self._require(split))

    def image(self, split: str, index: int) -> np.ndarray:
        """One image as stored, RGB uint8 (H, W, 3)."""
        return self.images(split)[index]

    def images(self, split: str, column: str = "image") -> Sequence[np.ndarray]:
        """All images of a split, lazily: item ``i`` is RGB uint8 (H, W, 3).

        Raises:
            SealedTargets: for a sealed column of "test".
        """
        self._refuse_sealed(split, column)
        parts = [self._stored_images(part, column) for part in self._require(split)]
        return parts[0] if len(parts) == 1 else JoinedImages(parts)

    def column(self, split: str, name: str) -> np.ndarray:
        """An array column of a split, (N, ...).

        Raises:
            SealedTargets: for a sealed column of "test", which belongs to scorers alone.
        """
        self._refuse_sealed(split, name)
        return np.concatenate([self._load(part, name) for part in self._require(split)])

    def encoded(self, split: str, name: str) -> Sequence[bytes]:
        """The original bytes of a column of files, one item per example, lazily.

        Raises:
            SealedTargets: for a sealed column of "test".
        """
        self._refuse_sealed(split, name)
        parts = [self._stored_images(part, name) for part in self._require(split)]
        return EncodedBytes(parts)

    def labels(self, split: str) -> np.ndarray:
        """The column "label" of a training or validation split, int64 (N,)."""
        return self.column(split, "label")

    def targets(self, split: str, name: str) -> Any:
        """A column for scorers, sealed or not: an array (N, ...), or lazily decoded images."""
        parts = self._require(split)
        if self.manifest["columns"][name] == "encoded":
            images = [self._stored_images(part, name) for part in parts]
            return images[0] if len(images) == 1 else JoinedImages(images)
        return np.concatenate([self._load(part, name) for part in parts])

    def verify(self) -> None:
        """Compare every byte with the manifest, or a large set once per change of its files.

        Raises:
            UserError: some byte has changed since the data set was prepared.
        """
        stamp = {name: _stamp(self.folder / name) for name in self.files}
        kind = "verified" if self.scored == "test" else f"{self.scored}-verified"
        mark = self.folder.with_name(f".{self.folder.name}.{kind}")
        large = sum(self.files.values()) > SMALL_BYTES
        expected = json.dumps([self.digest, stamp], sort_keys=True)
        if large and mark.is_file() and mark.read_text() == expected:
            return
        for name in self.files:
            if digest_file(self.folder / name) != self.manifest["sha256"][name]:
                raise UserError(
                    f"{self.folder / name} has changed since it was prepared: "
                    f"run `snella prepare {self.folder.name}`."
                )
        if large:
            mark.write_text(expected)

    def _refuse_sealed(self, split: str, name: str) -> None:
        if split == "test" and name in self.manifest["sealed"]:
            raise SealedTargets(f"The test {name}s of {self.name!r} are for the scorer only.")

    def _parts(self, split: str) -> tuple[str, ...]:
        if split not in ROLES:
            raise unknown("split", split, ROLES)
        if split == "train" and self.manifest.get("only_trainval"):
            return ()  # the validation images are among them and cannot be told apart
        parts = ("train", "val") if split == "trainval" else (split,)
        if split == "test":
            parts = (self.scored,)
        elif self.scored in parts:
            return ()
        return tuple(part for part in parts if part in self.manifest["counts"])

    def _require(self, split: str) -> tuple[str, ...]:
        parts = self._parts(split)
        if not parts:
            raise UserError(
                f"Data set {self.name!r} has no {split} split; choose a protocol that does not "
                "need it, or prepare data that have one."
            )
        return parts

    def _place(self, split: str, name: str) -> Path:
        hidden = split == "test" and name in self.manifest["sealed"]
        return self.folder / SEALED if hidden else self.folder

    def _load(self, split: str, name: str) -> np.ndarray:
        path = self._place(split, name) / f"{split}_{name}.npy"
        column: np.ndarray = np.load(path, allow_pickle=False)
        return column

    def _stored_images(self, split: str, name: str) -> ArrayImages | EncodedImages:
        count = self.manifest["counts"][split]
        place = self._place(split, name)
        if self.manifest["columns"][name] == "array":
            return ArrayImages(place / f"{split}_{name}.npy", count)
        return EncodedImages(
            place / f"{split}_{name}.bin", place / f"{split}_{name}_offsets.npy", count
        )


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _describe(
    folder: Path, splits: Splits, sealed: Sequence[str], info: Mapping[str, Any]
) -> dict[str, Any]:
    """Check the splits and say in the manifest what they hold."""
    if not {"train", "test"} <= set(splits) <= set(STORED):
        raise ValueError(f"splits must be train, test and possibly val, got {tuple(splits)}")
    names = [name for name in splits["train"]]
    kinds: dict[str, str] = {}
    counts: dict[str, int] = {}
    for split, columns in splits.items():
        if set(columns) != set(names):
            raise ValueError(f"{split} has columns {sorted(columns)}, train has {sorted(names)}")
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1 or not min(lengths.values()):
            raise ValueError(f"{split}: columns of lengths {lengths}")
        counts[split] = next(iter(lengths.values()))
        for name, column in columns.items():
            kind = "array" if isinstance(column, np.ndarray) else "encoded"
            if kinds.setdefault(name, kind) != kind:
                raise ValueError(f"column {name} is an array in one split and files in another")
            _check_image(split, name, column)
    files = [c for columns in splits.values() for c in columns.values() if not _is_array(c)]
    return {
        "schema": SCHEMA,
        "name": folder.name,
        **info,
        "jpeg": info["jpeg"] if "jpeg" in info else _any_jpeg(files),
        "counts": counts,
        "columns": kinds,
        "sealed": [name for name in sealed if name in kinds],
    }


def _check_image(split: str, name: str, column: Column) -> None:
    if name != "image" or not isinstance(column, np.ndarray):
        return
    if column.dtype != np.uint8 or column.shape[3:] != (3,):
        raise ValueError(f"{split}: images must be uint8 (N, H, W, 3), got {column.shape}")


def _is_array(column: Column) -> bool:
    return isinstance(column, np.ndarray)


def _any_jpeg(columns: Iterable[Column]) -> bool:
    return any(bytes(data[:3]) == JPEG_MAGIC for column in columns for data in column)


def _nbytes(column: Column) -> int:
    known = getattr(column, "nbytes", None)
    return int(known) if known is not None else sum(len(data) for data in column)


def _repetitions(hashes: Mapping[str, list[bytes]]) -> dict[str, int]:
    """How many test images training sees too."""
    training = {h for split, found in hashes.items() if split != "test" for h in found}
    return {"test_images_also_in_trainval": sum(h in training for h in hashes["test"])}


def _write_column(folder: Path, stem: str, column: Column) -> list[bytes]:
    """Write one column; return a hash per example, to find images that occur in two splits."""
    if isinstance(column, np.ndarray):
        write_array(folder / f"{stem}.npy", column)
        return [hash_image(row.tobytes()) for row in column] if column.ndim > 2 else []
    hashes, offsets = [], [0]
    with durable(folder / f"{stem}.bin") as file:
        for data in column:
            file.write(data)
            offsets.append(offsets[-1] + len(data))
            hashes.append(hash_image(data))
    write_array(folder / f"{stem}_offsets.npy", np.asarray(offsets, dtype=np.int64))
    return hashes


def _require_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but prepared data."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder or move it away.")
    for path in sorted(folder.iterdir()):
        ours = path.name in (MANIFEST, SEALED) or path.name.startswith(
            tuple(f"{split}_" for split in (*STORED, "train800", "val200"))
        )
        if not ours and not path.name.startswith(".snakemake"):
            raise UserError(
                f"{folder} holds {path.name}, which is not prepared data: "
                "choose another folder or move it away."
            )
