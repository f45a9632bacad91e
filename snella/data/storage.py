"""Arrays written piece by piece, and the hash by which equal images are found."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from snella.files import CHUNK, durable


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file piece by piece.

    numpy.save would copy an array that is not contiguous, and its OSError on a full disk does not
    say that the disk is full.
    """
    rows = max(1, CHUNK * len(array) // max(1, array.nbytes))
    with durable(path) as file:
        header = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(array[:1]))
        np.lib.format.write_array_header_1_0(file, {**header, "shape": array.shape})
        for start in range(0, len(array), rows):
            file.write(np.ascontiguousarray(array[start : start + rows]).data)


def hash_image(data: bytes | memoryview) -> bytes:
    """A short hash by which equal images are found."""
    return hashlib.blake2b(data, digest_size=16).digest()
