"""Images that TFDS itself changes when it prepares a set, made as its builders make them.

SUN397's are scaled to at most 120,000 pixels. Retinopathy's (``btgraham-300``) are scaled to eyes
of 300 pixels' radius, cleared of their local average and cropped, as by the winner of Kaggle's
competition. Both are JPEG again afterwards. TFDS uses OpenCV for all of it, and so does this.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snella.data.images import EncodedFiles
from snella.data.readers.pixels import image_bytes, refuse_text, why_undecodable
from snella.errors import UserError

PIXELS = 120_000
RADIUS = 300
KEPT = 0.9
"""Share of the eye's radius that is kept: its rim is all border after the local average is gone."""
QUALITY = 72


class Remade(EncodedFiles):
    """The encoded bytes that ``make`` makes of files' bytes, at every access anew."""

    def __init__(self, paths: Sequence[Path], make: Callable[[bytes], bytes]) -> None:
        super().__init__(paths)
        self.make = make

    def _item(self, index: int) -> bytes:
        path = self.paths[index]
        try:
            data = image_bytes(path)
            refuse_text(data, f"Image {path}")
            return self.make(data)
        except OSError as error:
            reason = why_undecodable(error)
            raise UserError(f"{path} cannot be read: {reason}; unpack it again.") from error


def sun397(data: bytes) -> bytes:
    """An image of SUN397 as TFDS 4.0.0 has it."""
    cv2, image = _opened(data)
    height, width = image.shape[:2]
    if height * width > PIXELS:
        factor = np.sqrt(PIXELS / (height * width))
        image = cv2.resize(image, dsize=None, fx=factor, fy=factor)
    return _jpeg(cv2, image)


def retinopathy(data: bytes) -> bytes:
    """An image of Diabetic Retinopathy as TFDS 3.0.0 has it under ``btgraham-300``."""
    cv2, image = _opened(data)
    across = image[len(image) // 2].sum(axis=1)
    radius = (across > across.mean() / 10).sum() / 2
    if radius < 1:  # nothing to be seen in the middle row
        radius = len(image) / 2
    image = cv2.resize(image, dsize=None, fx=RADIUS / radius, fy=RADIUS / radius)
    image = cv2.addWeighted(image, 4, cv2.GaussianBlur(image, (0, 0), RADIUS / 30), -4, 128)
    y, x, kept = image.shape[0] // 2, image.shape[1] // 2, int(RADIUS * KEPT)
    disc = cv2.circle(np.zeros(image.shape[:2], np.uint8), (x, y), kept, 1, -1)
    image = np.where(disc[..., None], image, np.uint8(128))
    image = image[max(y - kept, 0) : y + kept, max(x - kept, 0) : x + kept]
    return _jpeg(cv2, image, QUALITY)


def _opened(data: bytes) -> tuple[Any, np.ndarray]:
    """OpenCV, and an image in its order of channels, blue first.

    GIF, which its older versions do not decode, TFDS decodes otherwise, red first, and takes for
    the same.
    """
    try:
        import cv2
    except ImportError:
        raise UserError(
            "SUN397 and Retinopathy need OpenCV to be made as TFDS has them; pip install "
            "snella[tfds]."
        ) from None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if image is None:
        from PIL import Image

        with Image.open(io.BytesIO(data), formats=["GIF"]) as found:
            image = np.array(found.convert("RGB"))
    return cv2, image


def _jpeg(cv2: Any, image: np.ndarray, quality: int = 95) -> bytes:
    """OpenCV's own quality, 95, is what SUN397 has, although TFDS' description says 72."""
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return bytes(encoded)
