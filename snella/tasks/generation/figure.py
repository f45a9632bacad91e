"""Figures of generation: sample grids (Figures 9 and 14) and trade-offs between metrics.

A grid has one line per subject (its photograph, its prompt, one image per method) and shows what a
rule chooses, never a favourite: line i takes prompt number i, sample 0. A scatter shows concept
alignment against text alignment or drift, with the Pareto front drawn through the methods that no
other beats in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snella.files import atomic

MARKERS = "osD^vP*Xp"
INCH = 1.05
"""Width of one image of a grid."""


@dataclass(frozen=True)
class Line:
    """One line of a grid: photograph and images uint8 (H, W, 3), one image per method."""

    prompt: str
    photograph: np.ndarray
    images: Sequence[np.ndarray | None]


@dataclass(frozen=True)
class Point:
    """A method in a scatter, with its standard error over subjects in both directions."""

    label: str
    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0


def chosen_prompt(line: int, prompts: int) -> int:
    """The number of the prompt that line ``line`` of a grid shows."""
    return line % prompts


def grid(lines: Sequence[Line], methods: Sequence[str], note: str, file: Path) -> None:
    """Write a sample grid; a missing image is an empty frame."""
    figure, axes = _canvas(len(lines), 1 + len(methods))
    for row, line in zip(axes, lines, strict=True):
        for axis, image in zip(row, [line.photograph, *line.images], strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if image is not None:
                axis.imshow(image, interpolation="nearest" if len(image) < 128 else "antialiased")
        row[0].set_ylabel(_wrap(line.prompt), fontsize=6, rotation=0, ha="right", va="center")
    for axis, label in zip(axes[0], ["Subject", *methods], strict=True):
        axis.set_title(label, fontsize=7)
    figure.text(0.01, 0.005, note, fontsize=5.5, va="bottom")
    _save(figure, file)


def scatter(
    points: Sequence[Point], x_label: str, y_label: str, note: str, file: Path, *, less_x: bool
) -> None:
    """Write a scatter; ``less_x`` says that a smaller x is better (drift). More y is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axis = figure.subplots()
    front = pareto(points, less_x)
    for number, point in enumerate(points):
        style: dict[str, Any] = {"ms": 5, "elinewidth": 0.6, "capsize": 2, "ls": "none"}
        style |= {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}"}
        label = f"{point.label} *" if point in front else point.label
        axis.errorbar(
            point.x, point.y, xerr=point.x_error, yerr=point.y_error, label=label, **style
        )
    ordered = sorted(front, key=lambda p: p.x)
    axis.plot([p.x for p in ordered], [p.y for p in ordered], color="0.6", lw=0.8, ls="--")
    figure.legend(loc="outside right upper", fontsize=6.5, frameon=False)
    axis.set_xlabel(x_label, fontsize=8)
    axis.set_ylabel(y_label, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.margins(0.15)
    figure.supxlabel(_wrap(note, 110), fontsize=5.5, x=0.02, ha="left")
    _save(figure, file)


def pareto(points: Sequence[Point], less_x: bool) -> list[Point]:
    """The points that no other point beats in both directions at once."""
    sign = -1 if less_x else 1

    def beats(a: Point, b: Point) -> bool:
        dx, dy = sign * (a.x - b.x), a.y - b.y
        return dx >= 0 and dy >= 0 and (dx > 0 or dy > 0)

    return [p for p in points if not any(beats(other, p) for other in points)]


def _canvas(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    size = (1.3 + INCH * columns, 0.45 + INCH * rows)
    figure = Figure(figsize=size)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=1.25 / size[0], right=0.995, bottom=0.2 / size[1], top=1 - 0.25 / size[1],
        wspace=0.04, hspace=0.04,
    )  # fmt: skip
    return figure, axes


def _wrap(text: str, width: int = 20) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def _save(figure: Any, file: Path) -> None:
    """Write PDF or PNG by the file's suffix; without a date, so that it is the same every time."""
    kind = file.suffix.removeprefix(".")
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    with atomic(file) as temporary:
        figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)
