"""A split's images at a protocol's resolution: transformed once, then read as a memory map.

Decoding and resizing are the same for every run, epoch and row. What they give lies beside the
prepared folder, ``.<data set>.pixels/<digest>.npy``, uint8 (N, 3, S, S); the digest is of the data,
the transform and the libraries that decode and resize. The first run to need it writes it, whole or
not at all, while others wait.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from snella.data.epoch import epoch_order, lazy_images
from snella.data.prepared import Prepared
from snella.data.transforms import Split, Transform, open_split
from snella.errors import UserError
from snella.files import atomic, digest_json, try_lock

SMALL_BYTES = 1 << 25
"""Pixels of a split that are made anew by each run: that takes no time."""
LARGE_BYTES = 1 << 34
"""Pixels of a split beyond which each run decodes for itself."""
SPARE_BYTES = 1 << 30
BATCH = 64
POLL_SECONDS = 0.5


def open_images(data: Prepared, split: str, transform: Transform) -> Tensor | Split:
    """A split's images as :func:`~snella.data.transforms.open_split` gives them, or mapped.

    What is random, small, huge, or would not fit on the disk is not kept.
    """
    images = data.images(split)
    size = 3 * transform.image_size**2 * len(images)
    kept = transform.deterministic and not transform.identity
    if not kept or not SMALL_BYTES <= size <= LARGE_BYTES:
        return open_split(images, transform)
    file = kept_file(data, split, transform)
    try:
        file.parent.mkdir(exist_ok=True)
        if not file.is_file() and shutil.disk_usage(file.parent).free < size + SPARE_BYTES:
            return open_split(images, transform)
        return _mapped(file, images, transform)
    except (OSError, UserError):  # a folder that only others may write, a disk that is full
        return open_split(images, transform)


def kept_folder(prepared: Path) -> Path:
    """Where the resized images of a prepared folder lie."""
    return prepared.with_name(f".{prepared.name}.pixels")


def kept_file(data: Prepared, split: str, transform: Transform) -> Path:
    """The file of one split under one transform."""
    libraries = [version(name) for name in ("pillow", "torchvision")]
    digest = digest_json([data.digest, split, asdict(transform), libraries])
    return kept_folder(data.folder) / f"{digest[:20]}.npy"


def _mapped(file: Path, images: Sequence[np.ndarray], transform: Transform) -> Tensor:
    """The file, written if it is not there; of several processes one writes, the others wait."""
    with file.with_suffix(".lock").open("w") as lock:
        while (found := _read(file, len(images))) is None:
            if try_lock(lock) is False:
                time.sleep(POLL_SECONDS)
            elif _read(file, len(images)) is None:
                _write(file, images, transform)
    return found


def _read(file: Path, count: int) -> Tensor | None:
    """The images of a whole file; copy-on-write, so that no write reaches it."""
    try:
        array = np.load(file, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # not there, or cut short when a machine crashed
        return None
    return torch.from_numpy(array) if len(array) == count else None


def _write(file: Path, images: Sequence[np.ndarray], transform: Transform) -> None:
    size = transform.image_size
    order = epoch_order(len(images), None).split(BATCH)
    with atomic(file) as temporary:
        out = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.uint8, shape=(len(images), 3, size, size)
        )
        batches = lazy_images(Split(images, transform), order, None, None)
        for index, batch in zip(order, batches, strict=True):
            out[index[0] : index[-1] + 1] = batch.numpy()
        out.flush()
