"""Write a table in every format, its comparison with published numbers, and its statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from snella.files import atomic
from snella.report.cells import Missing, Record
from snella.report.delimited import Value, tidy, to_csv, versus_csv, wide
from snella.report.grid import Grid, table_grid
from snella.report.latex import to_latex
from snella.report.layout import SuiteInfo
from snella.report.markdown import escape, to_markdown
from snella.report.spec import TableSpec
from snella.report.statistics import LEVEL, Comparison, average_ranks, compare
from snella.report.tables import DASH, Table, build_table
from snella.report.text import print_grid
from snella.report.versus import compare_published, versus_grid

if TYPE_CHECKING:
    from rich.console import Console


def write_table(
    spec: TableSpec,
    suite: SuiteInfo,
    methods: Mapping[str, str],
    records: Iterable[Record | Missing],
    out_dir: Path,
    name: str,
    *,
    selection: str | None = None,
) -> list[Path]:
    """Write ``<name>.tex``, ``.csv``, ``.md`` and ``_cells.csv`` and return the paths.

    ``methods`` maps every enabled method to its label. Where the suite has a published
    counterpart, ``<name>_vs_published.{tex,csv,md}`` follow; where the spec names an enabled
    reference row, ``<name>_statistics.{csv,md}``. ``selection`` overrides the records' own.
    Raises UserError for records that may not share a table.
    """
    table = build_table(name, spec, suite, methods, records, selection)
    contents = {f"{name}.csv": wide(table), f"{name}_cells.csv": tidy(table)}
    contents |= _texts(name, table_grid(table))
    versus = compare_published(table)
    if versus is not None:
        contents |= _texts(f"{name}_vs_published", versus_grid(versus))
        contents[f"{name}_vs_published.csv"] = versus_csv(versus)
    if spec.reference is not None and spec.reference in methods:
        contents |= _statistics(table, spec.reference)
    for file, content in contents.items():
        with atomic(out_dir / file) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return sorted(out_dir / file for file in contents)


def print_table(
    spec: TableSpec,
    suite: SuiteInfo,
    methods: Mapping[str, str],
    records: Iterable[Record | Missing],
    name: str,
    *,
    selection: str | None = None,
    console: Console | None = None,
) -> None:
    """Print the table in the terminal, in pieces where it is too wide."""
    table = build_table(name, spec, suite, methods, records, selection)
    print_grid(table_grid(table), console)


def _texts(name: str, grid: Grid) -> dict[str, str]:
    return {f"{name}.tex": to_latex(grid), f"{name}.md": to_markdown(grid)}


def _statistics(table: Table, reference: str) -> dict[str, str]:
    """The paired comparison of all rows with ``reference``, over the table's data sets."""
    metrics = [c.quantity for c in table.columns if c.ranked]
    quantity = metrics[0]
    members = {
        d: None
        for c in table.columns
        if c.quantity == quantity
        for ds in c.members.values()
        for d in ds
    }
    unit = quantity.units[0]
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for method, _ in table.methods:
        found = {d: table.board.outcome(method, d, quantity) for d in members}
        scores[method] = {
            d: {seed: v * unit.scale for seed, v in o.values.items()}
            for d, o in found.items()
            if not o.blocked and o.values
        }
    better = quantity.higher_is_better
    rows = compare(scores, reference, higher_is_better=better)
    ranks = average_ranks(scores, higher_is_better=better)
    return {
        f"{table.name}_statistics.csv": _statistics_csv(rows, ranks, reference),
        f"{table.name}_statistics.md": _statistics_markdown(table, rows, ranks, reference),
    }


def _statistics_csv(rows: list[Comparison], ranks: Mapping[str, float], reference: str) -> str:
    header = [*Comparison.__dataclass_fields__, "average_rank"]
    first: list[Value] = [reference, *[None] * (len(header) - 2), ranks.get(reference)]
    body = [[*vars(row).values(), ranks.get(row.method)] for row in rows]
    return to_csv(["reference", *header], [[reference, *row] for row in [first, *body]])


def _statistics_markdown(
    table: Table, rows: list[Comparison], ranks: Mapping[str, float], reference: str
) -> str:
    labels = dict(table.methods)

    def number(value: float | None, form: str) -> str:
        return DASH if value is None else format(value, form)

    heads = ["Method", "Average rank", "Difference", f"{LEVEL:.0%} interval", "p", "p (Holm)"]
    heads += ["Wins / ties / losses"]
    title = f"{table.caption} Paired comparison with {labels[reference]}."
    lines = [f"**{escape(title)}**", "", "| " + " | ".join(heads) + " |"]
    lines += ["| --- |" + " ---: |" * (len(heads) - 1)]
    lines += [f"| {escape(labels[reference])} | {number(ranks.get(reference), '.2f')} |" + " |" * 5]
    for row in rows:
        interval = f"{number(row.low, '+.1f')} to {number(row.high, '+.1f')}"
        cells = [
            escape(labels[row.method]),
            number(ranks.get(row.method), ".2f"),
            number(row.difference, "+.2f"),
            DASH if row.low is None else interval,
            number(row.p, ".3g"),
            number(row.p_holm, ".3g"),
            f"{row.wins} / {row.ties} / {row.losses} of {row.datasets}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_method_note()]) + "\n"


def _method_note() -> list[str]:
    return [
        "Mean difference over data sets, seeds paired; p: exact two-sided Wilcoxon signed-rank "
        "test over data sets (fewer than six cannot reach 0.05), corrected after Holm; interval: "
        "data sets resampled, then seeds within them. Average rank over the data sets that every "
        "method has; 1 is best.",
    ]
