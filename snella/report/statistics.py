"""Is a method better than another? Paired tests over data sets, seeds and test images.

Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006): the data
set is the unit, because seeds of one data set are not independent. So the Wilcoxon signed-rank
test sees one difference per data set (mean over paired seeds), p-values are corrected after
Holm (1979), and the confidence interval resamples data sets, then seeds within them. All rows
at once are compared by Friedman's test and Nemenyi's critical difference of average ranks.
With few data sets none of these can show anything; the notes say so. A second p-value takes the
data sets as given and asks about other test images and seeds only (:mod:`snella.report.noise`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from snella.errors import unknown
from snella.report.columns import Column, Unit
from snella.report.noise import ALPHA, holm
from snella.report.table import DASH, Cell, Table, compare_rows
from snella.report.text import Grid, Heading, Line, Section, comments

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

Scores = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Numbers by method, data set and seed."""
RESAMPLES = 10_000
LEVEL = 0.95
DECIMALS = 12  # below this, a difference is rounding noise and two are tied
COUNTS = ("datasets", "wins", "ties", "losses")
COMPARED = (
    *("method", *COUNTS, "difference", "low", "high"),
    *("p", "p_holm", "p_images", "p_images_holm"),
)


@dataclass(frozen=True)
class Friedman:
    """All rows at once: chi-squared, Iman and Davenport's F, and the critical rank difference."""

    methods: int
    datasets: int
    chi_squared: float
    p: float
    f: float
    p_f: float
    critical_difference: float


def compare(scores: Scores, reference: str, *, higher_is_better: bool = True) -> pd.DataFrame:
    """Every method of ``scores`` against ``reference``, one row each with the columns `COMPARED`.

    ``difference`` (positive: the method is better) and its interval are in the unit of the scores,
    over the data sets where both have paired seeds; NaN for fewer than two of these. Raises
    UserError if the reference is not among the methods.
    """
    import pandas as pd

    if reference not in scores:
        raise unknown("reference method", reference, scores)
    sign = 1.0 if higher_is_better else -1.0
    rows: list[dict[str, Any]] = []
    for method in scores:
        if method == reference:
            continue
        differences = paired_differences(scores[method], scores[reference], sign)
        means = [math.fsum(d) / len(d) for d in differences]
        wins, losses = sum(m > 0 for m in means), sum(m < 0 for m in means)
        counts = (len(means), wins, len(means) - wins - losses, losses)
        rows.append({"method": method, **dict(zip(COUNTS, counts, strict=True))})
        if len(means) > 1:
            low, high = bootstrap(differences)
            mean = math.fsum(means) / len(means)
            rows[-1] |= {"difference": mean, "low": low, "high": high, "p": wilcoxon(means)}
    frame = pd.DataFrame(rows, columns=list(COMPARED))
    p_values = frame.set_index("method")["p"].dropna().to_dict()
    return frame.assign(p_holm=frame["method"].map(holm(p_values)))


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


def wilcoxon(differences: Sequence[float]) -> float:
    """Exact two-sided p-value of the signed-rank test; ties get mid-ranks, zeros are dropped.

    scipy's exact distribution does not know ties, which accuracies on small test sets have. The
    distribution of the rank sum over all 2^n signs is counted, in doubled ranks so that mid-ranks
    are integers. No differences at all give 1.
    """
    from scipy.stats import rankdata

    nonzero = [r for d in differences if (r := round(d, DECIMALS)) != 0]
    doubled = [round(2 * r) for r in rankdata([abs(d) for d in nonzero])] if nonzero else []
    total = sum(doubled)
    observed = sum(r for r, d in zip(doubled, nonzero, strict=True) if d > 0)
    ways = [1] + [0] * total
    for r in doubled:
        for value in range(total, r - 1, -1):
            ways[value] += ways[value - r]
    far = abs(2 * observed - total)
    extreme = sum(n for value, n in enumerate(ways) if abs(2 * value - total) >= far)
    return float(extreme / 2 ** len(nonzero))


def bootstrap(differences: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean difference: data sets resampled, then seeds within them."""
    import numpy as np

    flat = np.concatenate([np.asarray(d, dtype=float) for d in differences])
    means = resampling(tuple(map(len, differences)), seed) @ flat
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@lru_cache(maxsize=32)  # as many as a table has blocks and groups
def resampling(lengths: tuple[int, ...], seed: int) -> np.ndarray:
    """What each of the (sum of ``lengths``) differences weighs in each resample; rows sum to 1.

    The same for all rows of a table, so that they are drawn once.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    n, longest, total = len(lengths), max(lengths), sum(lengths)
    sizes, starts = np.array(lengths), np.concatenate([[0], np.cumsum(lengths)[:-1]])
    weights = np.zeros(RESAMPLES * total)
    rows = np.arange(RESAMPLES)[:, None] * total
    for _ in range(n):  # the n draws of a data set, each for all resamples at once
        chosen = rng.integers(n, size=RESAMPLES)
        size = sizes[chosen][:, None]
        seeds = (rng.random((RESAMPLES, longest)) * size).astype(int)
        share = np.where(np.arange(longest) < size, 1 / (n * size), 0.0)
        cells = rows + starts[chosen][:, None] + seeds
        weights += np.bincount(cells.ravel(), share.ravel(), minlength=weights.size)
    return weights.reshape(RESAMPLES, total)


def complete(scores: Scores) -> pd.DataFrame:
    """Means over seeds, data sets by methods, for the data sets that every method has."""
    import pandas as pd

    means = {
        m: {d: math.fsum(seeds.values()) / len(seeds) for d, seeds in found.items()}
        for m, found in scores.items()
        if found
    }
    return pd.DataFrame(means).dropna() if means else pd.DataFrame()


def average_ranks(scores: Scores, *, higher_is_better: bool = True) -> dict[str, float]:
    """Mean rank (1 is best) over the data sets that every method with scores has."""
    table = complete(scores)
    if table.empty:
        return {}
    ranks = table.rank(axis=1, ascending=not higher_is_better).mean()
    return {str(method): float(rank) for method, rank in ranks.items()}


def friedman(scores: Scores) -> Friedman | None:
    """Friedman's test over the complete data sets; None for fewer than three rows or two sets."""
    import numpy as np
    from scipy import stats

    table = complete(scores)
    n, k = table.shape
    if k < 3 or n < 2:
        return None
    tied = (table.nunique(axis=1) == 1).all()
    statistic, p = (0.0, 1.0) if tied else stats.friedmanchisquare(*(table[m] for m in table))
    rest = n * (k - 1) - statistic
    f = (n - 1) * statistic / rest if rest > 1e-9 else math.inf
    p_f = float(stats.f.sf(f, k - 1, (k - 1) * (n - 1)))
    q = float(stats.studentized_range.ppf(LEVEL, k, np.inf)) / math.sqrt(2)
    critical = q * math.sqrt(k * (k + 1) / (6 * n))
    return Friedman(k, n, float(statistic), float(p), f, p_f, critical)


def smallest_p(datasets: int, comparisons: int) -> float:
    """The smallest Holm-corrected p that a signed-rank test over ``datasets`` can give."""
    return min(1.0, max(1, comparisons) * 2.0 ** (1 - datasets))


def datasets_needed(comparisons: int) -> int:
    """How many data sets it takes for a corrected p below the level to be possible at all."""
    return next(n for n in range(1, 100) if smallest_p(n, comparisons) <= ALPHA)


@dataclass(frozen=True)
class Statistics:
    """The comparison of a table's rows, in the unit of its first ranked metric.

    ``rows`` is the frame of :func:`compare`; its ``p_images`` take the data sets as given.
    """

    table: Table
    reference: str
    unit: Unit
    rows: pd.DataFrame
    ranks: Mapping[str, float]
    friedman: Friedman | None

    @property
    def limits(self) -> list[str]:
        """What the tests can and cannot show, with the numbers at hand."""
        tested = int(self.rows["p"].notna().sum())
        result = []
        if tested:
            datasets = int(self.rows["datasets"].max())
            least = smallest_p(datasets, tested)
            reach = "cannot" if least > ALPHA else "can"
            result.append(
                f"{datasets} data sets and {tested} comparisons: the smallest possible corrected "
                f"p of the signed-rank test is {least:.2g}, so it {reach} show a difference at "
                f"level {ALPHA:g} (that takes {datasets_needed(tested)} data sets)."
            )
        test = self.friedman
        if test is not None:
            separable = test.critical_difference < test.methods - 1
            result.append(
                f"{test.methods} rows on {test.datasets} complete data sets: Friedman χ² = "
                f"{test.chi_squared:.1f}, {_p(test.p)} (Iman–Davenport: {_p(test.p_f)}); "
                f"average ranks differ at level {ALPHA:g} if more than "
                f"{test.critical_difference:.2f} apart (Nemenyi)"
                + ("." if separable else ", more than any two can be.")
            )
        return result


def table_statistics(table: Table, reference: str) -> Statistics:
    """Compare the table's rows with ``reference``, over the data sets of its first metric.

    Raises UserError for a reference that is no row of the table.
    """
    if reference not in table.methods:
        raise unknown("reference row", reference, table.methods)
    ranked = [c for c in table.columns if c.ranked]
    quantity = ranked[0].quantity
    columns = {
        f"{c.suite.name}/{d}": replace(c, kind="dataset", members={"": (d,)}, subset="")
        for c in ranked
        if c.quantity == quantity and not c.subset
        for d in c.datasets
    }
    unit, better = quantity.units[0], quantity.higher_is_better
    scores: dict[str, dict[str, dict[int, float]]] = {m: {} for m in table.methods}
    for method, found in scores.items():
        for key, column in columns.items():
            outcome = table.results.outcome(method, column.datasets[0], column)
            if not outcome.blocked and outcome.values:
                found[key] = {s: v * unit.scale for s, v in outcome.values.items()}
    rows = compare(scores, reference, higher_is_better=better)
    p_images: dict[str, float] = {}
    for method in rows["method"]:
        shared = [columns[key] for key in scores[method] if key in scores[reference]]
        if len({c.suite.name for c in shared}) == 1:  # else the mean is of no suite
            members = {"": tuple(c.datasets[0] for c in shared)}
            mean = replace(shared[0], kind="mean_of_tasks", members=members)
            p = compare_rows(mean, table.results, method, reference)
            p_images |= {} if p is None else {method: p}
    names = rows["method"]
    rows = rows.assign(p_images=names.map(p_images), p_images_holm=names.map(holm(p_images)))
    ranks = average_ranks(scores, higher_is_better=better)
    return Statistics(table, reference, unit, rows, ranks, friedman(scores))


def mean_interval(table: Table, method: str, column: Column) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of a mean, in the column's unit.

    Of a mean over data sets these are resampled, then seeds within them; of one data set, its test
    images. None for another column, and where a data set or its scores are missing.
    """
    if column.kind == "dataset":
        scale = table.units[column.key].scale
        images = table.results.noise(column, column.datasets[0]).interval(method)
        return None if images is None else (images[0] * scale, images[1] * scale)
    if column.kind != "mean_of_tasks" or len(column.datasets) < 2:
        return None
    found = [table.results.outcome(method, name, column).values for name in column.datasets]
    if not all(found):
        return None
    scale = table.units[column.key].scale
    return bootstrap([[value * scale for value in seeds.values()] for seeds in found])


def statistics_frame(statistics: Statistics) -> pd.DataFrame:
    """All comparisons at full precision, the reference first."""
    rows = statistics.rows.set_index("method")
    frame = rows.reindex([statistics.reference, *rows.index]).reset_index()
    frame = frame.astype(dict.fromkeys(COUNTS, "Int64"))
    frame.insert(0, "reference", statistics.reference)
    return frame.assign(average_rank=frame["method"].map(dict(statistics.ranks)))


def statistics_grid(statistics: Statistics) -> Grid:
    """The comparison as a table of its own, for LaTeX, Markdown and the terminal."""
    table, labels = statistics.table, statistics.table.labels
    images = bool(statistics.rows["p_images"].notna().any())
    heads = ["Rank", "Difference", f"{LEVEL:.0%} interval", "p", "p (Holm)"]
    heads += [*(["p images (Holm)"] if images else []), "Wins/ties/losses"]
    digits = statistics.unit.digits

    def rank(method: str) -> str:
        return _number(statistics.ranks.get(method), ".1f")

    def line(row: Any) -> Line:
        low, high = (_number(v, f"+.{digits}f") for v in (row.low, row.high))
        interval = low if low == DASH else f"{low} to {high}"
        cells = [rank(row.method), _number(row.difference, f"+.{max(2, digits)}f"), interval]
        cells += map(_probability, (row.p, row.p_holm, row.p_images_holm)[: 2 + images])
        return _line(labels[row.method], [*cells, f"{row.wins}/{row.ties}/{row.losses}"])

    first = _line(
        labels[statistics.reference], [rank(statistics.reference), *[""] * (len(heads) - 1)]
    )
    body = tuple(map(line, statistics.rows.itertuples()))
    symbol, caption = statistics.unit.symbol, table.caption.rstrip(".")
    unit = f" in {'percentage points' if symbol == '%' else symbol}" if symbol else ""
    remarks = [
        f"Difference: mean over data sets{unit}, positive where the row is better, seeds paired; "
        "interval: data sets resampled, then seeds within them; p: exact "
        "two-sided Wilcoxon signed-rank test over data sets, corrected after Holm. Rank: average "
        "over the data sets that every row with results has, 1 is best.",
        *statistics.limits,
    ]
    if images:
        remarks.append(
            "p images: the same mean with the data sets taken as given, over test images and "
            "seeds; it says nothing about other data sets."
        )
    return Grid(
        name=f"{table.name}_statistics",
        caption=f"{caption}. Paired comparison with {labels[statistics.reference]}.",
        headings=tuple(map(Heading, heads)),
        sections=(Section(None, (first,)), Section(None, body, apart=True)),
        remarks=tuple(remarks),
        comments=comments(table),
    )


def _line(label: str, cells: Sequence[str]) -> Line:
    return Line(
        label, tuple(Cell(text.replace("-", "−") if text[:1] in "+-" else text) for text in cells)
    )


def _number(value: float | None, form: str) -> str:
    return DASH if value is None or math.isnan(value) else format(value, form)


def _probability(value: float) -> str:
    return "<0.001" if value < 0.001 else _number(value, ".3f")


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
