"""Figures from the frame: critical-difference diagram, and accuracy over the learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from snella.errors import UserError
from snella.files import atomic
from snella.report.columns import Unit, units_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from snella.report.statistics import Statistics

INCH = 72.27  # pt
WIDTH = 497.0
INK, QUIET = "#1a1a1a", "#8a8a8a"
COLOURS = ("#3b6fb6", "#c8553d", "#3c8d5a", "#8e5aa8", "#b98a1f", "#2f9c9c", "#a8466b", "#6b6b6b")
MARKERS = "osD^vP"


def critical_difference(statistics: Statistics, path: Path) -> list[Path]:
    """Draw the average ranks of a table's rows; bars join what Nemenyi's test does not separate.

    Writes ``path`` with ``.pdf`` and ``.png``, which say why there is nothing to draw where
    Friedman's test could not be made. Demšar, JMLR 7 (2006), Figure 1.
    """
    test = statistics.friedman
    if test is None or not statistics.ranks:
        return nothing("Ranks need three rows that all have run on two data sets.", path)
    labels = statistics.table.labels
    order = sorted(statistics.ranks, key=lambda m: statistics.ranks[m])
    ranks = [statistics.ranks[m] for m in order]
    groups = cliques(ranks, test.critical_difference)
    half = (len(order) + 1) // 2
    height = 0.55 + 0.12 * len(groups) + 0.17 * half
    figure, axes = _empty(WIDTH / INCH, height)
    low, high = 1.0, float(len(order))
    room = 0.34 * (high - low)
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(-(0.17 * half + 0.12 * len(groups) + 0.1), 0.45)
    _rank_axis(axes, low, high, test.critical_difference)
    for level, (first, last) in enumerate(groups, 1):
        y = -0.12 * level
        margin = 0.004 * (high - low)
        axes.plot([ranks[first] - margin, ranks[last] + margin], [y, y], color=INK, lw=2.4)
    start = -(0.12 * len(groups) + 0.17)
    for index, (method, rank) in enumerate(zip(order, ranks, strict=True)):
        left = index < half
        y = start - 0.17 * (index if left else len(order) - 1 - index)
        edge = low - 0.02 * room if left else high + 0.02 * room
        axes.plot([rank, rank, edge], [0, y, y], color=QUIET, lw=0.7)
        text = f"{labels[method]}  {rank:.1f}" if left else f"{rank:.1f}  {labels[method]}"
        side = "right" if left else "left"
        axes.text(edge, y, f" {text} ", ha=side, va="center", fontsize=7.5, color=INK)
    if statistics.table.banner:
        figure.supxlabel(statistics.table.banner, fontsize=6.5, color=QUIET)
    return _save(figure, path)


def _rank_axis(axes: Axes, low: float, high: float, critical: float) -> None:
    axes.plot([low, high], [0, 0], color=INK, lw=0.8)
    step = max(1, round((high - low) / 10))
    for tick in range(int(low), int(high) + 1):
        major = (tick - low) % step == 0 or tick == high
        axes.plot([tick, tick], [0, 0.05 if major else 0.025], color=INK, lw=0.8)
        if major:
            axes.text(tick, 0.08, str(tick), ha="center", va="bottom", fontsize=7.5, color=INK)
    end = min(low + critical, high + 0.3 * (high - low))
    axes.plot([low, low, low, end, end, end], [0.32, 0.28, 0.3, 0.3, 0.28, 0.32], color=INK, lw=1)
    text = f"critical difference {critical:.2f}"
    axes.text((low + end) / 2, 0.33, text, ha="center", va="bottom", fontsize=7.5, color=INK)


def cliques(ranks: Sequence[float], critical: float) -> list[tuple[int, int]]:
    """Maximal runs (first, last) of sorted ``ranks`` that lie within ``critical``, two at least."""
    found: list[tuple[int, int]] = []
    for first in range(len(ranks)):
        last = max(i for i in range(first, len(ranks)) if ranks[i] - ranks[first] <= critical)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def lr_sweep(
    frame: pd.DataFrame, path: Path, *, labels: Mapping[str, str] | None = None
) -> list[Path]:
    """Draw the primary metric over the learning rate, a line per method, mean over data sets.

    ``frame`` holds the runs of a search: per method the same data sets at several learning rates
    (``protocol.lr``). A method's best rate is filled; a rate that lacks a data set of the method
    is left out. Writes ``path`` with ``.pdf`` and ``.png``. Raises UserError if no method has
    two rates.
    """
    table, unit, title = sweep(frame)
    several = table.groupby("method")["lr"].nunique()
    methods = [m for m in dict.fromkeys(table["method"]) if several[m] > 1]
    if not methods:
        raise UserError("No method has runs at two learning rates; run a search first.")
    figure, axes = _empty(WIDTH / INCH, 3.2, frame=True)
    styles = itertools.cycle(itertools.product(MARKERS, COLOURS))
    for method, (marker, colour) in zip(methods, styles, strict=False):
        rows = table[table["method"] == method].sort_values("lr")
        x, y = rows["lr"].to_numpy(), rows["value"].to_numpy() * unit.scale
        name = (labels or {}).get(method, method)
        axes.plot(x, y, color=colour, lw=1.1, marker=marker, ms=3.5, mfc="white", label=name)
        best = y.argmax() if rows["higher_is_better"].iloc[0] else y.argmin()
        axes.plot(x[best], y[best], color=colour, marker=marker, ms=4.5)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", fontsize=8)
    axes.set_ylabel(f"{title} ({unit.symbol})" if unit.symbol else title, fontsize=8)
    axes.legend(
        fontsize=6.5,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        ncols=1 + (len(methods) > 20),
    )
    return _save(figure, path)


def sweep(frame: pd.DataFrame) -> tuple[pd.DataFrame, Unit, str]:
    """(method, lr, value, higher_is_better): means over data sets and seeds; unit; title.

    Where other settings vary with the rate (trials are suites), the best of them counts.
    """
    chosen = frame[
        (frame["status"] == "ok")
        & frame["primary"].eq(True)
        & frame["selected"].eq(True)
        & (frame["subset"] == "")
        & frame["value"].notna()
    ].rename(columns={"protocol.lr": "lr"})
    if chosen.empty:
        raise UserError("No finished runs to plot over the learning rate.")
    if chosen["metric"].nunique() > 1:
        found = ", ".join(sorted(chosen["metric"].unique()))
        raise UserError(
            f"The runs have different primary metrics ({found}); plot one task at once."
        )
    trial = ["method", "lr", "dataset", "suite"]
    means = chosen.groupby(trial, sort=False)["value"].mean().reset_index()
    best = "max" if chosen.iloc[0]["higher_is_better"] else "min"
    means = means.groupby(trial[:3], sort=False)["value"].agg(best).reset_index()
    wanted = means.groupby("method")["dataset"].transform("nunique")
    present = means.groupby(["method", "lr"])["dataset"].transform("nunique")
    table = means[present == wanted].groupby(["method", "lr"], sort=False)["value"].mean()
    result = table.reset_index()
    result["lr"] = result["lr"].astype(float)
    first = chosen.iloc[0]
    result["higher_is_better"] = bool(first["higher_is_better"])
    return result, units_of(first["unit"])[0], str(first["title"])


def nothing(why: str, path: Path) -> list[Path]:
    """Write ``path`` with ``.pdf`` and ``.png`` that say why there is nothing to draw."""
    figure, axes = _empty(WIDTH / INCH, 0.5)
    axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=8, color=QUIET)
    return _save(figure, path)


def _empty(width: float, height: float, *, frame: bool = False) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    if not frame:
        axes.set_axis_off()
        return figure, axes
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(labelsize=7.5, color=QUIET)
    axes.grid(axis="y", color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path) -> list[Path]:
    """Write PDF and PNG, the same bytes for the same figure."""
    written = []
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        target = path.with_name(f"{path.name}.{kind}")
        with atomic(target) as temporary:
            figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)
        written.append(target)
    return written
