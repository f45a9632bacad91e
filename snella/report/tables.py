"""A table's numbers: every cell with mean, spread, printed text, rank and reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from snella.errors import UserError
from snella.report.cells import Board, Missing, Outcome, Record
from snella.report.layout import Column, Rows, SuiteInfo, expand_columns, expand_rows
from snella.report.metrics import Unit, metric
from snella.report.spec import TableSpec

DASH = "–"
NONE_YET = "(no run yet)"
Mark = Literal["", "best", "second"]
SELECTION_WORDS = {
    "last": "last epoch",
    "val": "best epoch on the validation images",
    "best-test": "best epoch ON THE TEST SET (best-test), optimistic",
}


@dataclass(frozen=True)
class Cell:
    """One number, in the column's unit; ``text`` and ``spread`` are what is printed."""

    mean: float | None
    std: float | None
    values: Mapping[int, float] = field(default_factory=dict)
    text: str = DASH
    spread: str = ""
    mark: Mark = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Cells by (method, column key), with all that a writer says around them."""

    name: str
    spec: TableSpec
    suite: SuiteInfo
    board: Board
    rows: list[Rows]
    columns: list[Column]
    units: Mapping[str, Unit]
    cells: Mapping[tuple[str, str], Cell]

    @property
    def methods(self) -> list[tuple[str, str]]:
        """(name, label) of all rows, top to bottom."""
        return [pair for group in self.rows for pair in group.methods]

    @property
    def backbone(self) -> str:
        """The printed name of the backbone."""
        return self.suite.label(self.board.common("run", "backbone")) or NONE_YET

    @property
    def protocol(self) -> str:
        """The protocols' names."""
        return self.board.common("run", "protocol") or NONE_YET

    def label(self, column: Column) -> str:
        """The column's printed label with its unit filled in."""
        return column.label.replace("{unit}", self.units[column.key].symbol)

    @property
    def caption(self) -> str:
        """The caption, with the demo banner before it and the selection after it."""
        names = {
            "suite": self.suite.title,
            "backbone": self.backbone,
            "protocol": self.protocol,
            "metric": metric(self.spec.metric).title,
        }
        try:
            text = self.spec.caption.format(**names)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"Table {self.name}: the caption's placeholder {error} is unknown; "
                f"use {', '.join('{' + n + '}' for n in names)} (and {{{{ for a brace)."
            ) from error
        banner = f"{self.suite.banner}. " if self.suite.banner else ""
        chosen = " Numbers chosen on the test set." if self.board.selection == "best-test" else ""
        return f"{banner}{text}{chosen}"

    @property
    def remarks(self) -> list[str]:
        """What the reader has to know about the numbers, one sentence each."""
        seeds = len(self.board.seeds)
        spread = f"{seeds} seeds, mean ± sample standard deviation" if seeds > 1 else "one seed"
        selection = SELECTION_WORDS.get(self.board.selection, self.board.selection)
        result = [
            f"Backbone {self.backbone}, protocol {self.protocol}, {selection}, {spread}.",
            "Best in bold, second best underlined, by the printed number.",
        ]
        result += [text for text in map(self._about, self.columns) if text]
        return result + [f"Protocol: {note}." for note in self.board.notes]

    def _about(self, column: Column) -> str:
        label = self.label(column)
        name = f"{column.block} mean" if column.block else label
        if column.kind == "value":
            return f"{label}: {column.quantity.title[0].lower()}{column.quantity.title[1:]}."
        if column.kind == "mean_of_groups":
            return f"{name}: over the {len(column.members)} group means."
        if column.kind == "mean_of_tasks" and (column.visible or column.block is None):
            return f"{name}: over the {sum(map(len, column.members.values()))} data sets."
        return ""


def build_table(
    name: str,
    spec: TableSpec,
    suite: SuiteInfo,
    methods: Mapping[str, str],
    runs: Iterable[Record | Missing],
    selection: str | None = None,
) -> Table:
    """Compute all cells.

    ``methods`` maps the enabled methods to their labels; runs of other methods and data sets
    are left out. Raises UserError for records that may not share a table.
    """
    columns = expand_columns(spec, suite)
    rows = expand_rows(spec, methods)
    shown = {m for group in rows for m, _ in group.methods}
    datasets = {d for c in columns for ds in c.members.values() for d in ds}
    used = [run for run in runs if _is_shown(run, shown, datasets)]
    board = Board(used, selection, spec.mixed)
    foreign = {str(r["run"]["suite"]) for r in board.records} - {suite.name}
    if foreign:
        raise UserError(f"Records of suite {foreign.pop()!r} in a table of suite {suite.name!r}.")
    units: dict[str, Unit] = {}
    cells: dict[tuple[str, str], Cell] = {}
    for column in columns:
        outcomes = {m: column.outcome(board, m, suite) for m in sorted(shown)}
        units[column.key] = column.quantity.unit(o.mean for o in outcomes.values() if o.mean)
        made = {m: _cell(o, column, units[column.key], board.seeds) for m, o in outcomes.items()}
        if column.ranked:
            made = rank(made, column.quantity.higher_is_better)
        cells.update({(method, column.key): cell for method, cell in made.items()})
    return Table(name, spec, suite, board, rows, columns, units, cells)


def _is_shown(run: Record | Missing, methods: set[str], datasets: set[str]) -> bool:
    if isinstance(run, Missing):
        return run.method in methods and run.dataset in datasets
    return run["run"]["method"] in methods and run["run"]["dataset"] in datasets


def _cell(outcome: Outcome, column: Column, unit: Unit, seeds: list[int]) -> Cell:
    if outcome.mean is None:
        return Cell(None, None, note=outcome.blocked)
    mean = outcome.mean * unit.scale
    std = None if outcome.std is None else outcome.std * unit.scale
    lacking = [s for s in seeds if s not in outcome.values]
    note = ""
    if lacking and column.ranked:
        which = ", ".join(map(str, lacking))
        note = f"{len(outcome.values)} of {len(seeds)} seeds (seed {which} not run)"
    spread = "" if std is None or not column.ranked else f"{std:.{unit.digits}f}"
    values = {seed: v * unit.scale for seed, v in outcome.values.items()}
    return Cell(mean, std, values, f"{mean:.{unit.digits}f}", spread, note=note)


def rank(cells: Mapping[str, Cell], higher_is_better: bool) -> dict[str, Cell]:
    """Mark the best and second-best printed number; equal print is an equal rank.

    A column with fewer than two numbers has no best.
    """
    printed = {m: float(c.text) for m, c in cells.items() if c.mean is not None}
    order = sorted(set(printed.values()), reverse=higher_is_better)
    marks: dict[float, Mark] = {}
    if len(printed) > 1:
        marks = dict(zip(order, ("best", "second"), strict=False))  # type: ignore[arg-type]
    return {
        m: replace(c, mark=marks.get(printed[m], "") if m in printed else "")
        for m, c in cells.items()
    }
