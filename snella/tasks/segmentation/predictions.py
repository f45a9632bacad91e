"""Predictions as files: one compressed record per image, appended in order, resumable.

A folder holds `index.json` (what was predicted, by which model) and `masks.bin`, whose records are
a header (length and CRC-32 of what follows) and the compressed packed bits of the mask at the
image's original size and at the model's, and the probability map at the decoder's resolution in
256 levels where it was asked for. A record that a kill cut short is dropped on resume, and so are
all records of another model.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from snella.errors import UserError

INDEX, RECORDS = "index.json", "masks.bin"
_HEADER = struct.Struct("<II")

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Index:
    """What a folder of predictions holds."""

    count: int
    model_size: int
    map_size: int
    """Side of the probability map, 0 where none is stored."""
    fingerprint: str
    """Of the model and the images: predictions of another model are not resumed."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image."""

    mask: Mask
    """bool (H, W), at the image's original size."""
    model_mask: Mask
    """bool (S, S), at the size that the model saw."""
    probabilities: NDArray[np.uint8] | None
    """uint8 (h, w), probability times 255, at the decoder's resolution."""


class Writer:
    """Appends predictions; ``done`` of them were there when it was opened."""

    def __init__(self, folder: Path, index: Index) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.index, self._path = index, folder / RECORDS
        description = folder / INDEX
        text = json.dumps(asdict(index), indent=1) + "\n"
        same = description.is_file() and description.read_text(encoding="utf-8") == text
        if not same:
            self._path.unlink(missing_ok=True)
            description.write_text(text, encoding="utf-8")
        self._path.touch()
        whole = [end for end, _ in _records(self._path)]
        self.done = min(len(whole), index.count)
        self._file = self._path.open("r+b")
        self._file.truncate(whole[self.done - 1] if self.done else 0)
        self._file.seek(0, 2)

    def append(self, mask: Mask, model_mask: Mask, probabilities: NDArray[np.uint8] | None) -> None:
        """Write one image's prediction through to the file."""
        parts = [np.packbits(mask), np.packbits(model_mask)]
        if self.index.map_size:
            assert probabilities is not None
            parts.append(probabilities)
        data = zlib.compress(b"".join(part.tobytes() for part in parts), 1)
        self._file.write(_HEADER.pack(len(data), zlib.crc32(data)) + data)
        self._file.flush()
        self.done += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each whole record's end in the file, and its content; stops at the first that is not."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while True:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return
            length, checksum = _HEADER.unpack(header)
            data = file.read(length)
            if len(data) < length or zlib.crc32(data) != checksum:
                return
            yield file.tell(), data


def read_index(folder: Path) -> Index:
    """What the predictions in ``folder`` are; raises ``UserError`` where there are none."""
    try:
        return Index(**json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        raise UserError(f"{folder} holds no predictions; run the training again.") from None


def read_predictions(folder: Path, sizes: Sequence[Sequence[int]]) -> Iterator[Prediction]:
    """The predictions of ``folder`` in order, given the images' sizes (H, W).

    Raises :class:`~snella.errors.UserError` if not every image is predicted.
    """
    index, found = read_index(folder), 0
    for (height, width), (_, data) in zip(sizes, _records(folder / RECORDS), strict=False):
        found += 1
        yield _unpack(zlib.decompress(data), int(height), int(width), index)
    if found != len(sizes):
        raise UserError(
            f"{folder} has predictions for {found} of {len(sizes)} images; run it again to resume."
        )


def _unpack(data: bytes, height: int, width: int, index: Index) -> Prediction:
    ends = np.cumsum([_bytes(height * width), _bytes(index.model_size**2), index.map_size**2])
    values = np.frombuffer(data, dtype=np.uint8)
    if len(values) != ends[-1]:
        raise UserError(
            f"A prediction has {len(values)} bytes, {ends[-1]} are needed; predict again."
        )
    side = index.model_size
    return Prediction(
        _bits(values[: ends[0]], height, width),
        _bits(values[ends[0] : ends[1]], side, side),
        values[ends[1] :].reshape(index.map_size, index.map_size) if index.map_size else None,
    )


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _bits(packed: NDArray[np.uint8], height: int, width: int) -> Mask:
    return np.unpackbits(packed, count=height * width).reshape(height, width).astype(bool)
