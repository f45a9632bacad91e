"""A table's numbers: every cell with mean, spread, printed text, mark and reason."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from snella.errors import UserError
from snella.report.columns import Column, Metrics, Unit, expand_columns, expand_rows
from snella.report.frame import COST, PARAMETERS
from snella.report.noise import ALPHA, leading, p_value
from snella.report.results import Outcome, Results, column_outcome, some
from snella.report.spec import RowGroup, SuiteInfo, TableSpec

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
    def demo(self) -> bool:
        """Whether any number is of a demo suite."""
        return any(suite.demo for suite in self.suites)

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
        text = (
            "Bold: better than every other row beyond noise; underlined: not distinguishable "
            f"from the column's best (paired over test images{self._over_seeds()}, "
            f"Holm-corrected within the column, level {ALPHA:g})."
        )
        apart = {m for rows in self.rows if rows.reference for m in rows.methods}
        reference = [self.labels[m] for m in self.methods if m in apart]
        if reference:
            text += f" {some(reference)}: reference, not ranked."
        return text

    def _over_seeds(self) -> str:
        return " and seeds" if len(self.results.seeds) > 1 else ""

    def _columns(self) -> list[str]:
        """What columns show, said once for columns of which the same is to be said."""
        said: dict[str, list[str]] = {}
        for column in self.columns:
            name, _, text = self._about(column).partition(": ")
            if text:
                said.setdefault(text, []).append(name)
        return [f"{', '.join(names)}: {text}" for text, names in said.items()]

    def _about(self, column: Column) -> str:
        label = self.label(column)
        name = f"{column.block} {label}" if column.block else label
        if column.kind == "value":
            return f"{label}: {column.quantity.title[0].lower()}{column.quantity.title[1:]}."
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
    columns = expand_columns(spec, suite, Metrics.of(frame), others, _subsets(frame))
    pairs = {(c.suite.name, d) for c in columns for d in c.datasets}
    keys = zip(frame["suite"], frame["dataset"], strict=True)
    covered = [i for i, key in enumerate(keys) if key in pairs]
    results = Results(frame.iloc[covered], spec.mixed)
    units: dict[str, Unit] = {}
    cells: dict[tuple[str, str], Cell] = {}
    compared = set()
    reference = {m for group in rows if group.reference for m in group.methods}
    for column in columns:
        outcomes = {m: column_outcome(results, m, column) for m in shown}
        unit = column.quantity.unit(o.mean for o in outcomes.values() if o.mean is not None)
        units[column.key] = unit
        made = {m: _cell(o, column, unit, results.seeds) for m, o in outcomes.items()}
        made |= {c.name: Cell() for c in spec.constants if made[c.name].mean is None}
        if column.ranked:
            made = _judge(made, column, unit, results, spec.spread)
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


def _subsets(frame: pd.DataFrame) -> dict[str, list[str]]:
    rows = frame[frame["subset"] != ""]
    pairs = rows[["dataset", "subset"]].drop_duplicates()
    found: dict[str, list[str]] = {}
    for dataset, subset in pairs.itertuples(index=False):
        found.setdefault(dataset, []).append(subset)
    return {dataset: sorted(names) for dataset, names in found.items()}


def _cell(outcome: Outcome, column: Column, unit: Unit, seeds: list[int]) -> Cell:
    if outcome.mean is None:
        return Cell(note=outcome.blocked)
    mean = outcome.mean * unit.scale
    std = None if outcome.std is None else outcome.std * unit.scale
    lacking = [s for s in seeds if s not in outcome.values]
    notes = []
    if lacking and column.ranked:
        which = ", ".join(map(str, lacking))
        notes.append(f"{len(outcome.values)} of {len(seeds)} seeds (seed {which} not run)")
    if outcome.stale:
        notes.append(f"stale: {outcome.stale}")
    spread = _digits(std, unit) if column.ranked else ""
    values = {seed: v * unit.scale for seed, v in outcome.values.items()}
    return Cell(_digits(mean, unit), spread, "", "; ".join(notes), mean, std, values)


def _judge(
    cells: Mapping[str, Cell], column: Column, unit: Unit, results: Results, spread: str
) -> dict[str, Cell]:
    """Add standard errors over test images, another spread, and what is at chance."""
    noises = [(w, results.noise(column, d)) for d, w in column.weights.items()]
    made = dict(cells)
    for method in [m for m, cell in cells.items() if cell.mean is not None]:
        errors = [(w, noise.error(method)) for w, noise in noises]
        cell = made[method]
        if all(e is not None for _, e in errors):
            error = math.sqrt(math.fsum((w * (e or 0.0)) ** 2 for w, e in errors))
            cell = replace(cell, error=error * unit.scale)
        if spread == "images":
            cell = replace(cell, spread=_digits(cell.error, unit))
        if spread == "datasets":
            over = _over_datasets(results, column, method, unit)
            cell = replace(cell, spread=_digits(over, unit))
        made[method] = _chance(cell, column, unit, results)
    return made


def _digits(number: float | None, unit: Unit) -> str:
    return "" if number is None else f"{number:.{unit.digits}f}"


def _over_datasets(results: Results, column: Column, method: str, unit: Unit) -> float | None:
    """Standard deviation over a mean's data sets in its unit, each the mean over seeds."""
    means = [results.outcome(method, dataset, column).mean for dataset in column.datasets]
    known = [value for value in means if value is not None]
    return statistics.stdev(known) * unit.scale if len(known) > 1 else None


def _chance(cell: Cell, column: Column, unit: Unit, results: Results) -> Cell:
    """Flag a row that is not better than guessing, by the records' chance level."""
    key = (column.suite.name, column.datasets[0], column.quantity.name)
    if column.kind != "dataset" or cell.mean is None or key not in results.chance:
        return cell
    chance, size = results.chance[key]
    error = math.sqrt(chance * (1 - chance) / size) if size > 0 and 0 <= chance <= 1 else 0.0
    sign = 1 if column.quantity.higher_is_better else -1
    if sign * (cell.mean / unit.scale - chance) > CHANCE_Z * error:
        return cell
    note = f"not above chance ({chance * unit.scale:.{unit.digits}f})"
    return replace(cell, note="; ".join(filter(None, (cell.note, note))))


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
