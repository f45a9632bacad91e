"""A table as CSV: wide as printed, and tidy with one line per cell; both at full precision."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from snella.report.layout import Column
from snella.report.tables import Table
from snella.report.versus import Versus

Value = str | int | float | None


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Value]]) -> str:
    """RFC 4180 text with Unix line ends; None is an empty field."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def wide(table: Table) -> str:
    """One line per method; mean, standard deviation and number of seeds for every column."""
    header = ["suite", "selection", "group", "method", "label"]
    for column in table.columns:
        unit = table.units[column.key].symbol
        key = f"{column.key} ({unit})" if column.kind == "value" and unit else column.key
        header += [key, f"{key} std", f"{key} n"]
    rows: list[list[Value]] = []
    for group in table.rows:
        for method, label in group.methods:
            row: list[Value] = [*_origin(table), group.title, method, label]
            notes = []
            for column in table.columns:
                cell = table.cells[method, column.key]
                row += [cell.mean, cell.std, len(cell.values)]
                notes += [f"{column.key}: {cell.note}"] if cell.note else []
            rows.append([*row, " | ".join(notes)])
    return to_csv([*header, "notes"], rows)


def _origin(table: Table) -> list[Value]:
    return [table.suite.banner or table.suite.title, table.board.selection]


def tidy(table: Table) -> str:
    """One line per cell, with the single seeds, the rank mark and the reason of an empty cell."""
    header = "suite selection backbone protocol group method label block column kind metric unit"
    rest = "mean std n seeds values mark note"
    shared = [
        *_origin(table),
        table.board.common("run", "backbone"),
        table.board.common("run", "protocol"),
    ]
    rows: list[list[Value]] = []
    for group in table.rows:
        for method, label in group.methods:
            for column in table.columns:
                cell = table.cells[method, column.key]
                rows.append([*shared, group.title, method, label, *_column(table, column)])
                rows[-1] += [cell.mean, cell.std, len(cell.values), _join(cell.values)]
                rows[-1] += [_join(cell.values.values()), cell.mark, cell.note]
    return to_csv([*header.split(), *rest.split()], rows)


def _column(table: Table, column: Column) -> list[Value]:
    unit = table.units[column.key].symbol
    return [column.block, column.key, column.kind, column.quantity.name, unit]


def _join(values: Iterable[float]) -> str:
    return ";".join(map(str, values))


def versus_csv(versus: Versus) -> str:
    """One line per cell that could have a published counterpart."""
    header = "suite selection method label block column kind metric unit ours std n"
    rest = "published published_std difference published_label note"
    rows: list[list[Value]] = []
    for pair in versus.pairs.values():
        printed = pair.published
        notes = [pair.ours.note, pair.note, printed.note if printed else ""]
        row: list[Value] = [*_origin(versus.table), pair.method, pair.label]
        row += _column(versus.table, pair.column)
        row += [pair.ours.mean, pair.ours.std, len(pair.ours.values)]
        row += [printed.value, printed.std] if printed else [None, None]
        row += [pair.difference, printed.label if printed else None]
        rows.append([*row, " | ".join(note for note in notes if note)])
    return to_csv([*header.split(), *rest.split()], rows)
