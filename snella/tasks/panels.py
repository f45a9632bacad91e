"""Grids of pictures with labels and a note, as PDF and PNG: what figures of tasks share."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snella.files import atomic

LEFT = 1.25
"""Inches for the labels of the lines."""
CHARACTERS = 22
"""Characters of the note per inch."""


def canvas(rows: int, columns: int, note: str, inch: float = 1.05, gap: float = 0.04) -> Any:
    """A figure and its square axes (rows, columns) of ``inch`` inches, the note below.

    ``gap`` is what lies between two lines, as a share of a panel.
    """
    from matplotlib.figure import Figure

    width = LEFT + inch * columns
    text = wrap(note, int(CHARACTERS * width))
    bottom, top = 0.1 * (text.count("\n") + 1) + 0.08 + inch * gap, 0.36
    figure = Figure(figsize=(width, bottom + inch * rows + top))
    axes = figure.subplots(rows, columns, squeeze=False)
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=LEFT / width, right=1 - 0.02 / width, bottom=bottom / height, top=1 - top / height,
        wspace=0.04, hspace=gap,
    )  # fmt: skip
    figure.text(0.03 / width, 0.04 / height, text, fontsize=5.5, va="bottom")
    return figure, axes


def show(axis: Any, image: Any) -> None:
    """An image (H, W, 3) without ticks, small ones in sharp pixels; a dash where it is None."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(linewidth=0.4, color="0.5")
    if image is None:
        axis.text(0.5, 0.5, "–", ha="center", va="center", transform=axis.transAxes)
    else:
        axis.imshow(image, interpolation="nearest" if len(image) < 128 else "antialiased")


def label(axis: Any, text: str) -> None:
    """What a line shows, on the left of its first axis."""
    axis.set_ylabel(wrap(text, 20), fontsize=6, rotation=0, ha="right", va="center")


def heads(axes: Sequence[Any], titles: Sequence[str]) -> None:
    """The titles of the columns, above the first line."""
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(wrap(title, 17), fontsize=7)


def wrap(text: str, width: int) -> str:
    """``text`` in lines of ``width`` characters, as it is."""
    return plain("\n".join(textwrap.wrap(text, width)))


def plain(text: str) -> str:
    """``text`` whose dollar signs begin no formula of matplotlib."""
    return text.replace("$", r"\$")


def save(figure: Any, file: Path) -> None:
    """Write PDF and PNG; without a date, so that they are the same every time."""
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        with atomic(file.with_suffix(f".{kind}")) as temporary:
            figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)


def save_csv(file: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write what the figure ``file`` shows beside it."""
    with (
        atomic(file.with_suffix(".csv")) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        csv.writer(stream).writerows([head, *rows])
