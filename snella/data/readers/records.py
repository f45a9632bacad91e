"""TFRecord and ArrayRecord files of `tf.train.Example` messages, read without TensorFlow.

A TFRecord is length (8 bytes), its checksum (4), data, checksum (4). ArrayRecord files need the
package `array_record`. An Example is a protocol buffer: a map from feature names to lists of
bytes, floats or integers, of which the few wire rules used here are written out.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snella.errors import UserError
from snella.protobuf import fields, signed, varints

Feature = list[bytes] | np.ndarray
_POLYNOMIAL = 0x82F63B78


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """The checksum that TFRecord stores (CRC-32C, rotated and shifted)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def tfrecord_spans(file: Path) -> list[tuple[int, int]]:
    """Start and length of each record's data.

    Checks the lengths' checksums; raises :class:`~snella.errors.UserError` for a file cut short.
    """
    spans: list[tuple[int, int]] = []
    size = file.stat().st_size
    if not size:
        raise UserError(f"{file} is empty; copy it again.")
    with open(file, "rb") as stream:
        position = 0
        while position < size:
            header = stream.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
            if len(header) < 12 or position + 16 + length > size:
                raise UserError(f"{file} is cut short after {len(spans)} records; copy it again.")
            if struct.unpack("<I", header[8:])[0] != masked_crc32c(header[:8]):
                raise UserError(f"{file} is damaged at record {len(spans)}, or no TFRecord file.")
            spans.append((position + 12, length))
            position += 16 + length
            stream.seek(position)
    return spans


class Records(Sequence[bytes]):
    """The records of several shards, one after the other, read at access."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        self._index: list[tuple[Path, int, int]] = []
        self._readers: dict[Path, Any] = {}
        for shard in self.shards:
            if ".array_record" in shard.name:
                reader = _array_record(shard)
                self._index += [(shard, i, -1) for i in range(reader.num_records())]
            else:
                self._index += [(shard, start, n) for start, n in tfrecord_spans(shard)]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        shard, start, length = self._index[range(len(self))[index]]
        if length < 0:
            if shard not in self._readers:
                self._readers[shard] = _array_record(shard)
            return self._readers[shard].read([start])[0]
        with open(shard, "rb") as stream:
            stream.seek(start)
            return stream.read(length)


class Column(Sequence[bytes]):
    """The encoded images of some records, read at access."""

    def __init__(self, records: Records, rows: Sequence[int]) -> None:
        self.records, self.rows = records, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return bytes(parse_example(self.records[self.rows[index]])["image"][0])


def _array_record(shard: Path) -> Any:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise UserError(
            f"{shard} is an ArrayRecord file; pip install array_record reads it without TensorFlow."
        ) from None
    return ArrayRecordReader(str(shard))


def parse_example(data: bytes) -> dict[str, Feature]:
    """The features of a serialised `tf.train.Example`."""
    features: dict[str, Feature] = {}
    for field, payload in fields(data):
        if field != 1:
            continue
        for inner, entry in fields(payload):
            if inner != 1:
                continue
            pair = dict(fields(entry))
            features[bytes(pair[1]).decode()] = _feature(pair.get(2, b""))
    return features


def _feature(data: bytes) -> Feature:
    for kind, payload in fields(data):
        values = list(fields(payload, numbers=True))
        if kind == 1:
            return [bytes(value) for _, value in values]
        if kind == 2:
            raw = b"".join(value if isinstance(value, bytes) else b"" for _, value in values)
            return np.frombuffer(raw, dtype="<f4")
        if kind == 3:
            numbers: list[int] = []
            for _, value in values:
                numbers += varints(value) if isinstance(value, bytes) else [value]
            return np.asarray([signed(n) for n in numbers], dtype=np.int64)
    return []
