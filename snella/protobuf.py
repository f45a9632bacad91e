"""The wire format of protocol buffers, as much of it as records and ONNX files need.

A message is a sequence of fields: a number with a wire type, then a varint, 4 or 8 bytes, or a
length and that many bytes (https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from snella.errors import UserError


def fields(data: bytes, numbers: bool = False) -> Iterator[tuple[int, Any]]:
    """Field numbers and payloads of a message: bytes; with ``numbers`` also varints and floats.

    Raises :class:`~snella.errors.UserError` if ``data`` is no message or is cut short.
    """
    position = 0
    while position < len(data):
        key, position = varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 2:
            length, position = varint(data, position)
            if position + length > len(data):
                raise UserError("A protocol buffer message is cut short; get the file again.")
            yield number, data[position : position + length]
            position += length
        elif wire == 0:
            value, position = varint(data, position)
            if numbers:
                yield number, value
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
            if numbers:
                yield number, data[position : position + length]
            position += length
        else:
            raise UserError(f"This is no protocol buffer message (wire type {wire}).")


def varint(data: bytes, position: int) -> tuple[int, int]:
    """An unsigned integer and the position after it."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise UserError("A protocol buffer message is cut short; get the file again.")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7


def varints(data: bytes) -> list[int]:
    """A packed list of unsigned integers."""
    values, position = [], 0
    while position < len(data):
        value, position = varint(data, position)
        values.append(value)
    return values


def signed(value: int) -> int:
    """The int64 that an unsigned varint stands for."""
    return value - (1 << 64) if value >= 1 << 63 else value
