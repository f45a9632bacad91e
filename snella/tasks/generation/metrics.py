"""Formulas of the generation metrics, on unit feature vectors; numpy only."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def similarity_to(features: Array, references: Array) -> Array:
    """Mean cosine of each of ``features`` (N, D) to all ``references`` (R, D): (N,)."""
    return np.asarray(np.clip((features @ references.T).mean(axis=1), -1, 1))


def similarity_within(features: Array) -> float:
    """Mean cosine over all pairs of different rows of ``features`` (N, D); NaN below two rows."""
    n = len(features)
    if n < 2:
        return float("nan")
    cosine = features @ features.T
    return float(np.clip((cosine.sum() - np.trace(cosine)) / (n * (n - 1)), -1, 1))


def vendi(features: Array) -> float:
    """Vendi score exp(-Σ λ log λ), λ the eigenvalues of the cosine kernel K / n.

    1 for n equal rows of ``features`` (n, D), n for orthogonal ones (Friedman and Dieng, TMLR 2023,
    order 1).
    """
    n = len(features)
    short = features.T if features.shape[0] > features.shape[1] else features
    eigenvalues = np.linalg.eigvalsh(short @ short.T / n)
    positive = eigenvalues[eigenvalues > 1e-12]
    positive = positive / positive.sum()
    return float(np.exp(-(positive * np.log(positive)).sum()))


def matches(images: Array, texts: Array, own: NDArray[np.int64]) -> Array:
    """Whether each image (N, D) is closest to text ``own`` (N,) of all texts (T, D): 0 or 1."""
    return np.asarray((images @ texts.T).argmax(axis=1) == own, dtype=np.float64)


def drift(adapted: Array, base: Array) -> Array:
    """1 - cosine of corresponding rows of two sets of features (N, D): (N,)."""
    return np.asarray(np.clip(1 - (adapted * base).sum(axis=1), 0, 2))


def pairs_within(groups: NDArray[np.int64]) -> list[tuple[int, int]]:
    """All pairs of indices whose entries of ``groups`` (N,) are equal."""
    return [
        (int(i), int(j))
        for group in np.unique(groups)
        for i, j in combinations(np.flatnonzero(groups == group), 2)
    ]
