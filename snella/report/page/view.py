"""From a page's content to plain values, and with template, style and script to one HTML file.

The page fetches nothing: text is escaped by the template engine, data are JSON without markup, and
a content security policy with the digests of style and script keeps anything else from running.

The script's data hold every distinct part of a configuration or environment once, as text in a
pool, because hundreds of runs repeat them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from snella.report.columns import VALUES, Column, value
from snella.report.page import scatter
from snella.report.page.content import Content, PageRun, PageTable, RunKey
from snella.report.page.pictures import views
from snella.report.published.audit import TITLES, summary
from snella.report.published.audit_texts import HEADS, LEGEND, TOTAL_HEADS, number_cells, total_rows
from snella.report.published.versus import VERDICTS, Pair, compare_published
from snella.report.results import column_outcome
from snella.report.runs.details import shown_metrics
from snella.report.table import Cell, Table
from snella.report.text import table_grid

if TYPE_CHECKING:
    import pandas as pd

COSTS = ("with_head", "peak_memory_mb", "train_seconds")
"""What results are drawn against."""
FEWEST = 4
"""Rows that a picture of trade-offs needs."""
CURVES = ("loss", "val")
DIGEST = 16
LOGGED = 500
"""A page of more runs holds the logs of those alone that broke or still run."""
ORDER = ("failed", "damaged", "diverged", "running", "stale", "missing", "done")
GAPS = {"failed": {"failed", "diverged", "damaged"}, "stale": {"stale"}}
BROKEN = GAPS["failed"] | {"running"}
Places = dict[tuple[str, str, str], list[tuple[int, str]]]
"""Numbers and states of runs by suite, method and data set."""
TIMES = ("started", "ended", "command")


class Pool:
    """Texts that are stored once and named by their number."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def add(self, text: str) -> int:
        """The number of a text."""
        return self.texts.setdefault(text, len(self.texts))

    def parts(self, content: Mapping[str, Any]) -> list[list[Any]]:
        """A mapping as (key, number of the value's JSON)."""
        return [
            [key, self.add(json.dumps(content[key], sort_keys=True))] for key in sorted(content)
        ]


def render(content: Content) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    folder = files("snella.report.page")
    style, script, template = (
        (folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; "
        f"script-src {_digest(script)}; base-uri 'none'; form-action 'none'"
    )
    page = environment.from_string(template)
    return page.render(style=style, script=script, policy=policy, **view(content))


def _digest(text: str) -> str:
    found = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{found}'"


def view(content: Content) -> dict[str, Any]:
    """All values of the template, the script's data under ``data``."""
    pool = Pool()
    numbers = {key: i for i, key in enumerate(content.runs)}
    few = len(content.runs) <= LOGGED
    runs = [_run(run, pool, log=few or run.state in BROKEN) for run in content.runs.values()]
    places: Places = {}
    for run in content.runs.values():
        place = run.suite, run.method, run.dataset
        places.setdefault(place, []).append((numbers[run.key], run.state))
    suites: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    for suite in content.suites:
        own = [_table(len(tables) + i, part, places) for i, part in enumerate(suite.tables)]
        tables += [table.pop("data") for table in own]
        suites.append({"title": suite.title, "banner": suite.banner, "tables": own})
    audit = None if content.audit is None else _audit(content.audit, pool)
    data = {
        "runs": runs,
        "tables": tables,
        "audit": None if audit is None else audit.pop("rows"),
        "attention": _attention(content.runs.values(), numbers),
        "pool": list(pool.texts),
    }
    states, idle = _states(content.runs.values())
    return {
        "suites": suites,
        "states": states,
        "idle": idle,
        "galleries": views([g for suite in content.suites for g in suite.galleries]),
        "skipped": content.skipped,
        "audit": audit,
        "newest": _newest(content.runs.values()),
        "data": data,
    }


def _run(run: PageRun, pool: Pool, *, log: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "label": run.label, "method": run.method, "data": run.dataset_label,
        "dataset": run.dataset, "suite": run.suite, "seed": run.seed, "state": run.state,
        "why": run.why, "folder": run.folder,
    }  # fmt: skip
    details = run.details
    if details is None:
        return found
    made, settings = details["environment"], details["settings"]
    lines = [None if line.startswith("snella execute --settings") else line
             for line in details["commands"]]  # fmt: skip
    found |= {
        "reason": details["reason"], "failure": details["failure"],
        "warnings": details["warnings"],
        "numbers": [[pool.add(s), pool.add(t), e, v] for s, t, e, v in shown_metrics(details)],
        "cost": [(pool.add(title), text) for title, text in _costs(details)],
        "settings": pool.parts({**settings, "results": "reproduced"}) if settings else None,
        "method_settings": pool.parts(details["method"]),
        "environment": pool.parts({k: v for k, v in made.items() if k not in TIMES}),
        "times": [made.get("started"), made.get("ended")],
        "identity": {k: _cut(v) for k, v in details["identity"].items() if k != "libraries"},
        "digests": {k: _cut(v) for k, v in details["digests"].items()},
        "curve": _curve(details),
        "metric": _metric(details),
        "log": details["log"] if log else [],
        "commands": lines,
    }  # fmt: skip
    return found


def _costs(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Parameters and costs under the titles that tables give them."""
    recorded = {**(details["cost"] or {}), **(details["parameters"] or {})}
    found = {}
    for quantity in VALUES.values():
        number = recorded.get(quantity.source)
        if number is not None:
            unit = quantity.unit([number])
            found[quantity.title] = f"{unit.text(number * unit.scale)} {unit.symbol}".rstrip()
    return list(found.items())


def _metric(details: Mapping[str, Any]) -> tuple[str, str]:
    """Title and unit of the metric that validation is measured in."""
    infos = details["metric_info"] or ()
    info: Mapping[str, str] = next((i for i in infos if i["name"] == details["metric"]), {})
    return info.get("title", "result"), info.get("unit", "")


def _curve(details: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Loss and validation per epoch, the latter in the unit of tables."""
    scale = {"val": 100.0 if _metric(details)[1] == "%" else 1.0}
    return {
        name: [None if v is None else _short(v * scale.get(name, 1.0)) for v in values]
        for name, values in details["curve"].items()
        if name in CURVES
    }


def _cut(digest: Any) -> Any:
    return digest[:DIGEST] if isinstance(digest, str) else digest


def _short(number: Any) -> Any:
    """A number with as many digits as a reader may want."""
    return float(f"{number:.5g}") if isinstance(number, float) else number


def _table(index: int, part: PageTable, places: Places) -> dict[str, Any]:
    table = part.table
    grid, versus = table_grid(table), compare_published(table)
    pairs = {} if versus is None else versus.pairs
    cells = [
        [_cell(table, name, c, places, pairs.get((name, c.key))) for c in table.columns]
        for name in table.shown
    ]
    numbered = enumerate(cells)
    columns = [
        {
            "label": table.label(c), "block": c.block, "ranked": c.ranked,
            "digits": table.units[c.key].digits, "unit": table.units[c.key].symbol,
            "better": 1 if c.quantity.higher_is_better else -1,
            "title": c.quantity.title,
        }
        for c in table.columns
    ]  # fmt: skip
    return {
        "index": index,
        "title": part.title,
        "demo": table.banner,
        "caption": table.caption.removeprefix(f"{table.banner}. "),
        "command": part.command,
        "blocks": grid.blocks if any(block for block, _ in grid.blocks) else [],
        "heads": [h.label for h in grid.headings],
        "sections": [
            (section, rows.own, [(line, *next(numbered)) for line in section.lines])
            for section, rows in zip(grid.sections, table.rows, strict=True)
        ],
        "remarks": [*grid.remarks, *([] if versus is None else versus.remarks)],
        "letters": grid.letters,
        "versus": versus is not None,
        "verdicts": _verdicts(pairs.values()),
        "trade_offs": trade_offs(table, f"{index}"),
        "data": {
            "columns": columns, "cells": cells,
            "rows": [table.labels[name] for name in table.shown],
        },
    }  # fmt: skip


def _cell(
    table: Table,
    method: str,
    column: Column,
    places: Places,
    pair: Pair | None,
) -> dict[str, Any]:
    """What a cell shows when it is opened: number, note, published number, and its runs."""
    cell = table.cells[method, column.key]
    runs = [n for d in column.datasets for n in places.get((column.suite.name, method, d), ())]
    found: dict[str, Any] = {
        "v": None if cell.mean is None else float(f"{cell.mean:.8g}"),
        "runs": [number for number, _ in runs],
        "state": _state(cell, {state for _, state in runs}),
    }
    if cell.note:
        found["note"] = cell.note
    if cell.error:
        found["error"] = _short(cell.error)
    if len(cell.values) > 1:
        found["seeds"] = {str(seed): _short(v) for seed, v in cell.values.items()}
    if pair is not None and pair.printed is not None:
        verdict, why = pair.verdict
        found["pub"] = {
            "value": pair.unit.text(pair.value), "verdict": verdict,
            "difference": pair.unit.signed(pair.difference),
            "title": TITLES[verdict] if pair.difference is not None else "", "why": why,
            "note": pair.printed["note"], "label": pair.printed["label"],
        }  # fmt: skip
    return found


def _state(cell: Cell, states: set[str]) -> str:
    """How a cell is coloured: by what is wrong with it, if it has no number or a stale one."""
    if cell.mean is not None:
        return "stale" if "stale:" in cell.note else ""
    return next((name for name in ("failed", "stale") if states & GAPS[name]), "missing")


def _verdicts(pairs: Any) -> list[tuple[str, str, int]]:
    counts = Counter(p.verdict[0] for p in pairs if p.difference is not None)
    return [(v, TITLES[v], counts[v]) for v in VERDICTS if counts[v]]


def trade_offs(table: Table, index: str) -> list[dict[str, Any]]:
    """The table's headline (its ranked column over most data sets) against each cost."""
    ranked = [(i, c) for i, c in enumerate(table.columns) if c.ranked]
    if not ranked:
        return []
    number, head = max(ranked, key=lambda pair: (len(pair[1].datasets), -pair[0]))
    symbol = table.units[head.key].symbol
    title = f"{table.full_label(head)}: {head.quantity.title}" + (f" ({symbol})" if symbol else "")
    y = scatter.Axis(title, head.quantity.higher_is_better)
    names = [(m, table.labels[m], rows.own) for rows in table.rows for m in rows.methods]
    found = []
    for cost in COSTS:
        quantity = value(cost)
        column = Column(cost, quantity.title, None, "value", quantity, head.members, head.suite)
        spent = {m: column_outcome(table.results, m, column).mean for m, _, _ in names}
        unit = quantity.unit(v for v in spent.values() if v is not None)
        points = [
            scatter.Point(label, paid * unit.scale, reached, f"{index},{row},{number}", own)
            for row, (method, label, own) in enumerate(names)
            if (reached := table.cells[method, head.key].mean) is not None
            and (paid := spent[method]) is not None
        ]
        if len(points) >= FEWEST:
            title = f"{quantity.title} ({unit.symbol})" if unit.symbol else quantity.title
            found.append(scatter.draw(points, scatter.Axis(title, False), y))
    return found


def _states(runs: Iterable[PageRun]) -> tuple[list[tuple[str, int]], int]:
    """How many runs are in each state, and how many rows nobody has begun.

    A suite may name more rows than anybody asked for; a run is missing where its row was begun.
    """
    begun = {(run.suite, run.method) for run in runs if run.state != "missing"}
    counts = Counter(run.state for run in runs if (run.suite, run.method) in begun)
    idle = {(run.suite, run.method) for run in runs} - begun
    return [(state, counts[state]) for state in reversed(ORDER) if counts[state]], len(idle)


def _attention(runs: Iterable[PageRun], numbers: Mapping[RunKey, int]) -> list[int]:
    """The numbers of the runs that are not done, by what is wrong with them.

    Those that have not run yet are only counted.
    """
    wrong = [run for run in runs if run.state not in ("done", "missing")]
    wrong.sort(key=lambda run: ORDER.index(run.state))
    return [numbers[run.key] for run in wrong]


def _newest(runs: Iterable[PageRun]) -> str:
    """When the newest run ended; a page says nothing of when it was written, to be repeatable."""
    ended = [str((r.details["environment"] or {}).get("ended") or "") for r in runs if r.details]
    return max(ended, default="")[:10]


def _audit(found: pd.DataFrame, pool: Pool) -> dict[str, Any]:
    rows = [
        [
            VERDICTS.index(row["verdict"]),
            *(pool.add(c) for c in (*number_cells(row), row["command"])),
        ]
        for row in found.to_dict("records")
    ]
    return {
        "summary": summary(found), "legend": LEGEND, "heads": HEADS,
        "total_heads": TOTAL_HEADS,
        "totals": total_rows(found), "verdicts": [(v, TITLES[v]) for v in VERDICTS], "rows": rows,
    }  # fmt: skip
