"""Trade-offs: a result against what it costs, with the Pareto front, as coordinates of an SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 340, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 40
LETTER = 5.9
"""About the width of a letter in a label."""
LINE = 12
NAMED = 8
"""Up to so many points all have their labels; of more those on the front and the own rows."""
LOGARITHMIC = 12.0
"""From this ratio of largest to smallest on, the axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """A row of the table: ``x`` is what it costs (less is better), ``y`` what it reaches."""

    label: str
    x: float
    y: float
    cell: str = ""
    own: bool = False


@dataclass(frozen=True)
class Axis:
    """A title, and whether more is better."""

    title: str
    higher_is_better: bool = True


def pareto(points: Sequence[Point], y: Axis) -> list[Point]:
    """The points that no other one beats: none costs no more and is better, or vice versa."""
    sign = 1 if y.higher_is_better else -1

    def beats(a: Point, b: Point) -> bool:
        better, cheaper = sign * (a.y - b.y), b.x - a.x
        return better >= 0 and cheaper >= 0 and (better > 0 or cheaper > 0)

    front = [p for p in points if not any(beats(other, p) for other in points)]
    return sorted(front, key=lambda p: (p.x, p.y))


def draw(points: Sequence[Point], x: Axis, y: Axis) -> dict[str, Any]:
    """Coordinates of marks, labels, ticks and the front's steps, for the template."""
    to_x, x_ticks = _scale([p.x for p in points], LEFT, WIDTH - RIGHT, fixed=False)
    to_y, y_ticks = _scale([p.y for p in points], HEIGHT - BOTTOM, TOP, fixed=True)
    front = pareto(points, y)
    marks = [
        {"x": to_x(p.x), "y": to_y(p.y), "label": p.label, "cell": p.cell, "own": p.own,
         "front": p in front, "text": f"{p.label}: {p.y:.4g} at {p.x:.4g}"}
        for p in points
    ]  # fmt: skip
    marks.sort(key=lambda mark: (mark["front"], mark["own"]))
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP,
        "bottom": HEIGHT - BOTTOM, "x_title": x.title, "y_title": y.title,
        "x_ticks": [{"at": to_x(v), "text": text} for v, text in x_ticks],
        "y_ticks": [{"at": to_y(v), "text": text} for v, text in y_ticks],
        "marks": marks,
        "labels": _labels([m for m in marks if len(marks) <= NAMED or m["front"] or m["own"]]),
        "path": _steps([(to_x(p.x), to_y(p.y)) for p in front]),
        "front": [p.label for p in front],
    }  # fmt: skip


def _scale(
    values: Sequence[float], low: float, high: float, *, fixed: bool
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """From numbers to coordinates, and ticks as (number, text).

    Costs that span more than an order of magnitude are drawn on a logarithmic axis.
    """
    least, most = min(values), max(values)
    if not fixed and least > 0 and most / least > LOGARITHMIC:
        ends = math.log10(least), math.log10(most)
        margin = 0.06 * (ends[1] - ends[0])
        at = _linear(ends[0] - margin, ends[1] + margin, low, high)
        return (lambda v: at(math.log10(v))), _log_ticks(least, most)
    margin = 0.08 * (most - least) or abs(most) * 0.05 or 1.0
    at = _linear(least - margin, most + margin, low, high)
    return at, _ticks(least - margin, most + margin)


def _linear(a: float, b: float, low: float, high: float) -> Callable[[float], float]:
    return lambda v: round(low + (v - a) / (b - a) * (high - low), 1)


def _ticks(least: float, most: float) -> list[tuple[float, str]]:
    """Four to seven round numbers."""
    raw = (most - least) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    digits = max(0, -math.floor(math.log10(step)))
    first = math.ceil(least / step)
    count = math.floor(most / step) - first + 1
    return [((first + i) * step, f"{(first + i) * step:.{digits}f}") for i in range(count)]


def _log_ticks(least: float, most: float) -> list[tuple[float, str]]:
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    steps = (1,) if len(decades) > 3 else (1, 3)
    found = [m * 10.0**d for d in decades for m in steps]
    return [(v, f"{v:g}") for v in found if 0.85 * least <= v <= 1.18 * most]


def _labels(marks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Labels beside their marks, moved apart downwards where they would overlap."""
    placed: list[dict[str, Any]] = []
    for mark in sorted(marks, key=lambda m: m["y"]):
        width = LETTER * len(mark["label"])
        left = mark["x"] + 8 + width > WIDTH
        start = mark["x"] - 8 - width if left else mark["x"] + 8
        y = mark["y"] + 4
        while any(abs(y - p["y"]) < LINE and start < p["end"] and p["start"] < start + width
                  for p in placed):  # fmt: skip
            y += 2
        placed.append({
            "x": mark["x"] - 8 if left else mark["x"] + 8, "y": y, "text": mark["label"],
            "anchor": "end" if left else "start", "start": start, "end": start + width,
            "own": mark["own"],
        })  # fmt: skip
    return [label for label in placed if label["y"] < HEIGHT - BOTTOM + 4]


def _steps(points: Sequence[tuple[float, float]]) -> str:
    """The front as a staircase: what is reached for a cost, until more is paid."""
    if len(points) < 2:
        return ""
    parts = [f"M{points[0][0]} {points[0][1]}"]
    parts += [f"H{x}V{y}" for x, y in points[1:]]
    return "".join(parts)
