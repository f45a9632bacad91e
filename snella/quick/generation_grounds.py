"""The 20 grounds of quick generation's scenes: ten kinds of scenery and ten plain walls.

All are float (n, 3, 32, 32) in [0, 1], painted by torch on the device of the generator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SIZE = 32
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.97, 0.90, 0.20),
    "green": (0.15, 0.70, 0.20),
    "cyan": (0.20, 0.80, 0.85),
    "blue": (0.15, 0.25, 0.85),
    "purple": (0.55, 0.15, 0.75),
    "pink": (0.98, 0.60, 0.78),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.06),
}
SCENERY = (
    "in the snow",
    "in the jungle",
    "on the beach",
    "on a wooden floor",
    "on a brick wall",
    "in the water",
    "at night",
    "on a checkered floor",
    "on pink fabric",
    "with a mountain in the background",
)
BACKGROUNDS = (*SCENERY, *(f"on a {name} wall" for name in COLOURS))


def cover(distance: Tensor) -> Tensor:
    """Anti-aliased coverage of a signed distance in pixels, negative inside."""
    return (0.5 - distance).clamp(0, 1)


def pixels(device: torch.device | str) -> tuple[Tensor, Tensor]:
    axis = torch.arange(SIZE, device=device, dtype=torch.float32) - (SIZE - 1) / 2
    return axis[None, None, :], -axis[None, :, None]


def backdrop(number: int, n: int, rng: torch.Generator) -> Tensor:
    """``n`` pictures of background ``number``, float (n, 3, 32, 32) in [0, 1]."""
    if number >= len(SCENERY):
        plain = list(COLOURS.values())[number - len(SCENERY)]
        shade = 1 + 0.12 * (_uniform(rng, n, 1, 1, 1) - 0.5)
        return _flat(rng, n, plain) * shade
    return _SCENERY[SCENERY[number]](rng, n)


def _uniform(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=rng, device=rng.device)


def _flat(rng: torch.Generator, n: int, colour: tuple[float, float, float]) -> Tensor:
    value = torch.tensor(colour, device=rng.device)[None, :, None, None]
    return value.expand(n, 3, SIZE, SIZE).clone()


def _mix(low: Tensor, colour: tuple[float, float, float], share: Tensor) -> Tensor:
    """Blend ``colour`` into ``low`` (n, 3, H, W) by ``share`` (n, H, W)."""
    value = torch.tensor(colour, device=low.device)[None, :, None, None]
    return low + share[:, None] * (value - low)


def _shift(rng: torch.Generator, n: int, span: float) -> Tensor:
    return _uniform(rng, n, 1, 1) * span


def _snow(rng: torch.Generator, n: int) -> Tensor:
    flakes = (_uniform(rng, n, SIZE, SIZE) < 0.10).float()
    ground = _mix(_flat(rng, n, (0.72, 0.80, 0.92)), (0.88, 0.92, 0.98), _uniform(rng, n, 1, 1))
    return _mix(ground, (1.0, 1.0, 1.0), flakes)


def _jungle(rng: torch.Generator, n: int) -> Tensor:
    x, y = pixels(rng.device)
    leaf = torch.sin(0.9 * x + _shift(rng, n, 6.3)) * torch.sin(0.7 * y + 0.5 * x) > 0.15
    ground = _flat(rng, n, (0.03, 0.22, 0.08))
    ground = _mix(ground, (0.10, 0.45, 0.12), leaf.float())
    return _mix(ground, (0.25, 0.60, 0.15), (_uniform(rng, n, SIZE, SIZE) < 0.06).float())


def _beach(rng: torch.Generator, n: int) -> Tensor:
    _, y = pixels(rng.device)
    horizon = 4 + _shift(rng, n, 5)
    wet = cover(horizon - y).expand(n, SIZE, SIZE)
    sand = _mix(
        _flat(rng, n, (0.93, 0.83, 0.60)),
        (0.80, 0.68, 0.45),
        (_uniform(rng, n, SIZE, SIZE) < 0.12).float(),
    )
    return _mix(sand, (0.25, 0.60, 0.85), wet)


def _wood(rng: torch.Generator, n: int) -> Tensor:
    x, y = pixels(rng.device)
    seam = cover((torch.remainder(x + _shift(rng, n, 6), 6.0) - 3).abs() - 0.4)
    grain = 0.5 + 0.5 * torch.sin(1.7 * x + 0.35 * y + _shift(rng, n, 6.3))
    ground = _mix(_flat(rng, n, (0.60, 0.38, 0.20)), (0.70, 0.48, 0.27), grain)
    return _mix(ground, (0.32, 0.18, 0.08), seam.expand(n, SIZE, SIZE))


def _bricks(rng: torch.Generator, n: int) -> Tensor:
    x, y = pixels(rng.device)
    y = y + _shift(rng, n, 6)
    row = torch.floor(y / 6)
    along = x + 5 * torch.remainder(row, 2.0) + _shift(rng, n, 10)
    joint = torch.maximum(
        ((torch.remainder(y, 6.0) - 3).abs() > 2.3).float(),
        ((torch.remainder(along, 10.0) - 5).abs() > 4.3).float(),
    )
    return _mix(_flat(rng, n, (0.62, 0.25, 0.18)), (0.80, 0.76, 0.70), joint)


def _water(rng: torch.Generator, n: int) -> Tensor:
    x, y = pixels(rng.device)
    wave = torch.sin(1.1 * y + 1.3 * torch.sin(0.45 * x + _shift(rng, n, 6.3)))
    return _mix(_flat(rng, n, (0.08, 0.35, 0.65)), (0.45, 0.75, 0.92), (0.5 + 0.5 * wave) ** 2)


def _night(rng: torch.Generator, n: int) -> Tensor:
    ground = _flat(rng, n, (0.03, 0.04, 0.16))
    return _mix(ground, (1.0, 1.0, 0.8), (_uniform(rng, n, SIZE, SIZE) < 0.03).float())


def _checkered(rng: torch.Generator, n: int) -> Tensor:
    x, y = pixels(rng.device)
    odd = torch.floor((x + _shift(rng, n, 10)) / 5) + torch.floor((y + _shift(rng, n, 10)) / 5)
    return _mix(_flat(rng, n, (0.90, 0.90, 0.88)), (0.22, 0.22, 0.25), torch.remainder(odd, 2.0))


def _fabric(rng: torch.Generator, n: int) -> Tensor:
    x, y = pixels(rng.device)
    fold = 0.5 + 0.5 * torch.sin(0.55 * (x + y) + 0.8 * torch.sin(0.3 * y) + _shift(rng, n, 6.3))
    return _mix(_flat(rng, n, (0.85, 0.38, 0.58)), (0.99, 0.72, 0.84), fold)


def _mountain(rng: torch.Generator, n: int) -> Tensor:
    x, y = pixels(rng.device)
    peak = _shift(rng, n, 16) - 8
    slope = y - 12 + 1.1 * (x - peak).abs()
    ground = _flat(rng, n, (0.62, 0.80, 0.96))
    ground = _mix(ground, (0.45, 0.43, 0.48), cover(slope).expand(n, SIZE, SIZE))
    ground = _mix(ground, (0.97, 0.97, 1.0), cover(torch.maximum(slope, 7 - y)))
    return _mix(ground, (0.40, 0.62, 0.28), cover(y + 9).expand(n, SIZE, SIZE))


_SCENERY: dict[str, Callable[[torch.Generator, int], Tensor]] = dict(
    zip(
        SCENERY,
        (_snow, _jungle, _beach, _wood, _bricks, _water, _night, _checkered, _fabric, _mountain),
        strict=True,
    )
)
