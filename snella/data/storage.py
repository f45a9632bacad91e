"""Files that are written completely or not at all, and the digest over them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

CHUNK = 1 << 24


@contextlib.contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing and have it on the disk at the end."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk or quota only here


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


def digest_files(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over the names and contents of files, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(names):
        sha.update(f"{name}\n".encode())
        with (folder / name).open("rb") as file:
            while chunk := file.read(CHUNK):
                sha.update(chunk)
    return sha.hexdigest()


def hash_image(data: bytes) -> bytes:
    """A short hash by which equal images are found."""
    return hashlib.blake2b(data, digest_size=16).digest()


def swap(new: Path, folder: Path, old: Path) -> None:
    """Put `new` in place of `folder`; `old` is where the replaced one lies for a moment.

    A folder with content cannot be replaced in one step: killed between the two renames, this
    leaves no folder, which the next preparation mends.
    """
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
