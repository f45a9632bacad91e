"""Example images, made small and put into the page as data URIs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from snella.tasks.base import Gallery

SIDES = (192, 128, 96, 64)
"""Pixels of the longer side: the largest with which all images fit the budget is taken."""
BUDGET = 2_000_000
"""Bytes of all images of a page."""
QUALITY = 82


def views(galleries: Sequence[Gallery]) -> list[dict[str, Any]]:
    """Galleries as the template takes them, every image a data URI.

    Where they do not fit even as small as can be, the last ones say so instead.
    """
    found: list[dict[str, Any]] = []
    for side in SIDES:
        found = [_view(gallery, side) for gallery in galleries]
        if sum(map(_size, found)) <= BUDGET:
            return found
    room = BUDGET
    for view in found:
        room -= _size(view)
        if room < 0:
            view |= {"lines": [], "text": f"Left out: images of more than {BUDGET / 1e6:g} MB."}
    return found


def _size(view: dict[str, Any]) -> int:
    return sum(len(cell["uri"]) for line in view["lines"] for cell in line["cells"])


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


def _uri(image: np.ndarray, side: int) -> str:
    """A WebP of at most ``side`` pixels; smaller images keep their own."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
