"""From the records of a search to its result: the best settings of each row, and a plot."""

from __future__ import annotations

import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from snella import results
from snella.errors import UserError
from snella.files import write_text
from snella.jobs.prepare import inputs_of
from snella.records import Record, provenance
from snella.report.frame import tidy
from snella.runs.protocol import Protocol
from snella.runs.run import Run
from snella.suite import plan
from snella.suite.config import Config, MethodOverride, Searched
from snella.suite.search import EVERY, Point
from snella.suite.settings import searched_settings
from snella.suite.status import usable

Score = float | None
LISTED = 3
HEADER = """\
# What a search of settings found. Copied to config/search/{suite}.yaml it is used by every suite
# whose protocol says `hyperparameters: search/{suite}`, and by {suite} itself with `search`.
"""


def write(config: Config) -> list[Path]:
    """Write ``search.yaml`` and ``lr_sweep.{pdf,png}`` into the folder of the suite's results.

    A trial that diverged has no score. Raises :class:`~snella.errors.UserError` while trials are
    missing or failed, unless the configuration says ``allow_missing``: those have no score either.
    """
    from snella.report.figures import lr_sweep, nothing

    trials = _trials(config)
    content = summary(config, trials).model_dump(mode="json", exclude_defaults=True)
    out = Path(config.results) / config.suite
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    write_text(out / "search.yaml", HEADER.format(suite=config.suite) + text)
    frame = tidy(trial.record for trial in trials if trial.record is not None)
    plot = out / "lr_sweep"
    try:
        return [out / "search.yaml", *lr_sweep(frame, plot, labels=results.labels(config))]
    except UserError as error:  # a grid of other settings, or rows that diverged everywhere
        return [out / "search.yaml", *nothing(str(error), plot)]


@dataclass(frozen=True)
class Done:
    """A trial, its record if it is finished and current, and its score if it has one."""

    run: Run
    record: Record | None
    state: str

    @property
    def score(self) -> Score:
        """The primary metric on the validation examples."""
        if self.record is None or self.record["status"] != "ok":
            return None
        value: float = self.record["metrics"][self.run.protocol.selection][self.record["metric"]]
        return value


def _trials(config: Config) -> list[Done]:
    found: list[Done] = []
    runs = plan.search_runs(config)
    inputs = inputs_of(config, runs)
    for run in runs:
        record, state = usable(run, inputs=inputs)
        found.append(Done(run, record, f"{run.key}: {state.reason or state.name}"))
    lost = [trial.state for trial in found if trial.record is None]
    if lost and not config.allow_missing:
        raise UserError(
            f"{len(lost)} of {len(found)} trials of the search have no result "
            f"({'; '.join(lost[:LISTED])}); `snakemake ... -- {config.results}/{config.suite}/"
            "search.yaml` runs them, and `allow_missing: true` does without them."
        )
    return found


def summary(config: Config, trials: Sequence[Done]) -> Searched:
    """All scores of the suite's search and the best settings of each row."""
    search = plan.current_suite(config).search
    first = trials[0].run
    sign = 1 if first.task.primary.higher_is_better else -1
    scores = _scores(trials)
    rows: dict[str, dict[str, MethodOverride]] = {}
    edge: dict[str, dict[str, list[str]]] = {}
    for method, by_dataset in scores.items():
        whole = {EVERY: [_mean(values) for values in zip(*by_dataset.values(), strict=True)]}
        for dataset, values in (by_dataset if search.choose == "dataset" else whole).items():
            point = _best(search.points(method), values, sign)
            if point is not None:
                found = _settings(config, first, method, dataset, point)
                rows.setdefault(method, {})[dataset] = found
            if point is not None and (names := search.at_edge(method, point)):
                edge.setdefault(method, {})[dataset] = names
    epoch = "last" if first.protocol.selection == "last" else "best"
    made = provenance()
    return Searched(
        suite=config.suite,
        command=shlex.join(["snella", *sys.argv[1:]]),
        criterion=f"{first.task.primary.title} on val, {epoch} epoch, mean over seeds",
        grid=search.grid,
        grids={row: grid for row, grid in search.rows.items() if row in scores},
        choose=search.choose,
        seeds=search.seeds,
        trials=search.trials,
        runs=len(trials),
        made={name: made[name] for name in ("git", "python", "packages", "hardware", "started")},
        edge=edge,
        failed=[trial.state for trial in trials if trial.score is None],
        rows=rows,
        scores=scores,
    )


def at_edge(found: Searched) -> list[str]:
    """A line per row whose best value is the lowest or highest tried: there may be better ones."""
    return [
        f"{method}: the best {name} is the lowest or highest tried on {', '.join(datasets)}"
        for method, entries in found.edge.items()
        for name, datasets in _by_setting(entries).items()
    ]


def _by_setting(entries: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = defaultdict(list)
    for dataset, names in entries.items():
        for name in names:
            result[name].append("all data sets" if dataset == EVERY else dataset)
    return result


def _scores(trials: Sequence[Done]) -> dict[str, dict[str, list[Score]]]:
    """The scores by row and data set in the order of the grid, each a mean over seeds."""
    found: dict[str, dict[str, dict[str, list[Score]]]] = {}
    for trial in trials:
        run = trial.run
        points = found.setdefault(run.method.name, {}).setdefault(run.dataset.name, {})
        points.setdefault(run.suite, []).append(trial.score)
    return {
        method: {name: [_mean(seeds) for seeds in points.values()] for name, points in sets.items()}
        for method, sets in found.items()
    }


def _mean(values: Sequence[Score]) -> Score:
    """The mean; none where one is missing, so that no trial wins for having broken."""
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(values) if len(known) == len(values) else None


def _best(points: Sequence[Point], scores: Sequence[Score], sign: int) -> Point | None:
    """The point with the best score, of equal ones the first; None if no trial has one."""
    known = [(sign * score, -i) for i, score in enumerate(scores) if score is not None]
    return points[-max(known)[1]] if known else None


def _settings(config: Config, run: Run, method: str, dataset: str, point: Point) -> MethodOverride:
    """The point, over what an earlier search found for other settings."""
    before = searched_settings(config, method, dataset, run.protocol.hyperparameters)
    fields = (*Protocol.model_fields, *run.task.settings.model_fields)
    own = {name: value for name, value in point.items() if name in fields}
    rest = {name: value for name, value in point.items() if name not in fields}
    return MethodOverride(
        protocol={**before.protocol, **own}, hyperparameters={**before.hyperparameters, **rest}
    )
