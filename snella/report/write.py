"""Write a table in every format, its comparison with published numbers, and its statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snella.files import atomic
from snella.report.latex import to_latex
from snella.report.published.versus import compare_published, versus_frame, versus_grid
from snella.report.statistics import (
    Statistics,
    mean_interval,
    statistics_frame,
    statistics_grid,
    table_statistics,
)
from snella.report.table import Table
from snella.report.text import Grid, print_grid, table_grid, to_markdown

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

DIGITS = "%.12g"  # of a number in a CSV file: all that are recorded, no binary dust


def write_table(table: Table, out_dir: Path) -> list[Path]:
    """Write ``<name>.tex``, ``.csv``, ``.md`` and ``_cells.csv`` and return the paths.

    Where the suite has a published counterpart, ``<name>_vs_published.{tex,csv,md}`` follow; where
    the table names an enabled reference row, ``<name>_statistics.{tex,csv,md}``.
    """
    name, reference = table.name, table.spec.reference
    contents = {f"{name}.csv": to_csv(wide(table)), f"{name}_cells.csv": to_csv(cells(table))}
    contents |= _texts(table_grid(table)) | versus_texts(table)
    if reference is not None and reference in table.methods:
        contents |= statistics_texts(table_statistics(table, reference))
    return write_texts(out_dir, contents)


def write_texts(out_dir: Path, contents: Mapping[str, str]) -> list[Path]:
    """Write files whole or not at all; return their paths."""
    for file, content in contents.items():
        with atomic(out_dir / file) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return sorted(out_dir / file for file in contents)


def versus_texts(table: Table) -> dict[str, str]:
    """The comparison with published numbers by file name; empty where there is none."""
    versus = compare_published(table)
    if versus is None:
        return {}
    grid = versus_grid(versus)
    return {**_texts(grid), f"{grid.name}.csv": to_csv(versus_frame(versus))}


def statistics_texts(found: Statistics) -> dict[str, str]:
    """The comparison of all rows with a reference by file name."""
    grid = statistics_grid(found)
    return {**_texts(grid), f"{grid.name}.csv": to_csv(statistics_frame(found))}


def print_table(table: Table, console: Console | None = None) -> None:
    """Print the table in the terminal, in pieces where it is too wide."""
    print_grid(table_grid(table), console)


def _texts(grid: Grid) -> dict[str, str]:
    return {f"{grid.name}.tex": to_latex(grid), f"{grid.name}.md": to_markdown(grid)}


def to_csv(frame: pd.DataFrame) -> str:
    """RFC 4180 text with Unix line ends; what is missing is an empty field."""
    text: str = frame.to_csv(index=False, float_format=DIGITS, lineterminator="\n")
    return text


def wide(table: Table) -> pd.DataFrame:
    """One row per method; mean, standard deviation and number of seeds for every column."""
    import pandas as pd

    rows = []
    for group, method in _rows(table):
        row: dict[str, Any] = {**_origin(table), "group": group, "method": method}
        row["label"] = table.labels[method]
        notes = []
        for column in table.columns:
            cell = table.cells[method, column.key]
            unit = table.units[column.key].symbol
            key = f"{column.key} ({unit})" if column.kind == "value" and unit else column.key
            row |= {key: cell.mean, f"{key} std": cell.std, f"{key} n": len(cell.values)}
            notes += [f"{column.key}: {cell.note}"] if cell.note else []
        rows.append(row | {"notes": " | ".join(notes)})
    return pd.DataFrame(rows)


def cells(table: Table) -> pd.DataFrame:
    """One row per cell, with the single seeds, the mark and the reason of an empty cell.

    ``low`` and ``high`` are the 95 % bootstrap interval of a mean: over data sets, or over the test
    images of one.
    """
    import pandas as pd

    rows = []
    common = {
        (name, suite.name): table.results.common(name, suite.name)
        for name in ("backbone", "protocol")
        for suite in table.suites
    }
    for group, method in _rows(table):
        for column in table.columns:
            cell = table.cells[method, column.key]
            low, high = mean_interval(table, method, column) or (None, None)
            rows.append(
                {
                    **_origin(table),
                    "backbone": common["backbone", column.suite.name],
                    "protocol": common["protocol", column.suite.name],
                    "group": group,
                    "method": method,
                    "label": table.labels[method],
                    "block": column.block,
                    "column": column.key,
                    "kind": column.kind,
                    "metric": column.quantity.name,
                    "unit": table.units[column.key].symbol,
                    "mean": cell.mean,
                    "std": cell.std,
                    "error": cell.error,
                    "low": low,
                    "high": high,
                    "n": len(cell.values),
                    "seeds": ";".join(map(str, cell.values)),
                    "values": ";".join(DIGITS % v for v in cell.values.values()),
                    "mark": cell.mark,
                    "note": cell.note,
                }
            )
    return pd.DataFrame(rows)


def _rows(table: Table) -> Iterator[tuple[str | None, str]]:
    """(header, method) of every row."""
    for group in table.rows:
        yield from ((group.group, method) for method in group.methods)


def _origin(table: Table) -> dict[str, str]:
    suites = ", ".join(suite.banner or suite.title for suite in table.suites)
    return {"suite": suites, "selection": table.results.selection}
