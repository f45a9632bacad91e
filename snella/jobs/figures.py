"""From the predictions and records on disk to a figure, and to the examples of the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from snella.data.prepared import Prepared
from snella.errors import UserError
from snella.jobs.tables import suite_info
from snella.runs.run import Run
from snella.suite import plan
from snella.suite.config import Config
from snella.suite.status import usable
from snella.tasks import find_task
from snella.tasks.base import Gallery, Shown

MOST = 12
"""The most methods that a gallery shows: the suite's first ones, and its last."""


def draw(config: Config, name: str) -> Path:
    """Draw the figure ``name`` of the configuration below the results folder; return its PDF.

    A run that failed, is missing or stale is left out. The predictions are those of the epoch that
    the protocol selects. Raises :class:`~snella.errors.UserError` if no run is there.
    """
    runs = plan.figure_runs(config, name)
    config = plan.figure_config(config, name)
    found = [shown for run in runs if (shown := shown_run(config, run)) is not None]
    if not found:
        raise UserError(f"Figure {name!r} has no finished run to show; train its methods first.")
    file = Path(config.results) / f"{name}.pdf"
    runs[0].task.draw_figure(config.figures[name].kind, found, _note(config, runs), file)
    return file


def examples(config: Config) -> list[Gallery]:
    """Examples of the configured suite's first seed; none for a task without a gallery.

    Raises :class:`~snella.errors.UserError` if nothing of what they would show is there any more.
    """
    task = find_task(plan.suite_task(config), config.tasks)
    if not task.gallery:
        return []
    suite = plan.current_suite(config)
    title = f"{suite.title}{' (demo)' if suite.demo and 'demo' not in suite.title else ''}"
    try:
        runs = plan.plan(config, seeds=suite.seeds[:1])
        found = [shown for run in runs if (shown := shown_run(config, run)) is not None]
        names = list(dict.fromkeys(shown.method for shown in found))
        chosen = names if len(names) <= MOST else [*names[: MOST - 1], names[-1]]
        found = [shown for shown in found if shown.method in chosen]
        galleries = task.examples(found) if found else []
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{type(error).__name__}: {error}") from error
    return [replace(g, title=f"{title}: {g.title}" if g.title else title) for g in galleries]


def shown_run(config: Config, run: Run) -> Shown | None:
    """A run for a figure; None if it has not finished, or not as it is planned now."""
    from snella.runs.trainer import prediction_folder  # imports torch

    record, _ = usable(run)
    if record is None or record["status"] != "ok":
        return None
    metrics = record["metrics"].get(run.protocol.selection, record["metrics"]["last"])
    return Shown(
        method=config.methods[run.method.name].label or run.method.name,
        dataset=config.datasets[run.dataset.name].label or run.dataset.name,
        data=Prepared.open(Path(run.dataset.prepared)),
        settings=run.task_settings,
        predictions=prediction_folder(run.folder, metrics["epoch"], "test"),
        metrics=metrics,
    )


def _note(config: Config, runs: list[Run]) -> str:
    """Where the numbers come from, in one sentence."""
    suite = suite_info(config)
    seeds = sorted({run.seed for run in runs})
    text = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return f"{suite.banner or suite.title}. Backbone: {suite.label(suite.backbone)}; {text}."
