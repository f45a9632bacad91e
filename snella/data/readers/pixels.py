"""A complete look at every image of a listing: decoded once, or named with file and line."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import threading
import unicodedata
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from snella.data.images import FORMATS, Unusable, decode
from snella.data.readers.listing import Line, Listing
from snella.data.readers.text import is_file
from snella.data.storage import hash_image
from snella.errors import UserError

SMALL = 64 * 64
"""Pixels up to which images of one size are stored decoded."""
LARGE = 1 << 24
"""Pixels above which images are decoded one at a time, since several would fill the memory."""
LARGEST = 2**29
"""Bytes of an image file that are read; more would fill the memory."""
_LARGE = threading.Lock()
_TEXTS = (
    (b"{", "a text in JSON (a server's error?), not an image"),
    (b"version https://git-lfs", "a Git LFS pointer, not an image; run `git lfs pull`"),
    (b"<svg", "an SVG drawing, not pixels"),
    (b"<?xml", "an XML file, not an image"),
    (b"<", "a web page, not an image (an expired link?)"),
)


warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # the look says it itself
warnings.filterwarnings("error", message="Image size", module="PIL")  # too many pixels to decode


@dataclass(frozen=True)
class Seen:
    """What a look found: height and width, encoding, hash of the pixels, JPEG's settings."""

    shape: tuple[int, int]
    encoding: str
    pixels: bytes
    jpeg: tuple[int, str] | None = None


def look_at_all(listing: Listing) -> dict[str, Seen]:
    """Decode every image once, by path or name; the first that is missing or bad is named."""
    if listing.images is not None:
        return _look_at_held(listing)
    lines: dict[str, Line] = {}
    for line in (line for part in (*listing.lines.values(), listing.union or ()) for line in part):
        lines.setdefault(line.path, line)
    root = listing.files_root
    missing = [line for line in lines.values() if not is_file(root / line.path)]
    if missing:
        first, more = missing[0], len(missing) - 1
        others = f", and {more} more of {len(lines)}" if more else ""
        raise UserError(
            f"{first.where}: image {first.path[:200]} is missing{others}; "
            f"{_remedy(root, first.path)}."
        )
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda line: _look_at_file(root, line), lines.values())
        return dict(zip(lines, found, strict=True))


def _remedy(root: Path, path: str) -> str:
    """What to do about a missing image: the list may name it otherwise than the disk does."""
    place = PurePosixPath(path)
    for start in range(1, len(place.parts)):
        if is_file(root.joinpath(*place.parts[start:])):
            beginning = "/".join(place.parts[:start])
            return f"without the beginning {beginning}/ it is there: remove that from the list"
    if os.path.lexists(root / path):
        return "it is a link that leads nowhere, or no regular file; copy the image itself there"
    folder = root
    for part in place.parts:
        try:
            names = sorted(p.name for p in folder.iterdir())
        except (OSError, ValueError):
            break
        other = part if part in names else None
        other = other or next((n for n in names if _alike(n) == _alike(part)), None)
        other = other or next((n for n in names if Path(n).stem == place.stem), None)
        if other is None:
            break
        folder /= other
    if folder != root and is_file(folder):
        return f"there is {folder.relative_to(root)}: correct the name in the list"
    for depth in range(len(place.parts)):
        for inner in sorted(root.joinpath(*place.parts[:depth]).glob("*/")):
            if is_file(inner.joinpath(*place.parts[depth:])):
                return f"it lies one folder deeper, in {inner}: move up what is there"
    return "unpack the archive completely"


def _alike(name: str) -> str:
    """A name without case, and with its accents in one form: macOS stores another than lists do."""
    return unicodedata.normalize("NFC", name).casefold()


def _look_at_file(root: Path, line: Line) -> Seen:
    try:
        data = image_bytes(root / line.path)
    except OSError as error:
        raise UserError(f"{line.where}: {line.path} cannot be read: {error.strerror}.") from error
    return look(data, f"{line.where}: image {line.path}")


def image_bytes(path: Path) -> bytes:
    """A picture's bytes; raises ``OSError`` also for what is no regular file, or far too large."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "no regular file")
    if found.st_size > LARGEST:
        raise OSError(errno.EFBIG, f"{found.st_size:,} bytes, so it is no image")
    return path.read_bytes()


def look(data: bytes, where: str) -> Seen:
    """Decode one encoded image completely.

    Raises :class:`~snella.errors.UserError` that begins with ``where``.
    """
    from PIL import Image

    refuse_text(data, where)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            encoding = image.format or "unknown"
            size = image.size
            settings = jpeg_settings(image) if encoding == "JPEG" else None
            image.verify()  # checksums, which decoding does not look at
        if encoding == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
            raise OSError("image file is truncated (its end marker is missing)")
        refuse_deep(data)
        with _LARGE if size[0] * size[1] > LARGE else nullcontext():
            pixels = decode(data)
            height, width = pixels.shape[:2]
            return Seen((height, width), encoding, hash_image(pixels.data), settings)
    except (Unusable, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{where} cannot be used: {_short(error)}; convert it.") from error
    except Exception as error:  # Pillow's decoders raise whatever went wrong inside them
        raise UserError(
            f"{where} cannot be decoded: {why_undecodable(error)}; download or unpack it again."
        ) from error


def why_undecodable(error: Exception) -> str:
    """What Pillow says of a file, in words for one who has the file and not its code."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    reason = _short(error).rstrip(".")
    if "cannot identify image file" in reason:
        return f"no image in a format that is read ({', '.join(FORMATS)}), or damaged"
    return reason


def _short(error: Exception) -> str:
    return str(error).partition(", could be")[0]  # Pillow suspects an attack


def refuse_text(data: bytes, where: str) -> None:
    """Raise :class:`~snella.errors.UserError` for bytes that are no image but a known text."""
    start = data[:512].lstrip().lower()
    if not start:
        raise UserError(f"{where} cannot be decoded: the file is empty; download it again.")
    for mark, meaning in _TEXTS:
        if start.startswith(mark) and not (mark == b"<" and b"<svg" in start):
            raise UserError(f"{where} cannot be decoded: it is {meaning}.")
    if b"<svg" in start and start.startswith(b"<"):
        raise UserError(f"{where} cannot be decoded: it is an SVG drawing, not pixels.")


def orientation(data: bytes) -> int:
    """How an encoded image is to be turned before it is shown, as EXIF says: 1 to 8, 1 upright."""
    from PIL import ExifTags, Image

    with Image.open(io.BytesIO(data)) as image:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def refuse_deep(data: bytes) -> None:
    """Raise :class:`Unusable` for channels of more than 8 bits, which Pillow cuts silently."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        bits = _bits(data, image)
    if bits > 8:
        raise Unusable(f"pixels of more than 8 bits ({bits})")


def _bits(data: bytes, image: object) -> int:
    """Bits per channel as stored."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 24:
        return data[24]
    if data[:2] in (b"P2", b"P3", b"P5", b"P6"):
        maximum = re.sub(rb"#[^\n]*", b"", data[:4096]).split(None, 4)
        return 16 if len(maximum) > 3 and maximum[3].isdigit() and int(maximum[3]) > 255 else 8
    bits = getattr(image, "tag_v2", {}).get(258, 8)  # TIFF's BitsPerSample
    return max(bits) if isinstance(bits, tuple) else int(bits)


def jpeg_settings(image: object) -> tuple[int, str]:
    """Quality as libjpeg counts it (0 where the tables are not libjpeg's), and subsampling."""
    from PIL import JpegImagePlugin

    tables = getattr(image, "quantization", {})
    sampling = JpegImagePlugin.get_sampling(image)  # type: ignore[arg-type]
    name = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}.get(sampling, "other")
    return (_quality(tuple(tables[0])) if 0 in tables else 0), name


# The luminance table of the JPEG standard's annex K, in the order that Pillow reports.
_ANNEX_K = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113,
    92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip


def _quality(table: tuple[int, ...]) -> int:
    total = sum(table)
    for quality in range(1, 101):
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality
        expected = [min(255, max(1, (base * scale + 50) // 100)) for base in _ANNEX_K]
        if sum(expected) == total and sorted(expected) == sorted(table):
            return quality
    return 0


def _look_at_held(listing: Listing) -> dict[str, Seen]:
    """Images that the reader holds: arrays, or encoded bytes read from records."""
    assert listing.images is not None
    seen = {}
    for role, lines in listing.lines.items():
        images = listing.images[role]
        for line, image in zip(lines, images, strict=True):
            if isinstance(image, np.ndarray):
                height, width = image.shape[:2]
                seen[line.path] = Seen((height, width), "array", hash_image(image.tobytes()))
            else:
                seen[line.path] = look(image, f"{line.where}: image {line.path}")
    return seen


def decoded(paths: Sequence[Path], shape: tuple[int, int]) -> np.ndarray:
    """The pixels of image files of one size, uint8 (N, H, W, 3)."""
    images = np.empty((len(paths), *shape, 3), dtype=np.uint8)
    for row, path in zip(images, paths, strict=True):
        row[:] = decode(path.read_bytes())
    return images
