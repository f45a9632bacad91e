"""The runs of one table, from the frame: a number per seed, or the reason why there is none.

A failure is never a number: an outcome with a failed seed, and every mean over it, is blocked
and says why. A seed that has not run yet only narrows the outcome to the other seeds.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from snella.errors import UserError, some
from snella.report.columns import Column, Quantity
from snella.report.frame import NOT_RUN, Seeds, as_text, seeds_of
from snella.report.noise import NOTHING, Noise, measure
from snella.report.spec import CONSTANT

if TYPE_CHECKING:
    import pandas as pd

MEMBER_MISSING = "a member of this mean is missing"
WORDS = {"oom": "out of memory", "timeout": "time limit reached"}
TUNED = frozenset({"lr", "min_lr", "warmup_lr", "weight_decay", "drop_path"})
AT_CHANCE = "at chance level"  # a warning that is a footnote of the cell
STATUSES = ("ok", "diverged", "failed", "oom", "timeout", NOT_RUN)


@dataclass(frozen=True)
class Outcome:
    """A quantity per seed (as recorded, unscaled); ``blocked`` says why none may be printed."""

    values: Mapping[int, float] = field(default_factory=dict)
    blocked: str = ""
    stale: str = ""

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        if self.blocked or not self.values:
            return None
        return math.fsum(self.values.values()) / len(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        if self.mean is None or len(self.values) < 2:
            return None
        return statistics.stdev(self.values.values())


class Results:
    """The part of the frame that a table shows, indexed by suite, method and data set.

    ``selection`` is the one that the records' own protocol names. Raises UserError for a run given
    twice, or records that may not share a table.
    """

    def __init__(self, frame: pd.DataFrame, mixed: str = "refuse") -> None:
        self.frame = frame
        self.runs = frame.drop_duplicates("run")
        _no_duplicates(self.runs)
        constant = self.runs["method"].astype(str).str.startswith(CONSTANT)
        self.made = self.runs[(self.runs["status"] != NOT_RUN) & ~constant]
        self.notes: list[str] = []
        self.selection = _only(self.made, "protocol.selection") or "last"
        for _, part in self.made.groupby("suite", sort=False):
            self.notes += check_comparable(part, mixed)
        self.seeds = sorted({int(s) for s in self.runs["seed"]}) or [0]
        self._index: dict[tuple[str, str, str], dict[int, Any]] = defaultdict(dict)
        keep = ["suite", "method", "dataset", "seed", "status", "reason", "stale", "run"]
        for run in self.runs[keep].itertuples():
            self._index[run.suite, run.method, run.dataset][int(run.seed)] = run
        self._values: dict[tuple[str, str], Seeds] = {}
        self._noise: dict[tuple[str, str, str, str], Noise] = {}

    def common(self, column: str, suite: str | None = None) -> str:
        """The runs' value in a column of the frame; differing ones are joined, none is empty."""
        made = self.made if suite is None else self.made[self.made["suite"] == suite]
        return ", ".join(sorted(_tallied(made, column)))

    def counts(self) -> dict[str, int]:
        """How many runs ended in each status, and how many have not run."""
        found = Counter(self.runs["status"])
        return {status: found[status] for status in STATUSES if found[status]}

    def values(self, quantity: Quantity, subset: str) -> Seeds:
        """The finite numbers of ``quantity`` by (suite, method, data set) and seed."""
        key = (quantity.source or f"metric {quantity.name}", subset)
        if key not in self._values:
            rows, number = self.runs, quantity.source
            if not quantity.source:
                rows, number = self._rows(quantity.name, subset), "value"
            if not quantity.after_failure:
                rows = rows[rows["status"] == "ok"]
            self._values[key] = seeds_of(rows, number)
        return self._values[key]

    @cached_property
    def chance(self) -> dict[tuple[str, str, str], tuple[float, int]]:
        """(chance level, test images) by (suite, data set, metric), where the records know."""
        known = self.frame[self.frame["chance"].notna() & (self.frame["subset"] == "")]
        known = known.drop_duplicates(["suite", "dataset", "metric"])
        sizes = known["test_size"].fillna(0).astype(int)
        columns = [known[c] for c in ("suite", "dataset", "metric", "chance")]
        return {(s, d, m): (c, n) for s, d, m, c, n in zip(*columns, sizes, strict=True)}

    def _rows(self, metric: str, subset: str = "") -> pd.DataFrame:
        f = self.frame
        wanted = (f["metric"] == metric) & (f["selection"] == self.selection)
        return f[wanted & (f["subset"] == subset)]

    def outcome(self, method: str, dataset: str, column: Column) -> Outcome:
        """What ``method`` reached on ``dataset`` in the column's quantity."""
        key = (column.suite.name, method, dataset)
        runs = self._index.get(key, {})
        numbers = self.values(column.quantity, column.subset).get(key, {})
        values: dict[int, float] = {}
        pending: dict[int, str] = {}
        failed: dict[int, str] = {}
        for seed in self.seeds:
            run = runs.get(seed)
            if run is None or run.status == NOT_RUN:
                pending[seed] = NOT_RUN if run is None else run.reason
            elif seed in numbers:
                values[seed] = numbers[seed]
            else:
                failed[seed] = self._why(run, column.quantity)
        reasons = failed or ({} if values else pending)
        stale = {run.stale for seed, run in runs.items() if seed in values and run.stale}
        return Outcome(values, _per_seed(reasons, len(self.seeds)), "; ".join(sorted(stale)))

    def _why(self, run: Any, quantity: Quantity) -> str:
        if run.status != "ok":
            return f"{WORDS.get(run.status, run.status)}{': ' if run.reason else ''}{run.reason}"
        f = self.frame[self.frame["run"] == run.run]
        if not quantity.source and not (f["selection"] == self.selection).any():
            return f"no {self.selection!r} selection in this run (protocol trains on its images?)"
        return f"no finite {quantity.name} in the record"

    def noise(self, column: Column, dataset: str) -> Noise:
        """The noise of a data set's rows, from their scores and seeds."""
        key = (column.suite.name, dataset, column.quantity.name, column.subset)
        if key not in self._noise:
            self._measure(column.quantity.name, column.subset)
        return self._noise.setdefault(key, NOTHING)

    def _measure(self, metric: str, subset: str) -> None:
        """Read the noise of all data sets in a metric at once."""
        keep = ["suite", "dataset", "method", "seed", "value", "folder", "scores"]
        rows = self._rows(metric, subset)
        rows = rows[(rows["status"] == "ok") & rows["value"].notna()]
        for (suite, dataset), part in rows[[*keep, "selection", "metric"]].groupby(
            ["suite", "dataset"], sort=False
        ):
            self._noise[str(suite), str(dataset), metric, subset] = measure(part)

    def origins(self) -> list[str]:
        """What differs in where the numbers come from: commits, versions, hardware, code."""
        if self.made.empty:
            return []
        notes = []
        edited = self.made["dirty"].eq(True)
        shown = Counter(
            f"{commit[:7]} with local edits" if dirty else commit[:7]
            for commit, dirty in zip(self.made["commit"], edited, strict=True)
            if isinstance(commit, str)
        )
        if len(shown) > 1:
            notes.append(f"Runs were made at different commits: {_tally(shown)}.")
        elif shown and edited.any():
            notes.append(f"Runs were made at commit {next(iter(shown))}.")
        titles = ("python", "torch", "timm", "peft", "numpy", "hardware", "threads", "device")
        for name in titles:
            found = _tallied(self.made, name)
            if len(found) > 1:
                notes.append(f"Runs differ in {name}: {_tally(found)}.")
        code = self.made.dropna(subset=["identity.code"]).groupby("method")["identity.code"]
        mixed = [str(method) for method, n in code.nunique().items() if n > 1]
        if mixed:
            notes.append(f"Rows whose runs were made by different code: {some(mixed)}.")
        for name, n in _tallied(self.made, "protocol.hyperparameters").items():
            if name.startswith("search/"):
                part = "" if n == len(self.made) else f" of {n} of {len(self.made)} runs"
                notes.append(
                    f"Settings{part} are those of {name}: chosen on validation examples, after "
                    "as many trials for every row."
                )
        notes += self._warnings()
        stale = int((self.made["stale"] != "").sum())
        if stale:
            notes.append(
                f"{stale} of {len(self.made)} runs do not fit the current configuration (stale)."
            )
        return notes

    def _warnings(self) -> list[str]:
        """Warnings of the runs, the most frequent first, with the rows if these are not all."""
        warned: dict[str, list[str]] = defaultdict(list)
        for method, texts in zip(self.made["method"], self.made["warnings"], strict=True):
            for text in str(texts).split("\n"):
                if text and text != AT_CHANCE:
                    warned[text].append(str(method))
        rows, runs = set(self.made["method"]), len(self.made)
        found = []
        for text, methods in sorted(warned.items(), key=lambda item: -len(item[1])):
            names = list(dict.fromkeys(methods))
            of = "" if len(names) == len(rows) else f" ({some(names)})"
            found.append(f"Warning of {len(methods)} of {runs} runs{of}: {text}.")
        return found


def combine(members: Sequence[tuple[str, Outcome]], *, visible: bool) -> Outcome:
    """The mean over ``members`` (label, outcome) per seed, for the seeds that all of them have.

    ``visible`` says that the members are columns of their own, so that a reader finds the
    reasons there; otherwise they are listed.
    """
    blocked = [(label, outcome.blocked) for label, outcome in members if outcome.blocked]
    if blocked:
        return Outcome({}, MEMBER_MISSING if visible else _list_reasons(blocked))
    seeds = sorted(set.intersection(*(set(outcome.values) for _, outcome in members)))
    if not seeds:
        return Outcome({}, "no seed has run on every member of this mean")
    stale = "; ".join(sorted({o.stale for _, o in members if o.stale}))
    values = {s: math.fsum(o.values[s] for _, o in members) / len(members) for s in seeds}
    return Outcome(values, stale="" if visible else stale)


def column_outcome(results: Results, method: str, column: Column) -> Outcome:
    """What ``method`` reached in a column: one data set, or a mean of one of the two kinds."""
    home = column.suite
    groups = {
        home.label(group): [(home.label(d), results.outcome(method, d, column)) for d in datasets]
        for group, datasets in column.members.items()
    }
    tasks = [task for group in groups.values() for task in group]
    if column.kind == "dataset":
        return tasks[0][1]
    if column.kind == "mean_of_groups":
        means = [(g, combine(ts, visible=False)) for g, ts in groups.items()]
        return combine(means, visible=column.visible)
    return combine(tasks, visible=column.visible)


def check_comparable(runs: pd.DataFrame, mixed: str) -> list[str]:
    """Refuse runs of a suite that may not share a table; return notes on differences that may.

    Rows are compared within a column, so within a data set every protocol field but the tuned
    ones (learning rates, weight decay, drop path) has to agree, and the backbone in all of them.
    Hyper-parameters released or searched per method and ``mixed="note"`` turn a differing protocol
    into a note.
    """
    _only(runs, "backbone")
    fields = [c for c in runs.columns if c.startswith("protocol.")]
    fields = [c for c in fields if c.removeprefix("protocol.") not in TUNED | {"selection"}]
    notes: dict[str, list[str]] = defaultdict(list)
    for dataset, rows in runs.groupby("dataset"):
        kinds = rows[fields].astype(str).nunique()
        released = rows.get("protocol.hyperparameters")
        own = released is not None and released.astype(str).str.match("released|search/").all()
        allowed = mixed == "note" or bool(own)
        for name in kinds[kinds > 1].index:
            text = _difference(rows, name)
            if not allowed:
                raise UserError(
                    f"Records on {dataset} differ in protocol field {text}. Rerun them under one "
                    "protocol, or set `mixed: note` in the table."
                )
            notes[text].append(str(dataset))
    return [f"rows differ on {some(names)} in {text}" for text, names in notes.items()]


def _difference(rows: pd.DataFrame, name: str) -> str:
    """A protocol field in which rows differ, each value with one method that has it."""
    shown = {_plain(v): m for v, m in zip(rows[name], rows["method"], strict=True)}
    values = ", ".join(f"{value} ({method})" for value, method in sorted(shown.items()))
    return f"{name.removeprefix('protocol.')}: {values}"


def _plain(value: Any) -> str:
    return "none" if value is None or value != value else str(value)


def _tallied(runs: pd.DataFrame, column: str) -> Counter[str]:
    """How often each value of a column occurs, as text, without the missing ones."""
    found: Counter[str] = Counter()
    if column in runs.columns:
        for value, count in runs[column].value_counts().items():
            if value != "":
                found[as_text(value)] += int(count)
    return found


def _only(runs: pd.DataFrame, column: str) -> str:
    """The one value that all runs have (empty: none does); raises UserError if they differ."""
    values = sorted(_tallied(runs, column))
    if len(values) > 1:
        name = column.removeprefix("protocol.")
        raise UserError(
            f"Records of one table differ in {name}: {', '.join(values)}; make one table for each."
        )
    return values[0] if values else ""


def _no_duplicates(runs: pd.DataFrame) -> None:
    names = ["suite", "dataset", "method", "seed"]
    twice = runs[runs.duplicated(names)]
    if len(twice):
        first = twice.iloc[0]
        raise UserError(
            f"Two records of {first['method']} on {first['dataset']}, seed {first['seed']}; "
            "keep one."
        )


def _per_seed(reasons: Mapping[int, str], n_seeds: int) -> str:
    if not reasons:
        return ""
    if len(reasons) == n_seeds and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    if n_seeds == 1:
        return "; ".join(reasons.values())
    return "; ".join(f"seed {seed} {reason}" for seed, reason in reasons.items())


def _list_reasons(blocked: Sequence[tuple[str, str]]) -> str:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for label, reason in blocked:
        by_reason[reason].append(label)
    return "; ".join(f"{some(labels)}: {reason}" for reason, labels in by_reason.items())


def _tally(counts: Counter[str]) -> str:
    return ", ".join(f"{text} ({n})" for text, n in counts.most_common())
