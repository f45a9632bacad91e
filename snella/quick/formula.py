"""Formula-driven images for supervised pre-training without photographs.

Three families of grey images, every class a set of parameters and every image a perturbation of it:
- fractals of iterated function systems, x ← A_k x + b_k with k drawn at random, the density of the
  visited points (FractalDB: Kataoka et al., IJCV 2022);
- visual atoms, nested orbits r(θ) = R (1 + λ₁ sin(n₁θ + φ₁) + λ₂ sin(n₂θ + φ₂)) (VisualAtom:
  Takashima et al., CVPR 2023);
- gratings, sums of plane waves Σ cos(2π f_j (x cos α_j + y sin α_j) + φ_j), clipped to a disc.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE = 48
FAMILIES = ("fractal", "atom", "grating")
Images = NDArray[np.uint8]
Array = NDArray[np.float64]


def _system(rng: np.random.Generator) -> tuple[Array, Array]:
    """A contractive system of 2 to 5 affine maps: matrices (K, 2, 2) and shifts (K, 2)."""
    maps = int(rng.integers(2, 6))
    left, right = rng.uniform(0, 2 * np.pi, (2, maps))
    scale = rng.uniform(0.2, 0.85, (maps, 2)) * rng.choice([-1.0, 1.0], (maps, 2))

    def turn(a: Array) -> Array:
        return np.stack([np.cos(a), -np.sin(a), np.sin(a), np.cos(a)], -1).reshape(-1, 2, 2)

    return turn(left) * scale[:, None, :] @ turn(right), rng.uniform(-1, 1, (maps, 2))


def _visit(rng: np.random.Generator, matrices: Array, shifts: Array) -> Array:
    """Points (I, P, 2) that the chaos game visits; matrices (I, K, 2, 2), shifts (I, K, 2)."""
    instances, maps = matrices.shape[:2]
    chains, steps, settle = 96, 120, 20
    area = np.abs(np.linalg.det(matrices[0])) + 0.02
    which = rng.choice(maps, (steps, instances, chains), p=area / area.sum())
    rows = np.arange(instances)[:, None]
    point = np.zeros((instances, chains, 2))
    visited = []
    for step in range(steps):
        a, b = matrices[rows, which[step]], shifts[rows, which[step]]
        x, y = point[..., 0], point[..., 1]
        point = np.stack(
            [a[..., 0, 0] * x + a[..., 0, 1] * y, a[..., 1, 0] * x + a[..., 1, 1] * y], -1
        )
        point += b
        if step >= settle:
            visited.append(point)
    return np.concatenate(visited, axis=1)


def _density(points: Array) -> Images:
    """Logarithmic density (I, 48, 48) of points (I, P, 2), scaled to fill the image."""
    low, high = np.percentile(points, [0.5, 99.5], axis=1)
    span = (high - low).max(axis=-1)[:, None, None] + 1e-9
    middle = ((low + high) / 2)[:, None, :]
    cell = np.floor(((points - middle) / span * 0.94 + 0.5) * SIDE).astype(np.int64)
    inside = ((cell >= 0) & (cell < SIDE)).all(axis=-1)
    flat = np.arange(len(points))[:, None] * SIDE**2 + cell[..., 1] * SIDE + cell[..., 0]
    counts = np.bincount(flat[inside], minlength=len(points) * SIDE**2).reshape(len(points), -1)
    value = np.log1p(counts)
    top = np.percentile(value, 99, axis=1, keepdims=True) + 1e-9
    return (np.clip(value / top, 0, 1) * 255).astype(np.uint8).reshape(-1, SIDE, SIDE)


def fractals(rng: np.random.Generator, instances: int) -> Images:
    """One fractal class: images (instances, 48, 48) of a system whose numbers vary by 15 %."""
    while True:
        matrices, shifts = _system(rng)
        vary = rng.uniform(0.85, 1.15, (2, instances, len(matrices), 1, 1))
        images = _density(_visit(rng, matrices * vary[0], shifts * vary[1, ..., 0]))
        if 0.12 < (images > 40).mean() < 0.7:  # neither dust nor a filled square
            return images


def _plane() -> tuple[Array, Array]:
    axis = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    return axis[None, None, :], -axis[None, :, None]


def atoms(rng: np.random.Generator, instances: int) -> Images:
    """One visual-atom class: its frequencies and orbits are fixed, amplitudes and phases vary."""
    x, y = _plane()
    n1, n2 = int(rng.integers(0, 7)), int(rng.integers(1, 12))
    orbits, filled = int(rng.integers(1, 6)), bool(rng.random() < 0.35)
    lambda1, lambda2 = rng.uniform(0.1, 0.45), rng.uniform(0.05, 0.25)
    phase1, phase2, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), rng.random()

    def each(low: float, high: float) -> Array:
        return rng.uniform(low, high, (instances, 1, 1))

    stretch = each(0.9, 1.1) * (0.6 + 0.4 * squeeze)
    theta, rho = np.arctan2(y / stretch, x), np.hypot(x, y / stretch)
    wave = 1 + lambda1 * each(0.8, 1.2) * np.sin(n1 * theta + phase1 + each(-0.3, 0.3))
    wave = wave + lambda2 * each(0.8, 1.2) * np.sin(n2 * theta + phase2 + each(-0.3, 0.3))
    width = each(0.02, 0.05)
    value = np.zeros((instances, SIDE, SIDE))
    for k in range(orbits):
        edge = 0.62 * (k + 1) / orbits * wave
        gap = rho - edge if filled and k == orbits - 1 else np.abs(rho - edge) - width
        shade = 0.5 if filled and k == orbits - 1 else 1.0
        value = np.maximum(value, shade * np.clip(0.5 - gap * SIDE / 2, 0, 1))
    return (value * 255).astype(np.uint8)


def gratings(rng: np.random.Generator, instances: int) -> Images:
    """One class of gratings: frequencies and directions fixed up to 8 %, phases and size vary."""
    x, y = _plane()
    waves = int(rng.integers(1, 4))
    frequency, angle = rng.uniform(1.5, 7.0, waves), rng.uniform(0, np.pi, waves)
    hard = rng.uniform(1, 6)
    field = np.zeros((instances, SIDE, SIDE))
    for f, a in zip(frequency, angle, strict=True):
        f_i = f * rng.uniform(0.92, 1.08, (instances, 1, 1))
        a_i = a + rng.uniform(-0.08, 0.08, (instances, 1, 1))
        phase = rng.uniform(0, 2 * np.pi, (instances, 1, 1))
        field += np.cos(np.pi * f_i * (x * np.cos(a_i) + y * np.sin(a_i)) + phase)
    window = np.clip((rng.uniform(0.7, 1.3, (instances, 1, 1)) - np.hypot(x, y)) * 6, 0, 1)
    return ((0.5 + 0.5 * np.tanh(hard * field / waves)) * window * 255).astype(np.uint8)


_MAKERS = {"fractal": fractals, "atom": atoms, "grating": gratings}


def render(seed: int, classes: dict[str, int], instances: int) -> tuple[Images, NDArray[np.int64]]:
    """All images (N, 48, 48) and class numbers (N,): `classes` of each family, each on its seed."""
    images, number = [], 0
    for family, count in classes.items():
        for k in range(count):
            rng = np.random.default_rng([seed, FAMILIES.index(family), k])
            images.append(_MAKERS[family](rng, instances))
            number += 1
    return np.concatenate(images), np.repeat(np.arange(number), instances)
