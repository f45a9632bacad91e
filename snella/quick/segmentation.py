"""The quick segmentation task: polyps rendered on real tissue, with exact masks.

The grounds are windows of two photographs that ship inside scikit-image, a fundus (retina) and a
stained section (histology); every block of a photograph belongs to one split, so no pixel is in
two. A polyp is a dome of the tissue's own texture (another window of the same split): a star-shaped
outline, a slight tint, light from one side, a soft shadow on the other. What is no polyp lies about
as well: flat, darker stains of the same outlines, dark folds, bright reflections. The colour of a
pixel alone does not tell, since tissue has all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from snella.errors import unknown
from snella.quick.bundled import SCIKIT_IMAGE, blocks_of, bundled

Array = NDArray[np.float64]

SIZE = 96
SPLITS = {"train": 128, "val": 32, "test": 96}


@dataclass(frozen=True)
class Tissue:
    """A photograph, the side of its blocks, and the sides of the windows cut from them."""

    name: str
    path: str
    block: int
    window: tuple[int, int]


TISSUES = (
    Tissue("retina", f"{SCIKIT_IMAGE}/retina.jpg", 176, (110, 176)),
    Tissue("histology", f"{SCIKIT_IMAGE}/ihc.png", 128, (64, 96)),
)
SOURCES = ("scikit-image retina.jpg (CC0)", "scikit-image ihc.png (Human Protein Atlas, CC BY-SA)")


@dataclass(frozen=True)
class QuickSegmentation:
    """One quick data set: what a manifest needs to know about it."""

    name: str
    description: str
    seed: int


QUICK = {
    "polyps": QuickSegmentation(
        "polyps",
        "Rendered polyps on windows of a fundus photograph and of a stained tissue section; "
        "flat stains, folds and reflections are no polyps",
        501,
    )
}

# -------------------------------------------------------------------------------- grounds


class Grounds:
    """Windows of one tissue that lie wholly inside the blocks of one split."""

    def __init__(self, tissue: Tissue, split: str) -> None:
        self.tissue = tissue
        self.photo = Image.open(bundled(tissue.path)).convert("RGB")
        pixels = np.asarray(self.photo)
        self.corners = [
            (y, x)
            for y, x in blocks_of(pixels.shape, tissue.block, split)
            if self._lit(pixels[y : y + tissue.block, x : x + tissue.block])
        ]

    def _lit(self, block: NDArray[np.uint8]) -> bool:
        """Whether the block lies inside the lit field of the photograph."""
        return bool((block.max(axis=2) < 60).mean() < 0.02)

    def window(self, rng: np.random.Generator) -> Array:
        """A random window, turned and mirrored, as (96, 96, 3) in [0, 1]."""
        side = int(rng.integers(self.tissue.window[0], self.tissue.window[1] + 1))
        top, left = self.corners[int(rng.integers(len(self.corners)))]
        y, x = (int(c + rng.integers(0, self.tissue.block - side + 1)) for c in (top, left))
        cut = self.photo.crop((x, y, x + side, y + side))
        pixels = np.asarray(cut.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) / 255.0
        turned = np.rot90(pixels, int(rng.integers(4)))
        return turned[:, ::-1] if rng.random() < 0.5 else turned


# --------------------------------------------------------------------------------- shapes

_AXIS = (np.arange(SIZE) + 0.5) / SIZE
_Y, _X = np.meshgrid(_AXIS, _AXIS, indexing="ij")


def _outline(rng: np.random.Generator, centre: Array, radius: float) -> Array:
    """1 - rho / R(theta) of a star-shaped outline: positive inside, 1 at the centre (96, 96)."""
    stretch, angle = np.exp(rng.uniform(-0.3, 0.3)), rng.uniform(0, 2 * np.pi)
    dx, dy = _X - centre[0], _Y - centre[1]
    u = (np.cos(angle) * dx + np.sin(angle) * dy) * stretch
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / stretch
    theta, reach = np.arctan2(v, u), np.ones_like(u)
    for k in range(2, 6):
        reach += rng.uniform(0, 0.22) / k * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    return np.asarray(1 - np.hypot(u, v) / (radius * reach))


def _cover(depth: Array, radius: float) -> Array:
    """Soft coverage of an outline, about two pixels wide."""
    return 1 / (1 + np.exp(-depth * radius * SIZE / 0.6))


def _place(rng: np.random.Generator, taken: list[tuple[Array, float]], radius: float) -> Array:
    """A centre that keeps clear of what is there already, if one is found in twenty tries."""
    for _ in range(20):
        centre = rng.uniform(0.12, 0.88, 2)
        if all(np.hypot(*(centre - c)) > 0.9 * (radius + r) for c, r in taken):
            return centre
    return centre


def _tint(rng: np.random.Generator, stain: bool) -> Array:
    """A tint (3,): polyps are a little paler or redder than the tissue, stains darker."""
    level = rng.uniform(-0.28, -0.06) if stain else rng.uniform(-0.03, 0.14)
    return np.asarray(level + rng.uniform(-0.05, 0.05, 3))


def _matched(skin: Array, ground: Array) -> Array:
    """The texture of ``skin``, stretched and so fainter, with the mean colour of ``ground``."""
    return np.asarray(0.6 * (skin - skin.mean(axis=(0, 1))) + ground.mean(axis=(0, 1)))


def _polyp(
    rng: np.random.Generator, image: Array, skin: Array, centre: Array, radius: float, light: float
) -> tuple[Array, NDArray[np.bool_]]:
    """A dome over ``image``, lit from the direction ``light``; the new image and its mask."""
    depth = _outline(rng, centre, radius)
    inside = np.clip(depth, 0, 1)
    side = ((_X - centre[0]) * np.cos(light) + (_Y - centre[1]) * np.sin(light)) / radius
    slope = np.clip(side, -1.5, 1.5) * (1 - inside)
    height = rng.uniform(0.6, 1.0)
    shade = 1 + height * (0.36 * slope + 0.18 * np.sqrt(inside)) - 0.05
    shifted = _outline_shadow(depth, side)
    image = image * (1 - 0.55 * height * shifted)[..., None]
    body = np.clip((_matched(skin, image) + _tint(rng, stain=False)) * shade[..., None], 0, 1)
    image = image + _cover(depth, radius)[..., None] * (body - image)
    return image, depth > 0


def _outline_shadow(depth: Array, side: Array) -> Array:
    """A soft shadow just outside the outline, on the side away from the light."""
    near = np.exp(-((np.minimum(depth, 0) / 0.22) ** 2)) * (depth <= 0)
    return near * np.clip(-side, 0, 1)


def _stain(
    rng: np.random.Generator, image: Array, skin: Array, centre: Array, radius: float
) -> Array:
    """A flat stain: outline, texture and tint of a polyp, without dome and shadow."""
    depth = _outline(rng, centre, radius)
    body = np.clip(_matched(skin, image) + _tint(rng, stain=True), 0, 1)
    return image + _cover(depth, radius)[..., None] * (body - image)


def _fold(rng: np.random.Generator, image: Array) -> Array:
    """A dark curved band across the image, brighter on one side."""
    angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.8, 0.8)
    u = np.cos(angle) * (_X - 0.5) + np.sin(angle) * (_Y - 0.5)
    v = np.cos(angle) * (_Y - 0.5) - np.sin(angle) * (_X - 0.5)
    off = v - rng.uniform(-0.4, 0.4) - bend * u**2
    width = rng.uniform(0.015, 0.05)
    band = -rng.uniform(0.1, 0.3) * np.exp(-((off / width) ** 2))
    band += rng.uniform(0.0, 0.15) * np.exp(-(((off - 2 * width) / width) ** 2))
    return np.asarray(np.clip(image * (1 + band)[..., None], 0, 1))


def _reflections(rng: np.random.Generator, image: Array, count: int) -> Array:
    """Small bright spots, anywhere."""
    for _ in range(count):
        depth = _outline(rng, rng.uniform(0, 1, 2), rng.uniform(0.012, 0.035))
        cover = 1 / (1 + np.exp(-np.clip(depth, -20, 1) * 3))
        image = image + (cover * rng.uniform(0.4, 0.9))[..., None] * (1 - image)
    return image


def draw(rng: np.random.Generator, grounds: Grounds) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One image uint8 (96, 96, 3) and the mask of its polyps, bool (96, 96)."""
    image = grounds.window(rng)
    light = rng.uniform(0, 2 * np.pi)
    for _ in range(int(rng.integers(0, 3))):
        image = _fold(rng, image)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    taken: list[tuple[Array, float]] = []
    stains, polyps = int(rng.integers(0, 3)), int(rng.choice([1, 1, 1, 2, 2, 3]))
    kinds = ["stain"] * stains + ["polyp"] * polyps  # a stain over a polyp would blur its mask
    for kind in kinds:
        radius = float(np.exp(rng.uniform(np.log(0.10), np.log(0.26))))
        centre = _place(rng, taken, radius)
        taken.append((centre, radius))
        skin = grounds.window(rng)
        if kind == "polyp":
            image, found = _polyp(rng, image, skin, centre, radius, light)
            mask |= found
        else:
            image = _stain(rng, image, skin, centre, radius)
    image = _reflections(rng, image, int(rng.integers(0, 5)))
    image = image + rng.uniform(0, 0.02) * rng.standard_normal(image.shape)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), mask


def make(name: str) -> dict[str, dict[str, Any]]:
    """Draw a quick data set: per split image uint8 (N, 96, 96, 3), mask bool (N, 96, 96) and
    tissue int64 (N,), the number of its photograph in ``TISSUES``.

    Raises :class:`~snella.errors.UserError` for an unknown name.
    """
    if name not in QUICK:
        raise unknown("quick segmentation data set", name, QUICK)
    rng = np.random.default_rng(QUICK[name].seed)
    splits = {}
    for split, count in SPLITS.items():
        grounds = [Grounds(tissue, split) for tissue in TISSUES]
        tissue = rng.permutation(np.arange(count) % len(TISSUES))
        drawn = [draw(rng, grounds[t]) for t in tissue]
        splits[split] = {
            "image": np.stack([image for image, _ in drawn]),
            "mask": np.stack([mask for _, mask in drawn]),
            "tissue": tissue.astype(np.int64),
        }
    return splits
