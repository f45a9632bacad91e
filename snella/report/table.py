"""A table's numbers: every cell with mean, spread, printed text, mark and reason."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from snella.errors import UserError, some
from snella.report.columns import Column, Metrics, Unit, expand_columns, expand_rows
from snella.report.frame import COST, PARAMETERS
from snella.report.noise import ALPHA, leading, p_value
from snella.report.results import Outcome, Results, column_outcome
from snella.report.spec import RowGroup, Spread, SuiteInfo, TableSpec

if TYPE_CHECKING:
    import pandas as pd

DASH = "–"
NONE_YET = "(no run yet)"
Mark = Literal["", "best", "tied"]
SELECTION_WORDS = {
    "last": "last epoch",
    "val": "best epoch on the validation images",
    "best-test": "best epoch ON THE TEST SET (best-test), optimistic",
}
RUNS = 10_000_000  # more than a table's records, so that constants have numbers of their own
CHANCE_Z = 1.645  # one-sided 5 %


@dataclass(frozen=True)
class Cell:
    """What is printed in a cell, and its numbers in the column's unit.

    ``mark``: ``best`` is beyond noise better than every other row, ``tied`` not distinguishable
    from the best; ``note`` is what a footnote says. ``values`` are by seed, ``error`` is the
    standard error over test images.
    """

    text: str = DASH
    spread: str = ""
    mark: Mark = ""
    note: str = ""
    mean: float | None = None
    std: float | None = None
    values: Mapping[int, float] = field(default_factory=dict)
    error: float | None = None


@dataclass(frozen=True)
class Table:
    """Cells by (method, column key), with all that a writer says around them.

    ``labels`` are the printed names of all rows, ``compared`` the keys of the columns whose rows
    could be compared.
    """

    name: str
    spec: TableSpec
    suite: SuiteInfo
    results: Results
    rows: list[RowGroup]
    labels: Mapping[str, str]
    columns: list[Column]
    units: Mapping[str, Unit]
    cells: Mapping[tuple[str, str], Cell]
    compared: frozenset[str]

    @property
    def shown(self) -> list[str]:
        """The names of all rows, top to bottom."""
        return [method for group in self.rows for method in group.methods]

    @property
    def methods(self) -> list[str]:
        """The names of all rows that are methods, and no constants."""
        constants = {row.name for row in self.spec.constants}
        return [method for method in self.shown if method not in constants]

    @property
    def suites(self) -> list[SuiteInfo]:
        """The suites that the columns show, left to right."""
        return list({c.suite.name: c.suite for c in self.columns}.values())

    @property
    def banner(self) -> str:
        """What a table of demo data says on its face."""
        return next((suite.banner for suite in self.suites if suite.demo), "")

    @property
    def backbone(self) -> str:
        """The printed names of the backbones."""
        shown = [
            suite.label(name)
            for suite in self.suites
            if (name := self.results.common("backbone", suite.name) or suite.backbone)
        ]
        return ", ".join(dict.fromkeys(shown)) or NONE_YET

    @property
    def protocol(self) -> str:
        """The protocols' names."""
        return self.results.common("protocol") or NONE_YET

    def label(self, column: Column) -> str:
        """The column's printed label with its unit filled in, and where lower is better so."""
        text = column.label.replace("{unit}", self.units[column.key].symbol)
        return f"{text} ↓" if column.ranked and not column.quantity.higher_is_better else text

    def full_label(self, column: Column) -> str:
        """The column's printed label behind its block."""
        return f"{column.block or ''} {self.label(column)}".lstrip()

    @property
    def caption(self) -> str:
        """The caption, with the demo banner before it and the selection after it."""
        ranked = [c.quantity.title for c in self.columns if c.ranked]
        names = {
            "suite": ", ".join(s.title for s in self.suites),
            "backbone": self.backbone,
            "protocol": self.protocol,
            "metric": ", ".join(dict.fromkeys(ranked)),
        }
        text = self.spec.caption.format(**names)
        banner = f"{self.banner}. " if self.banner else ""
        chosen = " Numbers chosen on the test set." if self.results.selection == "best-test" else ""
        return f"{banner}{text}{chosen}"

    @property
    def remarks(self) -> list[str]:
        """What the reader has to know about the numbers, one sentence each."""
        selection = SELECTION_WORDS.get(self.results.selection, self.results.selection)
        backbone = "" if self.backbone in self.caption else f"Backbone {self.backbone}. "
        result = [
            f"{backbone}Protocol {self.protocol}, {selection}, {self._spread()}.",
            self._marks(),
        ]
        result += self._columns()
        result += [f"Protocol: {note}." for note in self.results.notes]
        return list(dict.fromkeys(text for text in [*result, *self.results.origins()] if text))

    def _spread(self) -> str:
        seeds = len(self.results.seeds)
        count = f"{seeds} seeds" if seeds > 1 else "one seed"
        if self.spec.spread == "images":
            return f"{count}, mean ± standard error over test images"
        if self.spec.spread == "datasets":
            return (
                f"{count}, mean ± standard deviation over data sets "
                f"(95 % intervals of the mean: {self.name}_cells.csv)"
            )
        if seeds > 1:
            return f"{count}, mean ± sample standard deviation"
        keys = {c.key for c in self.columns if c.kind == "dataset"}
        errors = [c.error for (_, key), c in self.cells.items() if key in keys and c.error]
        if not errors:
            return count
        typical = statistics.median(errors)
        return f"{count}; standard error of a cell over test images {typical:.2g} (median)"

    def _marks(self) -> str:
        ranked = {c.key for c in self.columns if c.ranked}
        if all(cell.mean is None for (_, key), cell in self.cells.items() if key in ranked):
            return ""
        if not self.compared:
            return (
                "No number is marked as best: with one seed and no scores of single test images "
                "in the records, noise is unknown."
            )
        over_seeds = " and seeds" if len(self.results.seeds) > 1 else ""
        text = (
            "Bold: better than every other row beyond noise; underlined: not distinguishable "
            f"from the column's best (paired over test images{over_seeds}, "
            f"Holm-corrected within the column, level {ALPHA:g})."
        )
        apart = {m for rows in self.rows if rows.reference for m in rows.methods}
        reference = [self.labels[m] for m in self.methods if m in apart]
        if reference:
            text += f" {some(reference)}: reference, not ranked."
        return text

    def _columns(self) -> list[str]:
        """What columns show, said once for columns of which the same is to be said."""
        said: dict[str, list[str]] = {}
        for column in self.columns:
            name, _, text = self._about(column).partition(": ")
            if text:
                said.setdefault(text, []).append(name)
        return [f"{', '.join(names)}: {text}" for text, names in said.items()]

    def _about(self, column: Column) -> str:
        name = self.full_label(column)
        if column.kind == "value":
            return f"{name}: {column.quantity.title[0].lower()}{column.quantity.title[1:]}."
        if column.kind == "mean_of_groups" and len(column.members) > 1:
            return f"{name}: over the {len(column.members)} group means."
        tasks = len(column.datasets)
        if column.kind == "mean_of_tasks" and tasks > 1 and (column.visible or not column.block):
            return f"{name}: over the {tasks} data sets."
        return ""


def build_table(
    name: str,
    spec: TableSpec,
    suite: SuiteInfo,
    methods: Mapping[str, str],
    frame: pd.DataFrame,
    others: Mapping[str, SuiteInfo] | None = None,
) -> Table:
    """Compute all cells from the frame of records.

    ``methods`` maps the enabled methods to their labels; runs of other methods, data sets and
    suites are left out. ``others`` are the further suites that columns name. Raises UserError
    for records that may not share a table.
    """
    import pandas as pd

    frame = _of_suites(frame, [suite.name, *(others or {})])
    rows = expand_rows(spec, methods)
    shown = [m for group in rows for m in group.methods]
    frame = frame[frame["method"].isin(shown)]
    labels = {row.name: row.label for row in spec.constants} | dict(methods)
    if spec.constants:
        frame = with_constants(frame, spec)
        constants = [row.name for row in spec.constants]
        rows = [RowGroup(methods=constants, reference=True), *rows]
        shown = [*constants, *shown]
    parts = frame[frame["subset"] != ""].groupby("dataset")["subset"]
    subsets = {str(dataset): sorted(set(part)) for dataset, part in parts}
    columns = expand_columns(spec, suite, Metrics.of(frame), others, subsets)
    pairs = [(c.suite.name, d) for c in columns for d in c.datasets]
    covered = pd.MultiIndex.from_frame(frame[["suite", "dataset"]]).isin(pairs)
    results = Results(frame[covered], spec.mixed)
    units: dict[str, Unit] = {}
    cells: dict[tuple[str, str], Cell] = {}
    compared = set()
    reference = {m for group in rows if group.reference for m in group.methods}
    for column in columns:
        outcomes = {m: column_outcome(results, m, column) for m in shown}
        unit = column.quantity.unit(o.mean for o in outcomes.values() if o.mean is not None)
        units[column.key] = unit
        made = {
            m: _cell(results, m, column, outcome, unit, spec.spread)
            for m, outcome in outcomes.items()
        }
        made |= {c.name: Cell() for c in spec.constants if made[c.name].mean is None}
        if column.ranked:
            ranked = {m: cell for m, cell in made.items() if m not in reference}
            marked = mark(ranked, column, results)
            made |= marked or {}
            compared |= {column.key} if marked is not None else set()
        cells.update({(method, column.key): cell for method, cell in made.items()})
    return Table(
        name, spec, suite, results, rows, labels, columns, units, cells, frozenset(compared)
    )


def with_constants(frame: pd.DataFrame, spec: TableSpec) -> pd.DataFrame:
    """The frame with the rows of no method: any record of a data set and seed gives its numbers."""
    import pandas as pd

    parts = [frame]
    given = frame.drop_duplicates(["suite", "dataset", "seed", "selection", "subset", "metric"])
    empty = dict.fromkeys((*PARAMETERS, *COST), float("nan"))
    for number, row in enumerate(spec.constants, 1):
        for metric, recorded in row.metrics.items():
            part = given[given["metric"] == recorded]
            names = {"metric": metric, "method": row.name, "label": row.label}
            run = number * RUNS + part["run"]
            parts.append(part.assign(**names, **empty, run=run, scores="", chance=float("nan")))
    return pd.concat(parts, ignore_index=True)


def _of_suites(frame: pd.DataFrame, suites: list[str]) -> pd.DataFrame:
    """The rows of the table's suites; raises UserError if there are only others."""
    mine = frame["suite"].isin(suites)
    if len(frame) and not mine.any():
        foreign = frame["suite"].iloc[0]
        raise UserError(f"Records of suite {foreign!r} in a table of suite {suites[0]!r}.")
    return frame[mine]


def _cell(
    results: Results, method: str, column: Column, outcome: Outcome, unit: Unit, spread: Spread
) -> Cell:
    """The outcome as a cell: number, spread, standard error over test images, and notes."""
    if outcome.mean is None:
        return Cell(note=outcome.blocked)
    std = None if outcome.std is None else outcome.std * unit.scale
    error, shown, notes = None, None, [f"stale: {outcome.stale}" if outcome.stale else ""]
    if column.ranked:
        errors = {d: results.noise(column, d).error(method) for d in column.datasets}
        known = {d: e for d, e in errors.items() if e is not None}
        if len(known) == len(errors):
            parts = ((weight * known[d]) ** 2 for d, weight in column.weights.items())
            error = math.sqrt(math.fsum(parts)) * unit.scale
        shown = {"seeds": std, "images": error}.get(spread)
        if spread == "datasets":  # each the mean over seeds
            means = [results.outcome(method, d, column).mean for d in column.datasets]
            finite = [mean for mean in means if mean is not None]
            shown = statistics.stdev(finite) * unit.scale if len(finite) > 1 else None
        notes = [_lacking(results, outcome), *notes, _chance(results, column, outcome.mean, unit)]
    return Cell(
        text=unit.text(outcome.mean * unit.scale),
        spread=unit.text(shown),
        note="; ".join(filter(None, notes)),
        mean=outcome.mean * unit.scale,
        std=std,
        values={seed: v * unit.scale for seed, v in outcome.values.items()},
        error=error,
    )


def _lacking(results: Results, outcome: Outcome) -> str:
    """Which seeds have not run."""
    lacking = ", ".join(str(s) for s in results.seeds if s not in outcome.values)
    count = f"{len(outcome.values)} of {len(results.seeds)} seeds"
    return f"{count} (seed {lacking} not run)" if lacking else ""


def _chance(results: Results, column: Column, mean: float, unit: Unit) -> str:
    """Whether a row is not better than guessing, by the records' chance level."""
    known = results.chance.get((column.suite.name, column.datasets[0], column.quantity.name))
    if column.kind != "dataset" or known is None:
        return ""
    chance, size = known
    error = math.sqrt(chance * (1 - chance) / size) if size > 0 and 0 <= chance <= 1 else 0.0
    sign = 1 if column.quantity.higher_is_better else -1
    above = sign * (mean - chance) > CHANCE_Z * error
    return "" if above else f"not above chance ({unit.text(chance * unit.scale)})"


def mark(cells: Mapping[str, Cell], column: Column, results: Results) -> dict[str, Cell] | None:
    """Mark the best row, or all that noise does not separate from it; None if nothing is known."""
    rows = {m: cell for m, cell in cells.items() if cell.mean is not None}
    if len(rows) < 2:
        return None
    sign = 1 if column.quantity.higher_is_better else -1
    best = max(rows, key=lambda m: sign * (rows[m].mean or 0.0))
    p_values = {m: compare_rows(column, results, m, best) for m in rows if m != best}
    first = leading(best, p_values)
    if first is None:
        return None
    word: Mark = "best" if len(first) == 1 else "tied"
    return {m: replace(cell, mark=word if m in first else "") for m, cell in cells.items()}


def compare_rows(column: Column, results: Results, a: str, b: str) -> float | None:
    """p of no difference between two rows of a column, over test images and seeds."""
    numbers = results.values(column.quantity, column.subset)
    members = []
    for dataset, weight in column.weights.items():
        ours = numbers.get((column.suite.name, a, dataset), {})
        theirs = numbers.get((column.suite.name, b, dataset), {})
        shared = [s for s in ours if s in theirs]
        if not shared:
            return None
        difference = math.fsum(ours[s] - theirs[s] for s in shared) / len(shared)
        members.append((weight, difference, results.noise(column, dataset)))
    return p_value(members, a, b)
