"""Painting with signed distances: the primitives, and the quick suite's two structured tasks.

A shape is a signed distance d(x, y) in pixels (negative inside); its anti-aliased coverage is
clip(1/2 − d, 0, 1), and a layer is composed as image + coverage · (colour − image). All images of
a task are painted at once, as arrays (N, 32, 32), from one numpy generator.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SIZE = 32
Painter = Callable[[np.random.Generator, NDArray[np.int64]], NDArray[np.uint8]]


# ---------------------------------------------------------------------------------- primitives


def column(values: Array | NDArray[np.int64]) -> Array:
    """Per-image numbers (N,) -> (N, 1, 1), ready to broadcast over pixels."""
    return np.asarray(values, dtype=np.float64)[:, None, None]


def pixels() -> tuple[Array, Array]:
    """Pixel-centre coordinates x (to the right) and y (up), each (1, 32, 32), 0 at the middle."""
    axis = np.arange(SIZE, dtype=np.float64) - (SIZE - 1) / 2
    return axis[None, None, :], -axis[None, :, None]


def posed(centre: Array, angle: Array) -> tuple[Array, Array]:
    """Every pixel's (u, v) in the frame of an object with centre (N, 2) and angle (N,) in rad."""
    x, y = pixels()
    dx, dy = x - column(centre[:, 0]), y - column(centre[:, 1])
    cos, sin = column(np.cos(angle)), column(np.sin(angle))
    return cos * dx + sin * dy, cos * dy - sin * dx


def ellipse(u: Array, v: Array, a: Array | float, b: Array | float) -> Array:
    """Approximate signed distance to an ellipse with half axes a (along u) and b (along v)."""
    level = np.sqrt((u / a) ** 2 + (v / b) ** 2)
    slope = np.sqrt((u / a**2) ** 2 + (v / b**2) ** 2) + 1e-9
    return np.asarray(level * (level - 1) / slope)


def box(u: Array, v: Array, a: Array | float, b: Array | float) -> Array:
    """Signed distance (Chebyshev) to a rectangle with half sides a and b."""
    return np.maximum(np.abs(u) - a, np.abs(v) - b)


def triangle(u: Array, v: Array, r: Array | float) -> Array:
    """Signed distance to a regular triangle with in-radius r / 2, one corner along +v."""
    return np.maximum(np.abs(u) * 0.8660254 + v * 0.5, -v) - r / 2


def paint(image: Array, distance: Array, colour: Array) -> Array:
    """Compose a layer: image (N, 32, 32, 3), distance (N, 32, 32), colour (N, 3) in [0, 1]."""
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    return image + cover * (colour[:, None, None, :] - image)


def hsv(hue: Array, saturation: Array, value: Array) -> Array:
    """Colours (N, 3) from hue (in turns), saturation and value, each (N,)."""
    offset = np.array([5.0, 3.0, 1.0])
    k = (offset + 6 * np.asarray(hue)[:, None]) % 6
    ramp = np.clip(np.minimum(k, 4 - k), 0, 1)
    shade: Array = np.asarray(value)[:, None] * (1 - np.asarray(saturation)[:, None] * ramp)
    return shade


def any_colour(rng: np.random.Generator, n: int) -> Array:
    """Bright random colours (N, 3)."""
    return hsv(rng.random(n), rng.uniform(0.3, 1.0, n), rng.uniform(0.65, 1.0, n))


def backdrop(rng: np.random.Generator, n: int, low: float = 0.1, high: float = 0.45) -> Array:
    """Smooth random backgrounds (N, 32, 32, 3): 4 × 4 random colours, interpolated bilinearly."""
    coarse = rng.uniform(low, high, (n, 1, 1, 1)) + rng.uniform(-0.1, 0.1, (n, 4, 4, 3))
    at = np.linspace(0, 3, SIZE)
    left = np.minimum(at.astype(int), 2)
    weight = at - left
    rows = (
        coarse[:, left] * (1 - weight)[:, None, None]
        + coarse[:, left + 1] * (weight[:, None, None])
    )
    near, far = rows[:, :, left] * (1 - weight)[:, None], rows[:, :, left + 1] * weight[:, None]
    return np.asarray(near + far)


def stripes(rng: np.random.Generator, image: Array) -> Array:
    """Clutter: two faint thin lines across each image."""
    n = len(image)
    for _ in range(2):
        u, v = posed(rng.uniform(-12, 12, (n, 2)), rng.uniform(0, np.pi, n))
        image = paint(image, box(u, v, 60.0, 0.6), rng.uniform(0.2, 0.4, (n, 3)))
    return image


def finish(rng: np.random.Generator, image: Array, noise: float = 0.03) -> NDArray[np.uint8]:
    """Lighting gradient, sensor noise and rounding to uint8."""
    n = len(image)
    x, y = pixels()
    tilt = rng.uniform(-0.008, 0.008, (2, n))
    light = 1 + column(tilt[0]) * x + column(tilt[1]) * y
    noisy = image * light[..., None] + noise * rng.standard_normal(image.shape)
    return np.rint(np.clip(noisy, 0, 1) * 255).astype(np.uint8)


# ----------------------------------------------------------------------------------- structured


def _scatter(rng: np.random.Generator, counts: NDArray[np.int64]) -> tuple[Array, Array]:
    """Positions (N, max, 2) and radii (N, max) of objects that do not touch, by rejection."""
    most = int(counts.max())
    where = np.full((len(counts), most, 2), 1e3)
    radius = rng.uniform(2.6, 3.4, (len(counts), most))
    limit = SIZE / 2 - 3.5
    for i, count in enumerate(counts):
        placed = 0
        while placed < count:
            spot = rng.uniform(-limit, limit, 2)
            gap = np.hypot(*(where[i, :placed] - spot).T) - radius[i, :placed] - radius[i, placed]
            if placed == 0 or gap.min() > 0.5:
                where[i, placed] = spot
                placed += 1
            else:
                radius[i, placed] = max(1.8, radius[i, placed] * 0.98)
    return where, radius


def paint_count(rng: np.random.Generator, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """label + 1 discs, squares and triangles of any colour and size over two faint stripes."""
    n = len(labels)
    image = stripes(rng, backdrop(rng, n, 0.05, 0.3))
    where, radius = _scatter(rng, labels + 1)
    for j in range(where.shape[1]):
        u, v = posed(where[:, j], rng.uniform(0, 2 * np.pi, n))
        r = column(radius[:, j])
        shape = column(rng.integers(0, 3, n))
        distance = np.select(
            [shape == 0, shape == 1],
            [np.hypot(u, v) - r, box(u, v, 0.85 * r, 0.85 * r)],
            triangle(u, v, 1.25 * r),
        )
        image = paint(image, distance, any_colour(rng, n))
    return finish(rng, image)


ORIENTATIONS = 8


def paint_orientation(rng: np.random.Generator, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """An arrow, drop or flag pointing at label · 45° ± 14°, anywhere, in any colour and size."""
    n = len(labels)
    image = stripes(rng, backdrop(rng, n))
    angle = (labels + rng.uniform(-0.3, 0.3, n)) * 2 * np.pi / ORIENTATIONS - np.pi / 2
    u, v = posed(rng.uniform(-4, 4, (n, 2)), angle)
    s = column(rng.uniform(7.5, 11.0, n))
    arrow = np.minimum(box(u, v + 0.35 * s, 0.2 * s, 0.65 * s), triangle(u, v - 0.4 * s, 0.65 * s))
    drop = np.minimum(np.hypot(u, v + 0.45 * s) - 0.5 * s, triangle(u, v - 0.2 * s, 0.72 * s))
    flag = np.minimum(box(u, v, 0.13 * s, s), np.hypot(u, v - 0.62 * s) - 0.42 * s)
    sprite = column(rng.integers(0, 3, n))
    distance = np.select([sprite == 0, sprite == 1], [arrow, drop], flag)
    return finish(rng, paint(image, distance, any_colour(rng, n)))
