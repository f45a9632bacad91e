"""The quick suite's two fine-grained tasks: rendered species of beetles and of leaves.

A species is a row of a table (proportions and pattern); pose, size and colours vary within every
species alike, so that nothing but shape and pattern tells two species apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snella.quick.render import Array, backdrop, box, column, ellipse, finish, hsv, paint, posed


@dataclass(frozen=True)
class Beetle:
    """What tells a species: half width and thorax width (of the length), bands, spot rows."""

    name: str
    width: float
    thorax: float
    bands: int = 0
    spots: int = 0


BEETLES: tuple[Beetle, ...] = (
    Beetle("slender plain", 0.40, 0.26),
    Beetle("slender two-banded", 0.40, 0.26, bands=2),
    Beetle("slender three-banded", 0.40, 0.26, bands=3),
    Beetle("slender four-spotted", 0.40, 0.26, spots=2),
    Beetle("slender six-spotted", 0.40, 0.26, spots=3),
    Beetle("stout plain", 0.56, 0.40),
    Beetle("stout two-banded", 0.56, 0.40, bands=2),
    Beetle("stout three-banded", 0.56, 0.40, bands=3),
    Beetle("stout four-spotted", 0.56, 0.40, spots=2),
    Beetle("stout six-spotted", 0.56, 0.40, spots=3),
)


def _species(table: Sequence[object], labels: NDArray[np.int64], field: str) -> Array:
    """The value of one field of each image's species, as (N, 1, 1)."""
    return column(np.array([getattr(row, field) for row in table], dtype=np.float64)[labels])


def paint_beetles(rng: np.random.Generator, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Beetles from above; pose, size and both colours vary within every species."""
    n = len(labels)
    image = backdrop(rng, n, 0.35, 0.8)
    u, v = posed(rng.uniform(-3, 3, (n, 2)), rng.uniform(-0.6, 0.6, n))
    length = column(rng.uniform(10.5, 13.5, n))
    u, v = u / length, v / length
    vary = column(rng.uniform(0.93, 1.07, n))
    width = _species(BEETLES, labels, "width") * vary
    hue = rng.random(n)
    shell = hsv(hue, rng.uniform(0.5, 0.9, n), rng.uniform(0.35, 0.6, n))
    mark = hsv(hue + rng.uniform(0.3, 0.7, n), rng.uniform(0.3, 0.9, n), rng.uniform(0.8, 1.0, n))
    dark = shell * 0.4

    for side in (-1.0, 1.0):
        for leg in (-0.45, -0.1, 0.25):
            reach = np.abs(v - leg - 0.25 * side * u) - 0.035
            legs = np.maximum(reach, np.maximum(-side * u, side * u - width - 0.3))
            image = paint(image, legs * length, dark)
    image = paint(image, ellipse(u, v - 0.8, 0.17, 0.17) * length, dark)
    thorax = _species(BEETLES, labels, "thorax") * vary
    image = paint(image, ellipse(u, v - 0.58, thorax, 0.24) * length, dark)
    body = ellipse(u, v + 0.2, width, 0.7)
    image = paint(image, body * length, shell)
    return finish(rng, _markings(image, labels, u, v, width, body, length, mark))


def _markings(
    image: Array,
    labels: NDArray[np.int64],
    u: Array,
    v: Array,
    width: Array,
    body: Array,
    length: Array,
    mark: Array,
) -> Array:
    """Paint a species' cross bands or pairs of spots onto the wing cases."""
    bands, spots = _species(BEETLES, labels, "bands"), _species(BEETLES, labels, "spots")
    for number, kind in ((2, "band"), (3, "band"), (2, "spot"), (3, "spot")):
        wanted = (bands if kind == "band" else spots) == number
        step = 1.0 / number
        for k in range(number):
            along = v + 0.2 - (k - (number - 1) / 2) * step
            if kind == "band":
                layer = np.abs(along) - 0.22 * step
            else:
                layer = np.hypot(np.abs(u) - 0.45 * width, along) - 0.27 * step**0.5 * 0.7
            layer = np.where(wanted, np.maximum(layer, body + 0.02), 1.0)
            image = paint(image, layer * length, mark)
    return image


@dataclass(frozen=True)
class Leaf:
    """What tells a species: lobes and their depth, length over width, teeth, and side veins."""

    name: str
    aspect: float
    lobes: int = 0
    depth: float = 0.0
    teeth: int = 0
    veins: int = 3


LEAVES: tuple[Leaf, ...] = (
    Leaf("round entire", 1.15),
    Leaf("oval entire", 1.5),
    Leaf("lance entire", 2.1),
    Leaf("round toothed", 1.15, teeth=12),
    Leaf("oval toothed", 1.5, teeth=12),
    Leaf("lance toothed", 2.1, teeth=12),
    Leaf("three-lobed shallow", 1.15, lobes=3, depth=0.2),
    Leaf("three-lobed deep", 1.15, lobes=3, depth=0.4),
    Leaf("five-lobed shallow", 1.15, lobes=5, depth=0.2),
    Leaf("five-lobed deep", 1.15, lobes=5, depth=0.4),
)


def paint_leaves(rng: np.random.Generator, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Leaves on litter; pose, size, tint (the same green to red for all) and contrast vary."""
    n = len(labels)
    image = backdrop(rng, n, 0.1, 0.4)
    u, v = posed(rng.uniform(-2, 2, (n, 2)), rng.uniform(-0.4, 0.4, n))
    aspect = _species(LEAVES, labels, "aspect") * column(rng.uniform(0.95, 1.05, n))
    long_half = column(rng.uniform(11.5, 14.0, n))
    wide_half = long_half / aspect
    theta = np.arctan2(u / wide_half, v / long_half)
    lobes, depth = _species(LEAVES, labels, "lobes"), _species(LEAVES, labels, "depth")
    teeth = _species(LEAVES, labels, "teeth")
    outline = 1 - depth * 0.5 * (1 - np.cos(lobes * theta)) * (np.cos(theta) > -0.85)
    outline = outline - 0.16 * (teeth > 0) * np.abs(np.sin(teeth * theta / 2))
    reach = np.hypot(u / wide_half, v / long_half)
    distance = (reach / outline - 1) * wide_half * 0.8
    blade = hsv(rng.uniform(0.02, 0.38, n), rng.uniform(0.5, 0.9, n), rng.uniform(0.5, 0.9, n))
    image = paint(image, box(u, v + long_half, 0.6, 3.0), blade * 0.6)
    image = paint(image, distance, blade)
    vein = blade * column(rng.uniform(0.6, 0.8, n))[:, 0]
    image = paint(image, np.maximum(np.abs(u) - 0.4, distance), vein)
    for k in range(3):
        side = np.abs(v + (0.5 - 0.5 * k) * long_half * 0.8 - 0.7 * np.abs(u)) - 0.2
        image = paint(image, np.maximum(side, distance + 1), vein)
    return finish(rng, image)
