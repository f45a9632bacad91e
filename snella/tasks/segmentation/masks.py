"""Masks as files: reading what data sets distribute, and our own encoding (PNG of one bit).

The rule that makes a mask binary: a grey value above 128 of 255 is foreground, as in the released
code of GPS; a mask that holds only 0 and 1 is taken as it is. Masks that went through JPEG have a
rim of values in between, so up to `GREY` of the pixels may be grey.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from snella.errors import UserError

FOREGROUND = 128
GREY = 0.1
"""Share of pixels between 32 and 223 above which a picture is no mask."""
COLOUR = 24
"""Difference of a pixel's channels above which it is coloured (JPEG leaves a few levels)."""

Mask = NDArray[np.bool_]


def read_mask(path: Path, allow_empty: bool = False) -> Mask:
    """A mask file as bool (H, W).

    Raises :class:`~snella.errors.UserError` for a file that is no picture, has 16 bits, colours or
    transparency, is not binary by the rule above, has three values, or is empty (unless allowed).
    """
    try:
        with Image.open(path) as image:
            image.load()
            grey = _grey(path, image)
            values = np.unique(grey).tolist()
            if len(values) == 3 and image.format != "JPEG":
                raise UserError(
                    f"{path}: the mask holds three values ({', '.join(map(str, values))}), so one "
                    "is a second class or an uncertain rim; save foreground as 255 and background "
                    "as 0."
                )
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever went wrong inside them
        raise UserError(f"{path}: the mask cannot be decoded: {error}.") from error
    mask = grey > 0 if grey.max(initial=0) <= 1 else grey > FOREGROUND
    between = float(((grey > 32) & (grey < 224)).mean())
    if grey.max(initial=0) > 1 and between > GREY:
        raise UserError(
            f"{path}: {between:.0%} of the pixels are neither black nor white, so this is no "
            "binary mask; save foreground as 255 and background as 0."
        )
    if not mask.any() and grey.max(initial=0) > 1:
        raise UserError(
            f"{path}: the largest value is {grey.max()}, and only values above {FOREGROUND} are "
            "foreground; save foreground as 255 and background as 0."
        )
    if not mask.any() and not allow_empty:
        raise UserError(
            f"{path}: the mask is empty; remove the image, or set `allow_empty: true` under "
            "`options:` of the data set if it is meant."
        )
    return mask


def _grey(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path}: the mask has {image.mode} pixels of more than 8 bits; save 8.")
    if "A" in image.getbands() and (np.asarray(image.getchannel("A")) < 255).any():
        raise UserError(
            f"{path}: parts of the mask are transparent, which may be its background or mean "
            "nothing; save it as black and white."
        )
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    channels = np.asarray(image.convert("RGB")).astype(np.int16)
    coloured = float((np.ptp(channels, axis=2) > COLOUR).mean())
    if coloured > 0.001:
        raise UserError(
            f"{path}: the mask is coloured ({coloured:.1%} of its pixels); one foreground class "
            "is supported: save it as black and white."
        )
    return channels[..., 0].astype(np.uint8)


def encode_mask(mask: Mask) -> bytes:
    """A mask as PNG of one bit per pixel, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def decode_mask(data: bytes) -> Mask:
    """What :func:`encode_mask` encoded, bool (H, W)."""
    with Image.open(io.BytesIO(data)) as image:
        # of Pillow's own array of a "1" the true bytes are 255, which numpy takes for 1 in places
        return np.asarray(image.convert("L")) > 0


def resize_mask(mask: Mask, size: int) -> Mask:
    """A mask at size x size pixels by nearest neighbour, as the released code resizes it."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(picture.resize((size, size), Image.Resampling.NEAREST)) > 0


def resize_image(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """RGB (H, W, 3) at size x size pixels, bilinear with antialiasing as in the released code."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
