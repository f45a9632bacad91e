"""Figures of generation: sample grids (Figures 9 and 14) and trade-offs between metrics.

A grid has one line per subject (its prompt, its photograph, the unadapted model's image, one image
per method) and shows what a rule chooses, never a favourite: line i takes prompt number i, sample
0. A scatter shows concept alignment against text alignment or drift, with the Pareto front drawn
through the methods that no other beats in both. Each is written as PDF and PNG, with what it shows
as CSV beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snella.errors import UserError
from snella.tasks import panels
from snella.tasks.base import Gallery, GalleryLine, Shown
from snella.tasks.generation.prompts import fill_prompt
from snella.tasks.generation.sample import image_name, read_png
from snella.tasks.generation.settings import BASE, IMAGES

RULE = "Line i shows prompt i of its subject, sample 0; the photograph is its first."
MARKERS = "osD^vP*Xp"
SUBJECTS = 6
"""The most lines of the page's gallery."""


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


def samples(shown: Sequence[Shown], note: str, file: Path) -> None:
    """The grid of the runs ``shown``: lines are their subjects, columns their methods."""
    columns, lines, rows = sample_lines(shown)
    grid(lines, columns, f"{RULE} {note}", file)
    panels.save_csv(file, ["subject", "number", "prompt", *columns], rows)


def gallery(shown: Sequence[Shown]) -> list[Gallery]:
    """The page's examples: the grid of samples of the first subjects; a lost image is named."""
    subjects = list(dict.fromkeys(run.dataset for run in shown))[:SUBJECTS]
    runs = [run for run in shown if run.dataset in subjects]
    columns, lines, _ = sample_lines(runs, _read_if_there)
    shown_lines = [
        GalleryLine(
            line.prompt,
            [line.photograph, *line.images],
            ["", *("no image" if image is None else "" for image in line.images)],
        )
        for line in lines
    ]
    return [Gallery("", RULE, ["Photograph", *columns], shown_lines)]


def _read_if_there(file: Path) -> np.ndarray | None:
    try:
        return read_png(file)
    except UserError:
        return None


def sample_lines(
    shown: Sequence[Shown], read: Callable[[Path], np.ndarray | None] = read_png
) -> tuple[list[str], list[Line], list[list[Any]]]:
    """The grid's columns, its lines, and what each line shows: subject, prompt, files."""
    methods = list(dict.fromkeys(run.method for run in shown))
    columns = ["Unadapted", *methods] if shown[0].settings.unadapted else methods
    subjects = list(dict.fromkeys(run.dataset for run in shown))
    cells = {(run.dataset, run.method): run for run in shown}
    lines, rows = [], []
    for number, subject in enumerate(subjects):
        runs = [cells.get((subject, method)) for method in methods]
        first = next(run for run in runs if run is not None)
        templates = first.data.manifest["prompts"][: first.settings.prompts]
        prompt = number % len(templates)
        name = Path(IMAGES) / image_name(prompt, 0)
        files = [None if run is None else run.predictions / name for run in runs]
        if first.settings.unadapted:
            files.insert(0, first.predictions / BASE / name)
        text = fill_prompt(templates[prompt], "<V>", str(first.data.manifest["class_word"]))
        images = [None if path is None else read(path) for path in files]
        lines.append(Line(text, first.data.images("train")[0], images))
        rows.append([subject, prompt, text, *("" if p is None else p.as_posix() for p in files)])
    return columns, lines, rows


def tradeoff_text(shown: Sequence[Shown], note: str, file: Path) -> None:
    """Concept alignment against text alignment."""
    _tradeoff(shown, "clip_t", "Text alignment (CLIP-T)", note, file, less_x=False)


def tradeoff_drift(shown: Sequence[Shown], note: str, file: Path) -> None:
    """Concept alignment against the drift of unrelated prompts."""
    label = "Drift of unrelated prompts (less is better)"
    _tradeoff(shown, "drift", label, note, file, less_x=True)


def _tradeoff(
    shown: Sequence[Shown], metric: str, label: str, note: str, file: Path, *, less_x: bool
) -> None:
    points = [
        _point(method, metric, [run for run in shown if run.method == method])
        for method in dict.fromkeys(run.method for run in shown)
    ]
    text = "Mean ± standard error over subjects. *: on the Pareto front (dashed)."
    scatter(points, label, "Concept alignment (CLIP-I)", f"{text} {note}", file, less_x=less_x)
    front = pareto(points, less_x)
    rows = [[*astuple(point), int(point in front)] for point in points]
    panels.save_csv(
        file, ["method", metric, "clip_i", f"{metric}_error", "clip_i_error", "pareto"], rows
    )


def _point(method: str, metric: str, runs: Sequence[Shown]) -> Point:
    """Means over subjects, each the mean over its seeds, with their standard errors."""
    by_subject: dict[str, list[Any]] = {}
    for run in runs:
        numbers = [run.metrics[metric], run.metrics["clip_i"]]
        by_subject.setdefault(run.dataset, []).append(numbers)
    means = np.array([np.mean(found, axis=0) for found in by_subject.values()])  # (subjects, 2)
    n = len(means)
    errors = means.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.zeros(2)
    return Point(method, *map(float, (*means.mean(axis=0), *errors)))


def grid(lines: Sequence[Line], methods: Sequence[str], note: str, file: Path) -> None:
    """Write a sample grid; a missing image is a dash."""
    figure, axes = panels.canvas(len(lines), 1 + len(methods), note)
    for row, line in zip(axes, lines, strict=True):
        for axis, image in zip(row, [line.photograph, *line.images], strict=True):
            panels.show(axis, image)
        panels.label(row[0], line.prompt)
    panels.heads(axes[0], ["Subject", *methods])
    panels.save(figure, file)


def scatter(
    points: Sequence[Point], x_label: str, y_label: str, note: str, file: Path, *, less_x: bool
) -> None:
    """Write a scatter; ``less_x`` says that a smaller x is better (drift). More y is better."""
    from matplotlib.figure import Figure

    height = max(3.2, 0.15 * len(points))  # of the legend
    figure = Figure(figsize=(5.4, height), layout="constrained")
    axis = figure.subplots()
    front = pareto(points, less_x)
    for number, point in enumerate(points):
        style: dict[str, Any] = {"ms": 5, "elinewidth": 0.6, "capsize": 2, "ls": "none"}
        style |= {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}"}
        label = panels.plain(f"{point.label} *" if point in front else point.label)
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
    figure.supxlabel(panels.wrap(note, 110), fontsize=5.5, x=0.02, ha="left")
    panels.save(figure, file)


def pareto(points: Sequence[Point], less_x: bool) -> list[Point]:
    """The points that no other point beats in both directions at once."""
    sign = -1 if less_x else 1

    def beats(a: Point, b: Point) -> bool:
        dx, dy = sign * (a.x - b.x), a.y - b.y
        return dx >= 0 and dy >= 0 and (dx > 0 or dy > 0)

    return [p for p in points if not any(beats(other, p) for other in points)]
