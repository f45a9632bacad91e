"""The audit as Markdown, as one HTML file that works offline, and as a LaTeX document."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snella.errors import UserError
from snella.report.columns import signed
from snella.report.latex import escape
from snella.report.pdf import compile_document
from snella.report.published.audit import TITLES, audit, decided, summary, totals
from snella.report.published.papers import FOLDER, read_paper
from snella.report.published.versus import VERDICTS
from snella.report.text import escape_markdown, markdown_row
from snella.report.write import to_csv, write_texts

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("snella")
HEADS = ("Table", "Row", "Number", "Printed", "Ours", "Difference", "Verdict", "Why")
TOTAL_HEADS = ("Table", *(TITLES[v] for v in VERDICTS), "numbers")
LEGEND = (
    "Reproduced: a further seed of ours would fall as far from our mean in 95 % of cases. "
    "Explained: beyond that, with a known difference of protocol or a doubt about the printed "
    "number. Refuted: beyond that without one. Not yet run: no finished run, one seed only, or no "
    "row of ours for it."
)


def write(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write ``audit.csv``, ``.md``, ``.html`` and ``.tex`` below ``folder``; return the paths.

    ``audit.pdf`` follows where pdfLaTeX is installed.
    """
    found = audit(frame)
    contents = {
        "audit.csv": to_csv(found),
        "audit.md": markdown(found),
        "audit.html": html(found),
        "audit.tex": latex(found),
    }
    paths = write_texts(folder, contents)
    try:
        return [*paths, compile_document(folder / "audit.tex")]
    except UserError as error:
        log.warning("audit.pdf is not made: %s", error)
        return paths


def number_cells(row: Mapping[Any, Any]) -> list[str]:
    """A published number as printed, under :data:`HEADS`."""
    digits, ours, difference = int(row["decimals"]), "", ""
    if math.isfinite(row["ours"]):
        spread = f" ± {row['std']:.{digits}f}" if math.isfinite(row["std"]) else ""
        ours = f"{row['ours']:.{digits}f}{spread}"
        difference = signed(row["difference"], digits)
    place = row["dataset"] or row["group"] or "cost"
    over = row["aggregation"].replace("mean_of_", " over ")
    backbone = f"{row['backbone']} {row['pretraining']}"
    return [
        f"{row['source']} {row['table']}",
        row["label"],
        f"{row['suite']} {place}{over}, {row['metric']}, {backbone}".lstrip(),
        f"{row['printed']:.{digits}f}",
        ours,
        difference,
        row["verdict"] if row["verdict"] != "open" else TITLES["open"],
        row["why"],
    ]


def total_rows(found: pd.DataFrame) -> list[list[str]]:
    """Title, count of each verdict and of all numbers for every table, and for all of them."""
    counted = totals(found)
    rows = [
        [f"{read_paper(source).title}, Table {table}", *map(str, counts)]
        for (source, table), *counts in counted.itertuples(name=None)
    ]
    return [*rows, ["All", *map(str, counted.sum())]]


def markdown(found: pd.DataFrame) -> str:
    """Totals per table, then every number that is decided."""
    lines = ["# Audit of the published numbers", "", summary(found), "", LEGEND, ""]
    lines += [_row(TOTAL_HEADS), _row(["---", *["---:"] * (len(TOTAL_HEADS) - 1)])]
    lines += [_row(row) for row in total_rows(found)]
    rows = decided(found)
    if rows:
        lines += ["", "## Decided numbers", "", _row([*HEADS, "Command"])]
        lines += [_row(["---"] * (len(HEADS) + 1))]
        lines += [_row([*number_cells(row), f"`{row['command']}`"]) for row in rows]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return markdown_row(c if c.startswith(("`", "-")) else escape_markdown(c) for c in cells)


def html(found: pd.DataFrame) -> str:
    """One self-contained page with all numbers, filtered by verdict, table and text."""
    from jinja2 import Environment

    rows = [(row["verdict"], row["command"], number_cells(row)) for row in found.to_dict("records")]
    template = (FOLDER / "audit.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(template).render(
        summary=summary(found), legend=LEGEND, titles=TITLES, total_heads=TOTAL_HEADS,
        totals=total_rows(found), heads=HEADS, rows=rows,
    )  # fmt: skip


def latex(found: pd.DataFrame) -> str:
    """A document: totals per table, and every number that is decided."""
    total_lines = [" & ".join(map(escape, row)) + r" \\" for row in total_rows(found)]
    rows = [" & ".join(map(escape, number_cells(row)[:7])) + r" \\" for row in decided(found)]
    heads = ["Table", "Reproduced", "Explained", "Refuted", "Not yet run", "Numbers"]
    lines = [
        r"\documentclass[a4paper]{article}",
        r"\usepackage[margin=18mm]{geometry}\usepackage{booktabs}\usepackage{longtable}",
        r"\parindent0pt\begin{document}\small",
        r"\section*{Audit of the published numbers}",
        escape(summary(found)) + r"\par\smallskip " + escape(LEGEND) + r"\par\medskip",
        r"{\footnotesize\begin{longtable}{@{}lrrrrr@{}}\toprule",
        " & ".join(heads) + r" \\ \midrule\endhead",
        *total_lines[:-1],
        r"\midrule",
        total_lines[-1],
        r"\bottomrule\end{longtable}}",
    ]
    if rows:
        name, last = r">{\raggedright}p{%dmm}", r">{\raggedright\arraybackslash}p{30mm}"
        form = f"@{{}}l{name % 24}{name % 52}rrr{last}@{{}}"
        lines[1] += r"\usepackage{array}"
        lines += [
            r"{\scriptsize\setlength{\tabcolsep}{3pt}\begin{longtable}{" + form + r"}\toprule",
            " & ".join(HEADS[:7]) + r" \\ \midrule\endhead",
            *rows,
            r"\bottomrule\end{longtable}}",
        ]
    return "\n".join([*lines, r"\end{document}"]) + "\n"
