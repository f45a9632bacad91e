"""What a difference between two rows is worth, from the scores of single test images.

Two sources of noise: which images were drawn for the test set (rows are paired, because all see
the same images), and the random seed of training (paired as well). With one seed and scores of
0 and 1, two rows on one data set are compared by McNemar's exact test. Everything else is a
paired t test on the difference of means: the variance of the mean over images plus the variance
over seeds, degrees of freedom after Satterthwaite (1946). Means over data sets add the variances
with the squared weights of the mean; the data sets themselves are taken as given.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from snella.errors import one_line

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

log = logging.getLogger("snella")
Row = TypeVar("Row", bound=Hashable)
ALPHA = 0.05
RESAMPLES, MANY = 1000, 5000
AGREE = 1e-3  # a metric is a mean over images if its scores average to it within this


@dataclass(frozen=True)
class Noise:
    """Second moments of one data set's rows.

    ``images`` (M, M) is the covariance of the M rows' means over the ``n`` test images, None
    where no scores are stored; ``seeds`` (M, M) that over the ``repeats`` common seeds, None for
    one. ``only`` (M, M) counts the images that a row has right and the other wrong, for scores
    of 0 and 1 and one seed. ``scores`` (M, n) are those of single images, means over the seeds;
    None for more than `MANY` images, whose standard error says all.
    """

    rows: Mapping[str, int]
    n: int
    repeats: int
    images: np.ndarray | None
    seeds: np.ndarray | None
    only: np.ndarray | None = None
    scores: np.ndarray | None = None

    def parts(self, a: str, b: str) -> list[tuple[float, int]]:
        """(variance, degrees of freedom) of the difference of two rows, by source."""
        result = []
        for matrix, count in ((self.images, self.n), (self.seeds, self.repeats)):
            if matrix is not None:
                i, j = self.rows[a], self.rows[b]
                variance = matrix[i, i] + matrix[j, j] - 2 * matrix[i, j]
                result.append((max(float(variance), 0.0), count - 1))
        return result

    def error(self, row: str) -> float | None:
        """Standard error of a row's mean over test images; None without scores."""
        if self.images is None or row not in self.rows:
            return None
        return math.sqrt(self.images[self.rows[row], self.rows[row]])

    def interval(self, row: str) -> tuple[float, float] | None:
        """The 95 % bootstrap interval of a row's mean over test images; None without scores."""
        import numpy as np

        if self.scores is None or row not in self.rows:
            return None
        values, counts = np.unique(self.scores[self.rows[row]], return_counts=True)
        drawn = np.random.default_rng(0).multinomial(self.n, counts / self.n, RESAMPLES)
        low, high = np.quantile(drawn @ values / self.n, [0.025, 0.975])
        return float(low), float(high)


NOTHING = Noise({}, 0, 0, None, None)


def measure(runs: pd.DataFrame) -> Noise:
    """Read the scores of one data set's runs (rows of the frame of one selection and metric).

    Seeds that not every row has are left out, so that rows stay paired.
    """
    import numpy as np

    by_row: dict[str, dict[int, Any]] = {}
    for run in runs.itertuples():
        by_row.setdefault(str(run.method), {})[int(run.seed)] = run
    common = sorted(set.intersection(*(set(s) for s in by_row.values()))) if by_row else []
    names = {name: i for i, name in enumerate(by_row)}
    if not common:
        return NOTHING
    table = np.array([[by_row[m][s].value for s in common] for m in names], dtype=float)  # (M, S)
    seeds = np.cov(table).reshape(len(names), -1) / len(common) if len(common) > 1 else None
    scores: dict[str, list[Any]] = {m: [read_scores(by_row[m][s]) for s in common] for m in names}
    lengths = Counter(len(a) for row in scores.values() for a in row if a is not None)
    n = lengths.most_common(1)[0][0] if lengths else 0
    kept = [m for m, row in scores.items() if all(a is not None and len(a) == n for a in row)]
    if n < 2 or not kept:
        return Noise(names, 0, len(common), None, seeds)
    if seeds is not None:
        chosen = [names[m] for m in kept]
        seeds = seeds[np.ix_(chosen, chosen)]
    names = {name: i for i, name in enumerate(kept)}  # rows without scores are not compared
    means = np.array([np.mean(scores[m], axis=0, dtype=np.float64) for m in kept])  # (M, N)
    images = np.cov(means).reshape(len(names), -1) / n
    binary = len(common) == 1 and bool(np.isin(means, (0.0, 1.0)).all())
    only = means @ (1 - means).T if binary else None
    return Noise(names, n, len(common), images, seeds, only, means if n <= MANY else None)


def read_scores(run: Any) -> np.ndarray | None:
    """The scores (N,) of a run, or None: not stored, or not what its metric is the mean of."""
    import numpy as np

    path = Path(run.folder) / str(run.scores)
    if not run.scores or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            key = f"{run.selection}/{run.metric}"
            if key not in arrays:
                return None
            scores = arrays[key]
        if scores.ndim != 1 or scores.dtype.kind not in "fiub":
            raise ValueError(f"{scores.dtype} of shape {scores.shape}")
    except Exception as error:  # whatever zipfile, zlib and NumPy make of a damaged file
        log.warning("%s is damaged (%s), so its row is not compared with others; run it again.",
                    path, one_line(error))  # fmt: skip
        return None
    mean = float(np.mean(scores, dtype=np.float64)) if scores.size else math.nan
    return scores if abs(mean - run.value) <= AGREE * max(1.0, abs(run.value)) else None


def p_value(members: Iterable[tuple[float, float, Noise]], a: str, b: str) -> float | None:
    """Two-sided p of no difference between two rows in a (weighted) mean over data sets.

    ``members`` are (weight, difference, noise) per data set. None where the records cannot tell:
    neither scores nor a second seed, or rows without common seeds.
    """
    from scipy import special  # its stats would be a second of imports for two functions

    parts: list[tuple[float, float, Noise]] = list(members)
    if not parts or not all(a in noise.rows and b in noise.rows for _, _, noise in parts):
        return None
    if len(parts) == 1 and parts[0][2].only is not None:
        only, rows = parts[0][2].only, parts[0][2].rows
        wins, losses = round(only[rows[a], rows[b]]), round(only[rows[b], rows[a]])
        return min(1.0, 2 * float(special.bdtr(min(wins, losses), wins + losses, 0.5)))
    sources = [noise.parts(a, b) for _, _, noise in parts]
    if not all(sources):
        return None
    weighted = [
        (weight**2 * variance, freedom)
        for (weight, _, _), found in zip(parts, sources, strict=True)
        for variance, freedom in found
    ]
    difference = math.fsum(weight * d for weight, d, _ in parts)
    variance = math.fsum(v for v, _ in weighted)
    if variance <= 0:
        return 1.0 if difference == 0 else 0.0
    freedom = variance**2 / math.fsum(v**2 / df for v, df in weighted if v > 0)
    return float(2 * special.stdtr(freedom, -abs(difference) / math.sqrt(variance)))


def holm(p_values: Mapping[Row, float]) -> dict[Row, float]:
    """Step-down correction for several comparisons (Holm 1979); at most 1."""
    result, running = {}, 0.0
    for step, row in enumerate(sorted(p_values, key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - step) * p_values[row]))
        result[row] = running
    return result


def leading(best: str, p_values: Mapping[str, float | None]) -> list[str] | None:
    """The rows that are not distinguishable from ``best``, itself included.

    Holm's correction over the rows of the column that could be compared; None if none could.
    """
    corrected = holm({row: p for row, p in p_values.items() if p is not None})
    return [best, *(row for row, p in corrected.items() if p >= ALPHA)] if corrected else None
