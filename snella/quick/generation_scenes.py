"""Captioned scenes of 32 pixels: the whole world that the small text-to-image model knows.

A scene is one flat shape with a colour, perhaps a second colour in a pattern, a size and a place,
before a background; its caption names some of it, e.g. "a large red circle with white stripes on
the beach on the left". What a caption leaves out is drawn at random. Attributes are drawn by
numpy, pixels are painted by torch on any device (signed distances as in
:mod:`snella.quick.render`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snella.quick.generation_grounds import (
    BACKGROUNDS,
    COLOURS,
    SCENERY,
    SIZE,
    backdrop,
    cover,
    pixels,
)

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "moon")
PATTERNS = ("", "stripes", "dots", "checks", "center", "border", "eyes")
SIZES = {"small": (4.5, 6.0), "": (7.0, 9.0), "large": (10.0, 12.5)}
PLACES: dict[str, tuple[float, float]] = {
    "": (0.0, 0.0),
    "on the left": (-7.0, 0.0),
    "on the right": (7.0, 0.0),
    "at the top": (0.0, 7.0),
    "at the bottom": (0.0, -7.0),
}


@dataclass(frozen=True)
class Scenes:
    """Attributes of N scenes: indices into the tables above, radii (N,) and places (N, 2)."""

    shape: np.ndarray
    colour: np.ndarray
    pattern: np.ndarray
    second: np.ndarray
    size: np.ndarray
    place: np.ndarray
    background: np.ndarray
    radius: np.ndarray
    centre: np.ndarray
    angle: np.ndarray

    def __len__(self) -> int:
        return len(self.shape)


def draw_scenes(rng: np.random.Generator, n: int) -> Scenes:
    """Draw the attributes of ``n`` scenes; shape and background differ in colour."""
    colour = rng.integers(0, len(COLOURS), n)
    second = (colour + rng.integers(1, len(COLOURS), n)) % len(COLOURS)
    background = rng.integers(0, len(BACKGROUNDS), n)
    wall = background - len(SCENERY)
    background = np.where(wall == colour, len(SCENERY) + (wall + 1) % len(COLOURS), background)
    pattern = np.where(rng.random(n) < 0.4, 0, rng.integers(1, len(PATTERNS), n))
    size = rng.choice(len(SIZES), n, p=[0.2, 0.6, 0.2])
    place = np.where(rng.random(n) < 0.5, 0, rng.integers(1, len(PLACES), n))
    bounds = np.array(list(SIZES.values()))[size]
    radius = rng.uniform(bounds[:, 0], bounds[:, 1])
    centre = np.array(list(PLACES.values()))[place] + rng.uniform(-2.0, 2.0, (n, 2))
    return Scenes(
        shape=rng.integers(0, len(SHAPES), n), colour=colour, pattern=pattern, second=second,
        size=size, place=place, background=background, radius=radius, centre=centre,
        angle=rng.uniform(-0.3, 0.3, n),
    )  # fmt: skip


def captions(rng: np.random.Generator, scenes: Scenes) -> list[str]:
    """One caption per scene; each attribute but the shape is left out now and then."""
    colours, places, sizes = list(COLOURS), list(PLACES), list(SIZES)
    told = rng.random((len(scenes), 6))
    found = []
    for i in range(len(scenes)):
        words = ["a", sizes[scenes.size[i]] if told[i, 0] < 0.9 else ""]
        words += [colours[scenes.colour[i]] if told[i, 1] < 0.75 else "", SHAPES[scenes.shape[i]]]
        if scenes.pattern[i] and told[i, 2] < 0.7:
            second = colours[scenes.second[i]] if told[i, 3] < 0.7 else ""
            words += ["with", second, PATTERNS[scenes.pattern[i]]]
        words += [BACKGROUNDS[scenes.background[i]] if told[i, 4] < 0.85 else ""]
        words += [places[scenes.place[i]] if told[i, 5] < 0.8 else ""]
        found.append(" ".join(word for word in words if word))
    return found


def vocabulary() -> list[str]:
    """All words of the captions, and the words that only subjects and prompts have."""
    text = " ".join([*SHAPES, *COLOURS, *PATTERNS, *SIZES, *PLACES, *BACKGROUNDS])
    return sorted({"a", "with", *RARE_TOKENS, *text.split()})


RARE_TOKENS = ("sks", "ohwx", "zwx")
"""Words that no caption has: each can come to mean a subject."""


# ------------------------------------------------------------------------------------- painting


def paint(scenes: Scenes, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Paint scenes as images uint8 (N, 3, 32, 32); ``seed`` draws the scenery's texture."""
    rng = torch.Generator(device).manual_seed(seed)
    image = torch.empty(len(scenes), 3, SIZE, SIZE, device=device)
    for number in np.unique(scenes.background):
        rows = torch.from_numpy(np.flatnonzero(scenes.background == number)).to(device)
        image[rows] = backdrop(int(number), len(rows), rng)
    image = paint_shape(image, scenes)
    noise = torch.randn(image.shape, generator=rng, device=device)
    return quantise(image + 0.015 * noise)


def quantise(image: Tensor) -> Tensor:
    """Images in [0, 1] as uint8."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def paint_shape(image: Tensor, scenes: Scenes) -> Tensor:
    """Put each scene's shape, with its pattern, on ``image`` (N, 3, 32, 32) in [0, 1]."""
    device = image.device
    u, v, r = local_frame(scenes.centre, scenes.angle, scenes.radius, device)
    distance = torch.empty(len(scenes), SIZE, SIZE, device=device)
    marks = torch.zeros_like(distance)
    for number in np.unique(scenes.shape):
        rows = torch.from_numpy(np.flatnonzero(scenes.shape == number)).to(device)
        distance[rows] = _SHAPES[SHAPES[number]](u[rows], v[rows], r[rows])
    for number in np.unique(scenes.pattern):
        rows = torch.from_numpy(np.flatnonzero(scenes.pattern == number)).to(device)
        inside = _PATTERNS[PATTERNS[number]]
        marks[rows] = inside(u[rows], v[rows], r[rows], distance[rows])
    table = torch.tensor(list(COLOURS.values()), device=device)
    first = table[torch.from_numpy(scenes.colour).to(device)][:, :, None, None]
    second = table[torch.from_numpy(scenes.second).to(device)][:, :, None, None]
    filled = first + marks[:, None] * (second - first)
    return over(image, distance, filled)


def over(image: Tensor, distance: Tensor, colour: Tensor) -> Tensor:
    """Compose a layer: image (N, 3, H, W), signed distance (N, H, W) in pixels, colour."""
    return image + cover(distance)[:, None] * (colour - image)


def local_frame(
    centre: np.ndarray, angle: np.ndarray, radius: np.ndarray, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Every pixel's (u, v) in the object's frame, in pixels, and its radius (N, 1, 1)."""
    x, y = pixels(device)
    at = torch.as_tensor(centre, dtype=torch.float32, device=device)
    turn = torch.as_tensor(angle, dtype=torch.float32, device=device)[:, None, None]
    dx, dy = x - at[:, 0, None, None], y - at[:, 1, None, None]
    r = torch.as_tensor(radius, dtype=torch.float32, device=device)[:, None, None]
    return turn.cos() * dx + turn.sin() * dy, turn.cos() * dy - turn.sin() * dx, r


def disc(u: Tensor, v: Tensor, r: Tensor | float) -> Tensor:
    """Signed distance to a disc of radius ``r``."""
    return torch.hypot(u, v) - r


def box(u: Tensor, v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Signed distance (Chebyshev) to a rectangle with half sides ``a`` and ``b``."""
    return torch.maximum(u.abs() - a, v.abs() - b)


def triangle(u: Tensor, v: Tensor, r: Tensor | float) -> Tensor:
    """Signed distance to an upright triangle of half width ``r``."""
    return torch.maximum(u.abs() * 0.87 + v * 0.5 - 0.35 * r, -v - 0.75 * r)


def star(u: Tensor, v: Tensor, r: Tensor | float) -> Tensor:
    """Approximate signed distance to a five-pointed star, one point upwards."""
    sector = math.tau / 5
    angle = torch.remainder(torch.atan2(u, v) + sector / 2, sector) - sector / 2
    rho = torch.hypot(u, v)
    x, y = rho * angle.sin().abs(), rho * angle.cos()
    return (x * 0.9 + (y - 1.15 * r) * 0.36) / 0.97


def _moon(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(disc(u, v, r), -disc(u - 0.55 * r, v - 0.15 * r, 0.8 * r))


_Distance = Callable[[Tensor, Tensor, Tensor], Tensor]
_SHAPES: dict[str, _Distance] = {
    "circle": disc,
    "square": lambda u, v, r: box(u, v, 0.88 * r, 0.88 * r),
    "triangle": lambda u, v, r: triangle(u, v, 1.25 * r),
    "star": star,
    "ring": lambda u, v, r: disc(u, v, 0.75 * r).abs() - 0.27 * r,
    "cross": lambda u, v, r: torch.minimum(box(u, v, r, 0.36 * r), box(u, v, 0.36 * r, r)),
    "diamond": lambda u, v, r: (u.abs() * 1.25 + v.abs() - 1.15 * r) / 1.6,
    "moon": _moon,
}


def _stripes(u: Tensor, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    return cover((torch.remainder(v + 1.25, 5.0) - 2.5).abs() - 1.25)


def _dots(u: Tensor, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    x, y = torch.remainder(u, 5.0) - 2.5, torch.remainder(v, 5.0) - 2.5
    return cover(disc(x, y, 1.5))


def _checks(u: Tensor, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    odd = torch.floor(u / 3.5) + torch.floor(v / 3.5)
    return torch.remainder(odd, 2.0)


_PATTERNS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "": lambda u, v, r, d: torch.zeros_like(d),
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "center": lambda u, v, r, d: cover(disc(u, v, 0.42 * r)),
    "border": lambda u, v, r, d: cover(-d - 1.8),
    "eyes": lambda u, v, r, d: cover(disc(u.abs() - 0.32 * r, v - 0.1 * r, 0.2 * r)),
}
