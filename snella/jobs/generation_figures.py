"""The figures of generation, from the images and records of a suite's runs.

Figures 9 and 14 of the SNELLA paper show one image per method for every subject; which prompt and
which sample is a rule (:func:`~snella.tasks.generation.figure.chosen_prompt`). The third figure
shows what fidelity costs in text alignment and in drift.

    python -m snella.jobs.generation_figures figure9 --out results/figure9.pdf
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snella.errors import UserError, unknown
from snella.records import read_record
from snella.runs.run import Run
from snella.suite import config as configuration
from snella.suite import plan
from snella.suite.config import Config

TABLE = "table6"
"""The table whose suite and rows the figures show."""
FIGURES: dict[str, list[str] | None] = {
    "figure9": ["lora-8", "snella-8"],
    "figure14": ["snella-8-linear", "snella-8"],
    "samples": None,
    "tradeoff_text": None,
    "tradeoff_drift": None,
}
"""The methods of each figure; None means all of the table's."""
LINES = 8
"""The most subjects that a grid shows: the first of each of the suite's groups in turn."""


def runs(config: Config, figure: str) -> list[Run]:
    """The runs that a figure shows: its methods, on the subjects, with the first seed.

    Raises :class:`~snella.errors.UserError` for an unknown figure, or one whose methods are not
    in the suite.
    """
    if figure not in FIGURES:
        raise unknown("figure", figure, FIGURES)
    config = plan.for_table(config, TABLE)
    listed = [name for _, names in plan.table_methods(config, TABLE) for name in names]
    wanted = FIGURES[figure]
    methods = listed if wanted is None else [m for m in wanted if m in listed]
    if not methods:
        raise UserError(f"None of the methods of {figure} is in suite {config.suite!r}.")
    seeds = plan.current_suite(config).seeds
    seeds = seeds if figure.startswith("tradeoff") else seeds[:1]
    return plan.plan(config, methods=methods, seeds=seeds)


def records(config: Config, figure: str) -> list[str]:
    """The records that a figure waits for, as paths."""
    return [run.record.as_posix() for run in runs(config, figure)]


def write(config: Config, figure: str, out: Path) -> None:
    """Draw ``figure`` into ``out`` (.pdf or .png).

    Raises :class:`~snella.errors.UserError` where a run has no finished record.
    """
    found = [(run, _record(run)) for run in runs(config, figure)]
    labels = {name: entry.label or name for name, entry in config.methods.items()}
    if figure.startswith("tradeoff"):
        _tradeoff(figure, found, labels, out)
    else:
        _grid(found, labels, out)


def _record(run: Run) -> dict[str, Any]:
    record = read_record(run.folder)
    if record is None or record["status"] != "ok":
        raise UserError(f"{run.key} has no finished record; make the table {TABLE} first.")
    return dict(record)


def _grid(found: Sequence[tuple[Run, dict[str, Any]]], labels: dict[str, str], out: Path) -> None:
    from snella.data.prepared import Prepared
    from snella.tasks.generation.figure import Line, chosen_prompt, grid
    from snella.tasks.generation.prompts import fill_prompt
    from snella.tasks.generation.sample import image_name, read_png
    from snella.tasks.generation.settings import IMAGES

    methods = list(dict.fromkeys(run.method.name for run, _ in found))
    subjects = list(dict.fromkeys(run.dataset.name for run, _ in found))
    chosen = subjects[:: max(1, math.ceil(len(subjects) / LINES))]
    by_cell = {(run.dataset.name, run.method.name): (run, record) for run, record in found}
    lines = []
    for number, subject in enumerate(chosen):
        run, _ = by_cell[subject, methods[0]]
        data = Prepared.open(Path(run.dataset.prepared))
        templates = data.manifest["prompts"][: run.settings.get("prompts")]
        prompt = chosen_prompt(number, len(templates))
        images: list[np.ndarray | None] = []
        for method in methods:
            cell, record = by_cell[subject, method]
            epoch = record["metrics"]["last"]["epoch"]
            folder = cell.folder / "predictions" / f"epoch{epoch:04d}" / "test" / IMAGES
            images.append(read_png(folder / image_name(prompt, 0)))
        word = str(data.manifest["class_word"])
        text = fill_prompt(templates[prompt], "<V>", word)
        lines.append(Line(text, data.images("train")[0], images))
    first = found[0][0]
    note = (
        f"Suite {first.suite}, backbone {first.backbone.name}, seed {first.seed}. By rule: line i "
        "shows prompt i of its subject, sample 0; the photograph is the first."
    )
    grid(lines, [labels[m] for m in methods], note, out)


def _tradeoff(
    figure: str, found: Sequence[tuple[Run, dict[str, Any]]], labels: dict[str, str], out: Path
) -> None:
    from snella.tasks.generation.figure import Point, scatter

    by_text = figure == "tradeoff_text"
    metric = "clip_t" if by_text else "drift"
    points = []
    for method in dict.fromkeys(run.method.name for run, _ in found):
        mine = [record["metrics"]["last"] for run, record in found if run.method.name == method]
        x, y = np.array([m[metric] for m in mine]), np.array([m["clip_i"] for m in mine])
        errors = [v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for v in (x, y)]
        points.append(Point(labels[method], x.mean(), y.mean(), *map(float, errors)))
    run = found[0][0]
    label = "Text alignment (CLIP-T)" if by_text else "Drift of unrelated prompts (less is better)"
    note = (
        f"Suite {run.suite}, backbone {run.backbone.name}; mean ± standard error over subjects and "
        "seeds. *: on the Pareto front (dashed)."
    )
    scatter(points, label, "Concept alignment (CLIP-I)", note, out, less_x=not by_text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one figure; a user's mistake is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m snella.jobs.generation_figures")
    parser.add_argument("figure")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overlay", default="{}", help="further settings as JSON")
    options = parser.parse_args(arguments)
    try:
        config = configuration.load(overrides=json.loads(options.overlay))
        write(config, options.figure, options.out)
    except UserError as error:
        sys.stderr.write(f"snella: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
