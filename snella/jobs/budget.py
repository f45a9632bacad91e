"""What the runs of a suite cost before they run: by measured seconds per image, or not measured."""

from __future__ import annotations

import json
import operator
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snella.data.official import OFFICIAL
from snella.errors import UserError, some
from snella.jobs.inputs import missing_of
from snella.jobs.prepare import inputs_of
from snella.results import read, record_folders
from snella.runs.run import Run
from snella.suite import plan
from snella.suite.config import Config
from snella.suite.search import FOLDER
from snella.suite.status import Inputs, state

FINISHED = ("done", "diverged")
PAPER = "paper"
"""Stands for every suite that is no demonstration."""
LISTED = 4


@dataclass(frozen=True)
class Measured:
    """What runs of one row on one backbone took: seconds per image, and bytes on disk."""

    train: float
    inference: float
    size: int
    hardware: str


Known = Mapping[tuple[str, str], Measured]
"""By backbone and row."""


@dataclass(frozen=True)
class Budget:
    """Runs to do and what they take; ``seconds`` is by hardware, for the rows that were measured.

    ``unmeasured`` are rows without a record on the backbone, ``unsized`` data sets of unknown size.
    """

    title: str
    shape: str
    runs: int
    done: int
    seconds: dict[str, float]
    unmeasured: list[str]
    unsized: list[str]
    size: int
    free: int
    prepared: str
    missing: list[str]

    def lines(self) -> list[str]:
        """The budget in a few lines."""
        found = [f"{self.title}: {self.shape} = {self.runs:,} runs, {self.done:,} done"]
        todo = self.runs - self.done
        if todo:
            found.append(f"  time: {self._time()}")
            disk = f"about {_bytes(self.size)}" if self.size else "not measured"
            found.append(f"  disk: {disk}; {_bytes(self.free)} free")
        found.append(f"  prepared: {self.prepared}")
        return [*found, *(f"  missing: {line}" for line in self.missing)]

    def _time(self) -> str:
        hours = [f"about {s / 3600:,.1f} hours on {name}" for name, s in self.seconds.items()]
        for names, what in ((self.unmeasured, "row"), (self.unsized, "data set")):
            if names:
                hours.append(f"not measured: {_count(len(names), what)} ({some(names, LISTED)})")
        return "; ".join(hours)


def suites(config: Config, names: Sequence[str]) -> list[Budget]:
    """The budgets of the named suites; ``paper`` stands for all that are no demonstration."""
    paper = [name for name, suite in config.suites.items() if not suite.demo]
    wanted = [n for name in names for n in (paper if name == PAPER else [name])]
    known = measured(config)
    found = []
    for name in dict.fromkeys(wanted):
        own = plan.with_suite(config, name)
        found.append(budget(own, plan.plan(own), f"suite {name}", known))
    return found


def total(budgets: Sequence[Budget]) -> str:
    """A line for all budgets together."""
    seconds: dict[str, float] = defaultdict(float)
    for one in budgets:
        for hardware, value in one.seconds.items():
            seconds[hardware] += value
    hours = [f"about {s / 3600:,.1f} hours on {name}" for name, s in seconds.items()]
    gaps = sum(bool(one.unmeasured or one.unsized) for one in budgets)
    hours += [f"not measured in full: {_count(gaps, 'suite')}"] if gaps else []
    runs, done = sum(one.runs for one in budgets), sum(one.done for one in budgets)
    return f"all: {runs:,} runs, {done:,} done; time: {'; '.join(hours) or 'none'}"


def search(config: Config, runs: Sequence[Run]) -> Budget:
    """The budget of the suite's search."""
    trials = plan.current_suite(config).search.trials
    title = f"search of suite {config.suite}"
    return budget(config, runs, title, measured(config), f" x {trials} trials")


def budget(config: Config, runs: Sequence[Run], title: str, known: Known, more: str = "") -> Budget:
    """What ``runs`` cost, given what runs of these rows took."""
    seconds: dict[str, float] = defaultdict(float)
    unmeasured: dict[str, None] = {}
    unsized: dict[str, None] = {}
    sizes = {name: split_sizes(config, name) for name in {run.dataset.name for run in runs}}
    inputs = inputs_of(config, runs)
    todo = [run for run in runs if not _finished(run, inputs)]
    size = 0
    for run in todo:
        cost = known.get((run.backbone.name, run.method.name))
        images = _images(run, sizes[run.dataset.name])
        if cost is None:
            unmeasured[run.method.name] = None
        elif images is None:
            unsized[run.dataset.name] = None
        else:
            seconds[cost.hardware] += images[0] * cost.train + images[1] * cost.inference
        size += cost.size if cost is not None else 0
    counts = [len({pick(run) for run in runs}) for pick in (_row, _column, _seed)]
    rows, columns, seeds = map(_count, counts, ("row", "data set", "seed"))
    ready = sum(plan.manifest(config, name).exists() for name in sizes)
    return Budget(
        title=title,
        shape=f"{rows}{more} x {columns} x {seeds}",
        runs=len(runs),
        done=len(runs) - len(todo),
        seconds=dict(seconds),
        unmeasured=list(unmeasured),
        unsized=list(unsized),
        size=size,
        free=_free(Path(config.results)),
        prepared=f"{ready} of {_count(len(sizes), 'data set')}",
        missing=missing_of(config, todo),
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _row(run: Run) -> str:
    return run.method.name


def _column(run: Run) -> str:
    return run.dataset.name


def _seed(run: Run) -> int:
    return run.seed


def measured(config: Config) -> dict[tuple[str, str], Measured]:
    """The median over all records below the results, of trials too, by backbone and row."""
    found: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for top in (Path(config.results), Path(config.results) / FOLDER):
        for folder in record_folders(top) if (top / "runs").is_dir() else ():
            try:
                record = read(folder) or {}
            except UserError:  # damaged: the list of runs says so
                continue
            cost = record.get("cost") or {}
            if record.get("status") == "ok" and cost.get("train_seconds_per_image"):
                run = record["run"]
                found[run["backbone"], run["method"]].append(_measured(record, cost, folder))
    return {key: _typical(group) for key, group in found.items()}


def _measured(record: Mapping[str, Any], cost: Mapping[str, Any], folder: Path) -> Measured:
    hardware = (record.get("provenance") or {}).get("hardware") or {}
    return Measured(
        cost["train_seconds_per_image"],
        cost.get("inference_seconds_per_image") or 0.0,
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        f"{hardware.get('gpu') or hardware.get('cpu') or 'unknown hardware'}",
    )


def _typical(group: Sequence[Measured]) -> Measured:
    """The medians on the hardware of most records."""
    hardware = Counter(one.hardware for one in group).most_common(1)[0][0]
    own = [one for one in group if one.hardware == hardware]
    return Measured(
        statistics.median(one.train for one in own),
        statistics.median(one.inference for one in own),
        round(statistics.median(one.size for one in own)),
        hardware,
    )


def split_sizes(config: Config, name: str) -> dict[str, int] | None:
    """Examples per split: as prepared, else as published, else unknown."""
    try:
        counts = json.loads(plan.manifest(config, name).read_bytes())["counts"]
        return {split: operator.index(count) for split, count in counts.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        official = OFFICIAL.get(str(config.datasets[name].options.get("official")))
    if official is None:
        return None
    return {"train": official.train, "val": official.val, "test": official.test}


def _images(run: Run, sizes: Mapping[str, int] | None) -> tuple[int, int] | None:
    """How many images a run trains on and predicts, counted as often as it sees them."""
    if sizes is None:
        return None
    protocol, val = run.protocol, sizes.get("val", 0)
    train = sizes["train"] + (val if protocol.train_split == "trainval" else 0)
    if run.settings.get("drop_last") and train >= protocol.batch_size:
        train -= train % protocol.batch_size
    steps = max(-(-train // protocol.batch_size), 1)
    epochs = protocol.total_epochs(max(-(-steps // protocol.accumulation), 1))
    looks = sum(protocol.looks(epoch, epochs) for epoch in range(epochs))
    looked = sizes.get(run.dataset.scored, 0)
    if run.dataset.scored == "test" and protocol.train_split == "train":
        looked += val
    return train * epochs, looks * looked


def _finished(run: Run, inputs: Inputs) -> bool:
    try:
        return state(run, inputs).name in FINISHED
    except UserError:
        return False


def _free(folder: Path) -> int:
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(above).free


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
