"""Our numbers beside the published ones, with a note for every difference of protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from snella.report.grid import Entry, Footnotes, Grid, Heading, Line, Section, comments, headings
from snella.report.layout import Column
from snella.report.published import FACTS, Place, Printed, find, place, read_table, row_labels
from snella.report.spec import PublishedTable
from snella.report.tables import DASH, Cell, Table

OTHER = {"mean_of_tasks": "mean_of_groups", "mean_of_groups": "mean_of_tasks"}
WORDS = {"mean_of_tasks": "over tasks", "mean_of_groups": "over groups"}


@dataclass(frozen=True)
class Pair:
    """One of our cells and the number printed for it; ``note`` says why there is none."""

    method: str
    label: str
    column: Column
    ours: Cell
    published: Printed | None
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Ours minus printed, in the unit of the table."""
        if self.ours.mean is None or self.published is None:
            return None
        return self.ours.mean - self.published.value


@dataclass(frozen=True)
class Versus:
    """A table beside its published counterpart, for the columns and rows that both have."""

    table: Table
    source: PublishedTable
    columns: list[Column]
    pairs: Mapping[tuple[str, str], Pair]
    lines: Sequence[Mapping[str, str]]

    @property
    def remarks(self) -> list[str]:
        """Summary, then every difference in the way the numbers were made."""
        board, source = self.table.board, self.source
        trained = sorted({f"{x['backbone']}, {x['pretraining']}" for x in self.lines})
        facts = FACTS.get(source.source)
        result = [
            "First line of a row: ours; second: printed number and our difference from it.",
            *self._summary(),
            f"Published: {source.source}, Table {source.table} ({'; '.join(trained)}); "
            f"ours: {self.table.backbone}.",
        ]
        if facts is None:
            return [*result, "The protocol of the published numbers is not recorded here."]
        for name, (value, text) in facts.fields.items():
            ours = board.selection if name == "selection" else board.common("protocol", name)
            if ours not in (value, ""):
                result.append(f"Mismatch: {text}; ours: {ours}.")
        if len(board.seeds) != facts.seeds:
            result.append(
                f"Mismatch: published numbers are of {facts.seeds} seed; ours: {len(board.seeds)}."
            )
        places = [place(column, self.table.suite) for column in self.columns]
        suites = {"", *(where.suite for where in places if where is not None)}
        return result + [text for suite, text in facts.remarks if suite in suites]

    def _summary(self) -> list[str]:
        pairs = [p for p in self.pairs.values() if p.difference is not None]
        if not pairs:
            return ["No cell of ours has a printed counterpart yet."]
        differences = [p.difference or 0.0 for p in pairs]
        far = max(pairs, key=lambda p: abs(p.difference or 0.0))
        digits = _digits(self.table, far.column)
        return [
            f"{len(pairs)} cells compared: mean difference "
            f"{_signed(math.fsum(differences) / len(pairs), digits)}, largest "
            f"{_signed(far.difference or 0.0, digits)} "
            f"({far.label}, {_name(self.table, far.column)})."
        ]


def compare_published(table: Table) -> Versus | None:
    """Pair the table's cells with the printed ones.

    None for a demo suite, for a table without a published counterpart, and where no data set,
    group or row of the suite occurs in it.
    """
    source = table.spec.published
    if source is None or table.suite.demo:
        return None
    lines = [
        line
        for line in read_table(source.source, source.table)
        if source.backbone in (None, line["backbone"])
        and source.pretraining in (None, line["pretraining"])
    ]
    labels = row_labels(lines, [m for m, _ in table.methods], source.rows)
    pairs: dict[tuple[str, str], Pair] = {}
    columns = []
    for column in table.columns:
        where = place(column, table.suite)
        if where is None or not _occurs(lines, where):
            continue
        columns.append(column)
        for method, label in table.methods:
            cell = table.cells[method, column.key]
            pair = Pair(method, label, column, cell, None)
            unit = table.units[column.key].symbol
            pairs[method, column.key] = _pair(lines, labels.get(method), where, unit, pair)
    return Versus(table, source, columns, pairs, lines) if columns and labels else None


def _occurs(lines: Sequence[Mapping[str, str]], where: Place) -> bool:
    """Whether a table prints this data set or group, averaged in either way."""
    key = (where.suite, where.dataset, where.group)
    return any((line["suite"], line["dataset"], line["group"]) == key for line in lines)


def _pair(
    lines: Sequence[Mapping[str, str]], label: str | None, where: Place, unit: str, pair: Pair
) -> Pair:
    if label is None:
        return replace(pair, note="not in the published table")
    metric = pair.column.quantity.name
    printed = find(lines, label, where, metric)
    if printed is not None and printed.unit != unit:
        return replace(pair, note="printed in another unit")
    if printed is not None:
        return replace(pair, published=printed)
    other = replace(where, aggregation=OTHER.get(where.aggregation, ""))
    if where.aggregation and find(lines, label, other, metric) is not None:
        kinds = f"{WORDS[other.aggregation]}, ours {WORDS[where.aggregation]}"
        return replace(pair, note=f"the published mean is {kinds}")
    return replace(pair, note="not in the published table")


def versus_grid(versus: Versus) -> Grid:
    """The comparison as printed: two lines for every method."""
    table = versus.table
    footnotes = Footnotes()
    shown: dict[str, Heading] = dict(
        zip((c.key for c in table.columns), headings(table), strict=True)
    )

    def lines(method: str, label: str) -> tuple[Line, Line]:
        pairs = [versus.pairs[method, c.key] for c in versus.columns]
        ours = tuple(
            Entry(p.ours.text, p.ours.spread, p.ours.mark, footnotes.letter(p.ours.note))
            for p in pairs
        )
        theirs = tuple(_printed(versus, p, footnotes) for p in pairs)
        return Line(label, ours), Line("published", theirs, continued=True)

    sections = tuple(
        Section(rows.title, tuple(line for pair in rows.methods for line in lines(*pair)))
        for rows in table.rows
    )
    return Grid(
        name=f"{table.name}_vs_published",
        caption=f"{table.caption} Beside the published numbers.",
        banner="",
        headings=tuple(shown[c.key] for c in versus.columns),
        sections=sections,
        remarks=(*table.remarks[:2], *versus.remarks),
        notes=footnotes.notes,
        comments=comments(table),
        rotate=table.spec.rotate,
    )


def _printed(versus: Versus, pair: Pair, footnotes: Footnotes) -> Entry:
    if pair.published is None:
        return Entry(DASH, note=footnotes.letter(pair.note))
    digits = _digits(versus.table, pair.column)
    text = f"{pair.published.value:.{digits}f}"
    spread = "" if pair.published.std is None else f"{pair.published.std:.{digits}f}"
    if pair.difference is not None:
        text += f" ({_signed(pair.difference, digits)})"
    return Entry(text, spread, note=footnotes.letter(pair.published.note))


def _signed(value: float, digits: int) -> str:
    """A difference with its sign; nothing is plus or minus zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _digits(table: Table, column: Column) -> int:
    return table.units[column.key].digits


def _name(table: Table, column: Column) -> str:
    return f"{column.block} {table.label(column)}" if column.block else table.label(column)
