"""The audit as Markdown, as one HTML file that works offline, and as a LaTeX document."""

from __future__ import annotations

import html as escaping
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snella.errors import UserError
from snella.report.latex import escape
from snella.report.pdf import compile_document
from snella.report.published.audit import TITLES, VERDICTS, audit, decided, summary, totals
from snella.report.published.papers import FOLDER, read_paper
from snella.report.text import escape_markdown, markdown_row, signed
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


def _where(row: dict[str, Any]) -> str:
    place = row["dataset"] or row["group"] or "cost"
    kind = {"mean_of_tasks": " over tasks", "mean_of_groups": " over groups"}
    backbone = f"{row['backbone']} {row['pretraining']}"
    suite = f"{row['suite']} " if row["suite"] else ""
    return f"{suite}{place}{kind.get(row['aggregation'], '')}, {row['metric']}, {backbone}"


def _table(row: dict[str, Any]) -> str:
    return f"{row['source']} {row['table']}"


def number_cells(row: dict[str, Any]) -> list[str]:
    """A published number as printed, under :data:`HEADS`."""
    digits, ours, difference = int(row["decimals"]), "", ""
    if row["ours"] is not None and math.isfinite(row["ours"]):
        ours, difference = f"{row['ours']:.{digits}f}", signed(row["difference"], digits)
        spread = row["std"]
        known = spread is not None and math.isfinite(spread)
        ours += f" ± {spread:.{digits}f}" if known else ""
    return [
        _table(row),
        str(row["label"]),
        _where(row),
        f"{row['printed']:.{digits}f}",
        ours,
        difference,
        TITLES[row["verdict"]].partition(" ")[0] if row["verdict"] != "open" else TITLES["open"],
        str(row["why"]),
    ]


def total_rows(found: pd.DataFrame) -> list[list[str]]:
    """Title, count of each verdict and of all numbers for every table, and for all of them."""
    counted = totals(found)
    rows = [
        [
            f"{read_paper(r['source']).title}, Table {r['table']}",
            *[str(r[v]) for v in VERDICTS],
            str(r["numbers"]),
        ]
        for r in counted.to_dict("records")
    ]
    sums = [str(int(counted[v].sum())) for v in (*VERDICTS, "numbers")]
    return [*rows, ["All", *sums]]


def markdown(found: pd.DataFrame) -> str:
    """Totals per table, then every number that is decided."""
    lines = ["# Audit of the published numbers", "", summary(found), "", LEGEND, ""]
    lines += [_row(TOTAL_HEADS), _row(["---", *["---:"] * (len(TOTAL_HEADS) - 1)])]
    lines += [_row(row) for row in total_rows(found)]
    rows = list(decided(found))
    if rows:
        lines += ["", "## Decided numbers", "", _row([*HEADS, "Command"])]
        lines += [_row(["---"] * (len(HEADS) + 1))]
        lines += [_row([*number_cells(row), f"`{row['command']}`"]) for row in rows]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return markdown_row(c if c.startswith(("`", "-")) else escape_markdown(c) for c in cells)


def html(found: pd.DataFrame) -> str:
    """One self-contained page with all numbers, filtered by verdict, table and text."""
    template = (FOLDER / "audit.html").read_text(encoding="utf-8")
    body = [
        f"<tr data-verdict='{row['verdict']}' title='{escaping.escape(row['command'])}'>"
        f"{_elements('td', number_cells(row))}</tr>"
        for row in found.to_dict("records")
    ]
    parts = {
        "SUMMARY": escaping.escape(summary(found)),
        "LEGEND": escaping.escape(LEGEND),
        "VERDICTS": "".join(f"<option value='{v}'>{TITLES[v]}</option>" for v in VERDICTS),
        "TOTAL_HEADS": _elements("th", TOTAL_HEADS),
        "TOTALS": "\n".join(f"<tr>{_elements('td', row)}</tr>" for row in total_rows(found)),
        "HEADS": _elements("th", HEADS),
        "ROWS": "\n".join(body),
    }
    for name, content in parts.items():
        template = template.replace(f"<!--{name}-->", content)
    return template


def _elements(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escaping.escape(text)}</{tag}>" for text in texts)


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
