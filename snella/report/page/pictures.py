"""Example images, made small and put into the page as data URIs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
SIDES = (192, 128, 96, 64)
"""Pixels of the longer side: the largest with which all images fit the budget is taken."""
BUDGET = 2_000_000
"""Bytes of all images of a page."""
QUALITY = 82


@dataclass(frozen=True)
class GalleryLine:
    """One example: what it shows, and an image per head (uint8, (H, W, 3)) with its caption."""

    label: str
    images: Sequence[Pixels | None]
    captions: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    """Examples of a suite, chosen by a rule that ``text`` states, one column per head."""

    title: str
    text: str
    heads: Sequence[str]
    lines: Sequence[GalleryLine]


def views(galleries: Sequence[Gallery]) -> list[dict[str, Any]]:
    """Galleries as the template takes them, every image a data URI; none if they do not fit."""
    for side in SIDES:
        found = [_view(gallery, side) for gallery in galleries]
        size = sum(
            len(cell["uri"]) for view in found for line in view["lines"] for cell in line["cells"]
        )
        if size <= BUDGET:
            return found
    return []


def _view(gallery: Gallery, side: int) -> dict[str, Any]:
    lines = [
        {
            "label": line.label,
            "cells": [
                {"uri": _uri(image, side) if image is not None else "", "caption": caption,
                 "head": head}
                for head, image, caption in zip(
                    gallery.heads, line.images, line.captions, strict=True
                )
            ],
        }
        for line in gallery.lines
    ]  # fmt: skip
    return {"title": gallery.title, "text": gallery.text, "heads": gallery.heads, "lines": lines}


def _uri(image: Pixels, side: int) -> str:
    """A WebP of at most ``side`` pixels; smaller images keep their own."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
