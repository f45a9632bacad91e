"""A folder of images and masks: `images/NAME.*` and `masks/NAME.*`, one mask per image.

Kvasir-SEG, CVC-ClinicDB, ETIS and CVC-300 are distributed so (or renamed so with two links). The
JSON of bounding boxes that comes with Kvasir-SEG is not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from snella.data.images import decode
from snella.data.readers.pixels import (
    image_bytes,
    orientation,
    refuse_deep,
    refuse_text,
    why_undecodable,
)
from snella.data.readers.text import read_text
from snella.data.storage import hash_image
from snella.errors import UserError
from snella.tasks.segmentation.duplicates import perceptual_hash
from snella.tasks.segmentation.masks import Mask, encode_mask, read_mask
from snella.validation import shown

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
DECODERS = 4


@dataclass(frozen=True)
class Pair:
    """One image with its mask, read and checked."""

    name: str
    path: Path
    size: tuple[int, int]
    mask: bytes
    """PNG of one bit."""
    pixels: bytes
    """Hash of the decoded pixels: equal images have equal hashes."""
    hash: int
    """Perceptual hash: near images have near hashes."""


def pictures(folder: Path) -> dict[str, Path]:
    """Picture files of ``folder`` by stem; raises for a missing folder or two files of one stem."""
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}; a data set needs images/ and masks/{_elsewhere(folder)}."
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(f"{path} and {found[path.stem].name} have the same name; remove one.")
        found[path.stem] = path
    return found


def _elsewhere(folder: Path) -> str:
    """Where the folder lies instead, one deeper, as archives unpack, or what its place holds."""
    inner = sorted(p for p in folder.parent.glob(f"*/{folder.name}") if p.is_dir())
    if inner:
        return f" (there is {inner[0]}: set `path: {inner[0].parent}`)"
    names = sorted(p.name for p in folder.parent.glob("*/"))
    return f" (there are {', '.join(names[:4])}: rename or link them)" if names else ""


def read_pairs(root: Path, allow_empty: bool = False) -> dict[str, Pair]:
    """All images of ``root`` with their masks, by name.

    Raises :class:`~snella.errors.UserError` for the first thing wrong: no image, an image without
    mask or a mask without image, sizes that differ, or a picture that cannot be read.
    """
    images, masks = pictures(root / "images"), pictures(root / "masks")
    if not images:
        inner = sorted((root / "images").glob("*/"))
        remedy = f"; move up what {inner[0]} holds" if inner else "; put the images there"
        raise UserError(
            f"{root / 'images'} holds no picture ({', '.join(sorted(SUFFIXES))}){remedy}."
        )
    for lone, other, where in ((images, masks, "mask"), (masks, images, "image")):
        missing = [path for name, path in lone.items() if name not in other]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(
                f"{missing[0]} has no {where}{more}; {_remedy(root, missing[0], where)}."
            )
    with ThreadPoolExecutor(DECODERS) as pool:
        pairs = pool.map(lambda name: _read(name, images[name], masks[name], allow_empty), images)
        return {pair.name: pair for pair in pairs}


def _remedy(root: Path, path: Path, where: str) -> str:
    """What to do about a picture without its other half, which may be there by another name."""
    like = re.compile(rf"{re.escape(path.stem)}[^0-9a-z].*", re.IGNORECASE)
    for other in sorted((root / f"{where}s").iterdir()):
        if like.fullmatch(other.name):
            return f"there is {other}: give it the same name, as JPEG or PNG"
    return "add or remove it"


def _read(name: str, image: Path, mask: Path, allow_empty: bool) -> Pair:
    data = _bytes(image, "image")
    try:
        refuse_deep(data)
        pixels = decode(data)
    except Exception as error:  # Pillow's decoders raise whatever went wrong inside them
        raise UserError(
            f"{image}: the image cannot be decoded: {why_undecodable(error)}; replace or remove it."
        ) from error
    truth_data = _bytes(mask, "mask")
    truth = _mask(mask, allow_empty)
    turned = orientation(data), orientation(truth_data)
    if turned[0] != turned[1]:
        raise UserError(
            f"{image} and its mask are stored in different orientations (EXIF {turned[0]} and "
            f"{turned[1]}), so one may not lie over the other; save both upright, without EXIF."
        )
    if truth.shape != pixels.shape[:2]:
        raise UserError(
            f"{mask} is {truth.shape[1]} x {truth.shape[0]} pixels, its image "
            f"{pixels.shape[1]} x {pixels.shape[0]}; they must be equal."
        )
    return Pair(
        name, image, truth.shape, encode_mask(truth), hash_image(pixels.tobytes()),
        perceptual_hash(pixels),
    )  # fmt: skip


def _mask(path: Path, allow_empty: bool) -> Mask:
    """A mask; what Pillow says of one that it cannot decode is put into words."""
    try:
        return read_mask(path, allow_empty)
    except UserError as error:
        if not isinstance(error.__cause__, Exception):
            raise
        reason = why_undecodable(error.__cause__)
        raise UserError(
            f"{path}: the mask cannot be decoded: {reason}; replace or remove it."
        ) from error


def _bytes(path: Path, what: str) -> bytes:
    """A picture's bytes; what cannot be read, or is a text, is named."""
    try:
        data = image_bytes(path)
    except OSError as error:
        raise UserError(
            f"{path}: the {what} cannot be read: {error.strerror}; replace or remove it."
        ) from error
    refuse_text(data, f"{path}: the {what}")
    return data


def read_list(file: Path, known: Sequence[str]) -> list[str]:
    """Names of a list file, one a line (with or without ending); raises for a name not known."""
    lines = read_text(file, "correct `options:` of the data set").splitlines()
    have, names = set(known), []
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry:
            continue
        name = entry if entry in have else Path(entry).stem
        if name not in have:
            raise UserError(f"{file}:{number}: there is no image {shown(entry)}; correct the list.")
        if name in names:
            raise UserError(
                f"{file}:{number}: {shown(entry)} stands in the list twice; remove one."
            )
        names.append(name)
    if not names:
        raise UserError(f"List {file} is empty; write a name a line, or leave the list out.")
    return names
