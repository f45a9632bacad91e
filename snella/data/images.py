"""Image sequences: lazily opened collections of encoded files or decoded pixels.

Everything here opens its files at first access and pickles as paths, so a sequence can be handed
to the workers of a data loader without copying pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

JPEG_MAGIC = b"\xff\xd8\xff"
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "WEBP", "TIFF")
"""What is read: formats whose depth is known before decoding, and that start no other program."""
MAX_PIXELS = 50_000_000
"""Pixels of one image; the largest of the papers' data sets, retinopathy, has 18 million."""
# Pillow clips deeper pixels to 0..255 without a word when it converts them to RGB.
DEEP_MODES = ("I", "F")


class Unusable(ValueError):
    """An intact image that is not used as it is; the message says why."""


def decode(data: bytes) -> np.ndarray:
    """Decode one encoded image to RGB, uint8 (H, W, 3).

    As in the published loaders, transparency is dropped and the EXIF orientation is not applied.

    Raises:
        Unusable: the pixels have more than 8 bits, or there are too many.
        OSError and others from Pillow: the image is truncated or not an image.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.mode.startswith(DEEP_MODES):
            raise Unusable(f"pixels of more than 8 bits (mode {image.mode})")
        if image.width * image.height > MAX_PIXELS:
            raise Unusable(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        return np.array(image.convert("RGB"))


class _Lazy(Sequence[Any]):
    """A sequence of known length; subclasses give item `index`, 0 <= index < length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._item(i) for i in range(self._length)[index]]
        return self._item(range(self._length)[index])

    def _item(self, index: int) -> Any:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Drop what was opened: a memory map would be pickled as a copy of the whole file."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class EncodedFiles(_Lazy):
    """The encoded bytes of files on disk, read at access."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(len(paths))
        self.paths = list(paths)

    def _item(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    @property
    def nbytes(self) -> int:
        """Bytes of all files together, without reading them."""
        return sum(path.stat().st_size for path in self.paths)


class ArrayImages(_Lazy):
    """Decoded images of one size in one memory-mapped .npy file, uint8 (N, H, W, 3)."""

    def __init__(self, path: Path, length: int) -> None:
        super().__init__(length)
        self.path = path

    def _item(self, index: int) -> np.ndarray:
        if not hasattr(self, "_open_array"):
            self._open_array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return np.asarray(self._open_array[index])

    def array(self) -> np.ndarray:
        """All images as a memory map, uint8 (N, H, W, 3).

        The map is copy-on-write: torch would crash the process on writing to a read-only one,
        and here a write stays in memory and never reaches the file.
        """
        images: np.ndarray = np.load(self.path, mmap_mode="c", allow_pickle=False)
        return images


class EncodedImages(_Lazy):
    """Encoded images in one indexed file, decoded to uint8 (H, W, 3) at access.

    Image `i` is `blob[offsets[i]:offsets[i + 1]]`.
    """

    def __init__(self, blob: Path, offsets: Path, length: int) -> None:
        super().__init__(length)
        self.blob, self.offsets = blob, offsets

    def encoded(self, index: int) -> bytes:
        """The original bytes of one file."""
        if not hasattr(self, "_open_blob"):
            self._open_offsets = np.load(self.offsets, allow_pickle=False)
            self._open_blob = np.memmap(self.blob, dtype=np.uint8, mode="r")
        start, stop = self._open_offsets[index : index + 2]
        return self._open_blob[start:stop].tobytes()

    def _item(self, index: int) -> np.ndarray:
        return decode(self.encoded(index))


class JoinedImages(_Lazy):
    """Several sequences one after the other, nothing copied."""

    def __init__(self, parts: Sequence[Sequence[np.ndarray]]) -> None:
        super().__init__(sum(len(part) for part in parts))
        self.parts = list(parts)

    def _item(self, index: int) -> np.ndarray:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


class EncodedBytes(_Lazy):
    """The original bytes behind lazily decoded images, one item per file."""

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__(sum(len(part) for part in parts))
        self.parts = list(parts)

    def _item(self, index: int) -> bytes:
        for part in self.parts:
            if index < len(part):
                return bytes(part.encoded(index))
            index -= len(part)
        raise IndexError(index)
