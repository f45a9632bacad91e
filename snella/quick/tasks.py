"""The quick suite: seven small tasks from bundled photographs and scans or rendered by formula.

Every task has 32 × 32 RGB images in three splits, `train` (800), `val` (200), `test` (500, rendered
tasks 1000), balanced over its classes (digits nearly), made without download from one seed per
task. Real pixels: digits (scans, set on rendered grounds), photos, retina (one eye, in overlapping
windows; its labels are computed by a formula, not by a physician). Rendered: count, orientation,
beetles, leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from snella.errors import unknown
from snella.quick import bundled, render, species

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Split = tuple[Images, Labels]
Group = Literal["natural", "specialised", "structured", "fgvc"]

Builder = Callable[[np.random.Generator, "QuickTask"], dict[str, Split]]

SPLITS = {"train": 800, "val": 200, "test": 500}
MORE = 500
"""Test images that rendered tasks have beside: predicting is cheap, and they halve its variance."""


@dataclass(frozen=True)
class QuickTask:
    """One task: what a manifest and a table need to know about it."""

    name: str
    group: Group
    description: str
    source: str
    licence: str
    real_pixels: bool
    seed: int
    class_names: tuple[str, ...]
    build: Builder

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def balanced(rng: np.random.Generator, n: int, classes: int) -> Labels:
    """n labels in random order, every class ⌊n / classes⌋ or one more times."""
    return rng.permutation(np.arange(n, dtype=np.int64) % classes)


def _rendered(paint: render.Painter) -> Builder:
    """A builder that paints every split with labels drawn in balance."""

    def build(rng: np.random.Generator, task: QuickTask) -> dict[str, Split]:
        labels = {name: balanced(rng, n, task.num_classes) for name, n in SPLITS.items()}
        splits = {name: (paint(rng, y), y) for name, y in labels.items()}
        images, known = splits["test"]
        more = balanced(rng, MORE, task.num_classes)  # drawn last: the images before stay the same
        both = np.concatenate([images, paint(rng, more)]), np.concatenate([known, more])
        return {**splits, "test": both}

    return build


def _patches(cut: Callable[[np.random.Generator, str, Labels], Images]) -> Builder:
    """A builder that cuts the patches of each split from that split's own blocks."""

    def build(rng: np.random.Generator, task: QuickTask) -> dict[str, Split]:
        labels = {name: balanced(rng, n, task.num_classes) for name, n in SPLITS.items()}
        return {name: (cut(rng, name, y), y) for name, y in labels.items()}

    return build


def _digits(rng: np.random.Generator, task: QuickTask) -> dict[str, Split]:
    """A random division of the scans; classes are balanced as far as a random draw goes."""
    scans, labels = bundled.digit_scans()
    parts = np.split(rng.permutation(len(labels)), np.cumsum(list(SPLITS.values())))
    return {
        name: (bundled.digit_images(rng, scans[part]), labels[part])
        for name, part in zip(SPLITS, parts, strict=False)
    }


_OURS = "rendered by snella.data (render, species)"

_TASKS = (
    QuickTask(
        name="digits",
        group="natural",
        description="Which handwritten digit is in the middle? Scans of 8 × 8 pixels, enlarged, "
        "coloured and set between two others on a coloured ground. After SVHN",
        source="scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, test set)",
        licence="CC BY 4.0 (UCI repository)",
        real_pixels=True,
        seed=101,
        class_names=tuple("0123456789"),
        build=_digits,
    ),
    QuickTask(
        name="photos",
        group="natural",
        description="Which photograph is this patch from? Test patches come from other regions",
        source="scikit-image (10 photographs) and scikit-learn (china, flower), as bundled",
        licence="public domain or CC0; china, flower: CC BY 2.0; motorcycle: Middlebury 2014",
        real_pixels=True,
        seed=102,
        class_names=tuple(bundled.PHOTOGRAPHS),
        build=_patches(bundled.photo_patches),
    ),
    QuickTask(
        name="retina",
        group="specialised",
        description="Is there a vessel in this patch of a fundus photograph, and which way does "
        "it run? Real pixels, labels computed from the Hessian's ridges",
        source="scikit-image retina (M. Häggström, 2014)",
        licence="CC0",
        real_pixels=True,
        seed=103,
        class_names=bundled.VESSEL,
        build=_patches(bundled.retina_patches),
    ),
    QuickTask(
        name="count",
        group="structured",
        description="How many discs, squares and triangles (1 to 8)? After CLEVR-count",
        source=_OURS,
        licence="MIT (this repository)",
        real_pixels=False,
        seed=104,
        class_names=tuple(str(k) for k in range(1, 9)),
        build=_rendered(render.paint_count),
    ),
    QuickTask(
        name="orientation",
        group="structured",
        description="Which way does the sprite point, in steps of 45°? After dSprites-orientation",
        source=_OURS,
        licence="MIT (this repository)",
        real_pixels=False,
        seed=105,
        class_names=tuple(f"{45 * k}°" for k in range(render.ORIENTATIONS)),
        build=_rendered(render.paint_orientation),
    ),
    QuickTask(
        name="beetles",
        group="fgvc",
        description="Ten species of rendered beetles: body and thorax width, bands or spots",
        source=_OURS,
        licence="MIT (this repository)",
        real_pixels=False,
        seed=106,
        class_names=tuple(beetle.name for beetle in species.BEETLES),
        build=_rendered(species.paint_beetles),
    ),
    QuickTask(
        name="leaves",
        group="fgvc",
        description="Ten species of rendered leaves: outline, lobes and their depth, teeth",
        source=_OURS,
        licence="MIT (this repository)",
        real_pixels=False,
        seed=107,
        class_names=tuple(leaf.name for leaf in species.LEAVES),
        build=_rendered(species.paint_leaves),
    ),
)

QUICK: dict[str, QuickTask] = {task.name: task for task in _TASKS}


def make(name: str) -> dict[str, Split]:
    """The splits of one task: split name -> (images uint8 (N, 32, 32, 3), labels int64 (N,)).

    The same bytes every time with the same versions of the packages. UserError when there is no
    such task or when a bundled photograph is missing.
    """
    if name not in QUICK:
        raise unknown("quick task", name, QUICK)
    task = QUICK[name]
    return task.build(np.random.default_rng(task.seed), task)
