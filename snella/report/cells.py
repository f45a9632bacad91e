"""From records to outcomes: one number per seed, or the reason why there is none.

A failure is never a number: an outcome with a failed seed, and every mean over it, is blocked
and says why. A seed that has not run yet only narrows the outcome to the other seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snella.errors import UserError
from snella.records import READABLE, STATUSES
from snella.report.metrics import Quantity

Record = Mapping[str, Any]
NOT_RUN = "not run"
MEMBER_MISSING = "a member of this mean is missing"
WORDS = {"oom": "out of memory", "timeout": "time limit reached"}
TUNED = frozenset({"lr", "min_lr", "warmup_lr", "weight_decay", "drop_path"})
LISTED = 3


@dataclass(frozen=True)
class Missing:
    """A run that a table expects and that has left no record."""

    method: str
    dataset: str
    seed: int
    reason: str = NOT_RUN


@dataclass(frozen=True)
class Outcome:
    """A quantity per seed (as recorded, unscaled); ``blocked`` says why none may be printed."""

    values: Mapping[int, float] = field(default_factory=dict)
    blocked: str = ""

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        if self.blocked or not self.values:
            return None
        return math.fsum(self.values.values()) / len(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        mean, n = self.mean, len(self.values)
        if mean is None or n < 2:
            return None
        return math.sqrt(math.fsum((v - mean) ** 2 for v in self.values.values()) / (n - 1))


class Board:
    """All runs of one table, by method, data set and seed.

    ``selection`` None takes the one that the records' own protocol names. Raises UserError for
    a run given twice, a record of another schema, or records that may not share a table.
    """

    def __init__(
        self, runs: Iterable[Record | Missing], selection: str | None = None, mixed: str = "refuse"
    ) -> None:
        self._runs: dict[tuple[str, str], dict[int, Record | Missing]] = defaultdict(dict)
        for run in runs:
            method, dataset, seed = _key(run)
            if seed in self._runs[method, dataset]:
                raise UserError(f"Two records of {method} on {dataset}, seed {seed}; keep one.")
            self._runs[method, dataset][seed] = run
        self.seeds = sorted({seed for runs in self._runs.values() for seed in runs}) or [0]
        self.records = [
            run
            for runs in self._runs.values()
            for run in runs.values()
            if not isinstance(run, Missing)
        ]
        self.notes = check_comparable(self.records, mixed, chosen=selection is not None)
        selections = {r["protocol"]["selection"] for r in self.records}
        self.selection = selection or (selections.pop() if selections else "last")

    def common(self, *path: str) -> str:
        """The value at ``path`` of the records; differing ones are joined, none is empty."""
        found: set[str] = set()
        for record in self.records:
            node: Any = record
            for key in path:
                node = node.get(key) if isinstance(node, Mapping) else None
            if node is not None:
                found.add(str(node))
        return ", ".join(sorted(found))

    def counts(self) -> dict[str, int]:
        """How many runs ended in each status, and how many have not run."""
        result = dict.fromkeys((*STATUSES, NOT_RUN), 0)
        for runs in self._runs.values():
            for run in runs.values():
                result[NOT_RUN if isinstance(run, Missing) else run["status"]] += 1
        return {status: n for status, n in result.items() if n}

    def outcome(self, method: str, dataset: str, quantity: Quantity) -> Outcome:
        """What ``method`` reached on ``dataset``."""
        runs = self._runs.get((method, dataset), {})
        values: dict[int, float] = {}
        pending: dict[int, str] = {}
        failed: dict[int, str] = {}
        for seed in self.seeds:
            run = runs.get(seed, Missing(method, dataset, seed))
            if isinstance(run, Missing):
                pending[seed] = run.reason
                continue
            number = quantity.read(run, self.selection)
            if number is not None and not math.isfinite(number):
                number = None
            if number is not None and (run["status"] == "ok" or quantity.after_failure):
                values[seed] = number
            else:
                failed[seed] = _why(run, quantity, self.selection)
        reasons = failed or ({} if values else pending)
        return Outcome(values, _per_seed(reasons, len(self.seeds)))


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
    return Outcome({s: math.fsum(o.values[s] for _, o in members) / len(members) for s in seeds})


def check_comparable(records: Sequence[Record], mixed: str, *, chosen: bool) -> list[str]:
    """Refuse records that may not share a table; return notes on differences that may.

    Rows are compared within a column, so within a data set every protocol field but the tuned
    ones (learning rates, weight decay, drop path) has to agree; suite, backbone and, unless the
    reader ``chosen`` one, selection have to agree in the whole table. Hyper-parameters released
    per method and ``mixed="note"`` turn a differing protocol into a note.
    """
    for name in ("suite", "backbone"):
        _agree({str(r["run"][name]) for r in records}, name)
    if not chosen:
        _agree({str(r["protocol"]["selection"]) for r in records}, "selection")
    notes: dict[str, list[str]] = defaultdict(list)
    for dataset in sorted({r["run"]["dataset"] for r in records}):
        rows = [r for r in records if r["run"]["dataset"] == dataset]
        released = all(r["protocol"].get("hyperparameters") == "released" for r in rows)
        for text in _differences(rows):
            if mixed != "note" and not released:
                raise UserError(
                    f"Records on {dataset} differ in protocol field {text}. Rerun them under one "
                    "protocol, or set `mixed: note` in the table."
                )
            notes[text].append(dataset)
    return [f"rows differ on {_some(datasets)} in {text}" for text, datasets in notes.items()]


def _differences(rows: Sequence[Record]) -> list[str]:
    """The protocol fields in which ``rows`` differ, each value with one method that has it."""
    result = []
    for name in sorted({name for r in rows for name in r["protocol"]} - TUNED - {"selection"}):
        shown = {str(r["protocol"].get(name)): r["run"]["method"] for r in rows}
        if len(shown) > 1:
            values = ", ".join(f"{value} ({method})" for value, method in sorted(shown.items()))
            result.append(f"{name}: {values}")
    return result


def _agree(values: set[str], name: str) -> None:
    if len(values) > 1:
        raise UserError(
            f"Records of one table differ in {name}: {', '.join(sorted(values))}; "
            "make one table for each."
        )


def _key(run: Record | Missing) -> tuple[str, str, int]:
    if isinstance(run, Missing):
        return run.method, run.dataset, run.seed
    name = run.get("run", {})
    if run.get("schema") not in READABLE:
        raise UserError(
            f"The record of {name.get('method')} on {name.get('dataset')}, seed "
            f"{name.get('seed')}, has schema {run.get('schema')}, this version reads schemas "
            f"{READABLE}; delete the file and rerun the run."
        )
    return name["method"], name["dataset"], int(name["seed"])


def _why(record: Record, quantity: Quantity, selection: str) -> str:
    status = record["status"]
    if status != "ok":
        reason = " ".join(str(record.get("reason") or "").split())
        return f"{WORDS.get(status, status)}{': ' if reason else ''}{reason}"
    if not quantity.path and selection not in record.get("metrics", {}):
        return f"no {selection!r} selection in this run (protocol trains on its images?)"
    return f"no finite {quantity.name} in the record"


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
    return "; ".join(f"{_some(labels)}: {reason}" for reason, labels in by_reason.items())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
