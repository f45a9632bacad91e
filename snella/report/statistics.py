"""Is a method better than another? Paired tests over data sets and seeds.

Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006): the data
set is the unit, because seeds of one data set are not independent. So the Wilcoxon signed-rank
test sees one difference per data set (mean over paired seeds), p-values are corrected after
Holm (1979), and the confidence interval resamples data sets, then seeds within them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snella.errors import unknown

Scores = Mapping[str, Mapping[str, Mapping[int, float]]]
RESAMPLES = 10_000
LEVEL = 0.95
DECIMALS = 12  # below this, a difference is rounding noise and two are tied


@dataclass(frozen=True)
class Comparison:
    """A method against the reference, over the data sets where both have paired seeds.

    ``difference`` (positive: the method is better) and its interval are in the unit of the
    scores; None where fewer than two data sets are shared.
    """

    method: str
    datasets: int
    wins: int
    ties: int
    losses: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None


def compare(scores: Scores, reference: str, *, higher_is_better: bool = True) -> list[Comparison]:
    """Every method of ``scores`` (method, data set, seed) against ``reference``.

    Raises UserError if the reference is not among the methods.
    """
    if reference not in scores:
        raise unknown("reference method", reference, scores)
    sign = 1.0 if higher_is_better else -1.0
    raw = [
        _compare(method, paired_differences(scores[method], scores[reference], sign))
        for method in scores
        if method != reference
    ]
    corrected = holm([c.p for c in raw if c.p is not None])
    fixed = iter(corrected)
    return [c if c.p is None else Comparison(**{**vars(c), "p_holm": next(fixed)}) for c in raw]


def paired_differences(
    ours: Mapping[str, Mapping[int, float]], theirs: Mapping[str, Mapping[int, float]], sign: float
) -> list[list[float]]:
    """Per shared data set, the differences of the seeds that both have run."""
    result = []
    for dataset, seeds in ours.items():
        other = theirs.get(dataset, {})
        differences = [sign * (seeds[s] - other[s]) for s in sorted(seeds) if s in other]
        if differences:
            result.append(differences)
    return result


def _compare(method: str, differences: Sequence[Sequence[float]]) -> Comparison:
    means = [math.fsum(d) / len(d) for d in differences]
    wins, losses = sum(m > 0 for m in means), sum(m < 0 for m in means)
    counts = (len(means), wins, len(means) - wins - losses, losses)
    if len(means) < 2:
        return Comparison(method, *counts, None, None, None, None, None)
    low, high = bootstrap(differences)
    mean = math.fsum(means) / len(means)
    return Comparison(method, *counts, mean, low, high, wilcoxon(means), None)


def wilcoxon(differences: Sequence[float]) -> float:
    """Exact two-sided p-value of the signed-rank test; ties get mid-ranks, zeros are dropped.

    The distribution of the rank sum over all 2^n signs is counted, in doubled ranks so that
    mid-ranks are integers. No differences at all give 1.
    """
    nonzero = [r for d in differences if (r := round(d, DECIMALS)) != 0]
    doubled = [round(2 * r) for r in midranks([abs(d) for d in nonzero])]
    total = sum(doubled)
    observed = sum(r for r, d in zip(doubled, nonzero, strict=True) if d > 0)
    ways = [1] + [0] * total
    for r in doubled:
        for value in range(total, r - 1, -1):
            ways[value] += ways[value - r]
    far = abs(2 * observed - total)
    extreme = sum(n for value, n in enumerate(ways) if abs(2 * value - total) >= far)
    return extreme / 2 ** len(nonzero)


def midranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, smallest first; equal values share the mean of their ranks."""
    order = sorted(values)
    return [order.index(v) + (order.count(v) + 1) / 2 for v in values]


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down correction for several comparisons; order kept, at most 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    result = [0.0] * len(p_values)
    running = 0.0
    for step, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - step) * p_values[index]))
        result[index] = running
    return result


def bootstrap(differences: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean difference: data sets resampled, then seeds within them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    n = len(differences)
    sums = np.zeros(RESAMPLES)
    for _ in range(n):  # the n draws of a data set, each for all resamples at once
        chosen = rng.integers(n, size=RESAMPLES)
        for index, values in enumerate(differences):
            hit = np.flatnonzero(chosen == index)
            seeds = rng.integers(len(values), size=(len(hit), len(values)))
            sums[hit] += np.asarray(values)[seeds].mean(axis=1)
    low, high = np.quantile(sums / n, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def average_ranks(scores: Scores, *, higher_is_better: bool = True) -> dict[str, float]:
    """Mean rank (1 is best) over the data sets that every method has; empty if there are none."""
    shared = set.intersection(*(set(s) for s in scores.values())) if scores else set()
    means = {
        m: {d: math.fsum(seeds[d].values()) / len(seeds[d]) for d in shared}
        for m, seeds in scores.items()
    }
    sign = -1.0 if higher_is_better else 1.0
    ranks: dict[str, list[float]] = {m: [] for m in scores}
    for dataset in shared:
        column = midranks([sign * means[m][dataset] for m in scores])
        for method, value in zip(scores, column, strict=True):
            ranks[method].append(value)
    return {m: math.fsum(r) / len(r) for m, r in ranks.items() if r}
