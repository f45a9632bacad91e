"""The subjects of quick generation: rendered things that pre-training never saw, in five pictures.

Each belongs to a class that the small model knows (circle, square, star) and differs from all that
it has seen by parts and colours that no caption can name together. The pictures stand on grounds
that the prompts do not ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snella.errors import unknown
from snella.quick import generation_scenes as scenes
from snella.quick.generation_grounds import BACKGROUNDS, COLOURS, backdrop
from snella.quick.generation_scenes import box, disc, over, star

GROUNDS = (
    "on a wooden floor",
    "in the water",
    "on a checkered floor",
    "with a mountain in the background",
    "on a white wall",
)
PROMPTS = (
    "a {0} {1} in the snow",
    "a {0} {1} in the jungle",
    "a {0} {1} on the beach",
    "a {0} {1} on a brick wall",
    "a {0} {1} at night",
    "a {0} {1} on pink fabric",
    "a small {0} {1} on a blue wall",
    "a {0} {1} on a yellow wall on the left",
)
_Painter = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _colour(name: str) -> Tensor:
    return torch.tensor(COLOURS[name])[None, :, None, None]


def _ladybird(image: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    image = over(image, disc(u, v - 0.72 * r, 0.52 * r), _colour("black"))
    image = over(image, disc(u, v + 0.1 * r, 0.92 * r), _colour("red"))
    image = over(image, box(u, v + 0.1 * r, 0.06 * r, 0.92 * r), _colour("black"))
    for x, y in ((0.42, 0.3), (0.5, -0.3)):
        image = over(image, disc(u.abs() - x * r, v - y * r, 0.2 * r), _colour("black"))
    return over(image, disc(u.abs() - 0.22 * r, v - 0.98 * r, 0.13 * r), _colour("white"))


def _robot(image: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    image = over(image, box(u, v - 1.0 * r, 0.1 * r, 0.3 * r), _colour("black"))
    image = over(image, disc(u, v - 1.25 * r, 0.24 * r), _colour("red"))
    image = over(image, box(u, v, 0.86 * r, 0.8 * r), _colour("black"))
    image = over(image, box(u, v, 0.72 * r, 0.66 * r), _colour("cyan"))
    image = over(image, disc(u.abs() - 0.36 * r, v - 0.22 * r, 0.24 * r), _colour("yellow"))
    return over(image, box(u, v + 0.36 * r, 0.42 * r, 0.13 * r), _colour("purple"))


def _starfish(image: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    image = over(image, star(u, v, 1.15 * r), _colour("purple"))
    image = over(image, star(u, v, 0.85 * r), _colour("yellow"))
    image = over(image, disc(u.abs() - 0.22 * r, v - 0.12 * r, 0.12 * r), _colour("black"))
    return over(image, box(u, v + 0.22 * r, 0.22 * r, 0.08 * r), _colour("red"))


@dataclass(frozen=True)
class Subject:
    """One subject: its class word, what it is, the seed of its pictures, and its painter."""

    class_word: str
    description: str
    seed: int
    paint: _Painter


SUBJECTS: dict[str, Subject] = {
    "ladybird": Subject("circle", "a red ladybird with black spots and eyes", 201, _ladybird),
    "robot": Subject("square", "a framed cyan robot's face with an antenna", 202, _robot),
    "starfish": Subject("star", "a yellow starfish with a purple rim and a face", 203, _starfish),
}


def make(name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """A subject's pictures, uint8 (5, 32, 32, 3), and what a manifest says of it.

    Raises :class:`~snella.errors.UserError` for an unknown subject.
    """
    if name not in SUBJECTS:
        raise unknown("quick subject", name, SUBJECTS)
    subject = SUBJECTS[name]
    info = {
        "name": name,
        "subject": name,
        "class_word": subject.class_word,
        "prompts": list(PROMPTS),
        "source": "rendered by snella.quick.generation",
        "description": subject.description,
        "licence": "MIT (this repository)",
        "demo": True,
    }
    return pictures(subject), info


def pictures(subject: Subject, grounds: tuple[str, ...] = GROUNDS) -> np.ndarray:
    """Pictures of ``subject``, one before each of ``grounds``, uint8 (N, 32, 32, 3)."""
    rng, noise = np.random.default_rng(subject.seed), torch.Generator().manual_seed(subject.seed)
    n = len(grounds)
    image = torch.cat([backdrop(BACKGROUNDS.index(g), 1, noise) for g in grounds])
    frame = scenes.local_frame(
        rng.uniform(-2.5, 2.5, (n, 2)), rng.uniform(-0.2, 0.2, n), rng.uniform(8.5, 11.0, n), "cpu"
    )
    image = subject.paint(image, *frame)
    grain = 0.015 * torch.randn(image.shape, generator=noise)
    return scenes.quantise(image + grain).permute(0, 2, 3, 1).numpy()
