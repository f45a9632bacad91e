"""A run, or the difference between two, as text for the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from snella.cli.lists import console
from snella.errors import plain
from snella.report.runs.details import shown_metrics
from snella.report.runs.diff import CellChanges, Change, Comparison, shown

BARS = "▁▂▃▄▅▆▇█"
CELLS, OTHERS = 40, 8


def print_run(details: Mapping[str, Any]) -> None:
    """Print what :func:`~snella.report.runs.details.describe` found."""
    run = details["run"]
    _say(f"{run['method']} on {run['dataset']}, seed {run['seed']}")
    _lines({
        "folder": details["folder"],
        "suite": run.get("suite"), "backbone": run.get("backbone"),
        "protocol": run.get("protocol"),
        "status": ": ".join(filter(None, (details["status"], details["reason"]))),
        "later failure": details["failure"],
        "not as recorded": ", ".join(details["changed"]),
    })  # fmt: skip
    _section("Numbers", {
        f"{title} ({selection}" + (f", epoch {epoch})" if epoch else ")"): value
        for selection, title, epoch, value in shown_metrics(details)
    })  # fmt: skip
    _section("Warnings", dict(enumerate(details["warnings"], 1)))
    _section("Parameters", {k: f"{v:,}" for k, v in (details["parameters"] or {}).items()})
    _section("Cost", {k.replace("_", " "): _short(v) for k, v in (details["cost"] or {}).items()})
    _section("Hyper-parameters", _flat(details["method"].get("hyperparameters") or {}))
    _section("Protocol", _flat(details["protocol"]))
    _section("Environment", _flat(_without(details["environment"], "command")))
    _section("Identity", {k: shown(v) for k, v in _flat(details["identity"]).items()})
    _section("Digests", {k: shown(v) for k, v in details["digests"].items()})
    _section("Curve", {k: _spark(v) for k, v in details["curve"].items() if k != "epoch"})
    if details["log"]:
        _say("\nEnd of the log")
        for line in details["log"]:
            _say(f"  {line}")
    _say("\nTo repeat it, in the repository")
    for line in details["commands"]:
        sys.stdout.write(f"  {line}\n")


def _section(title: str, content: Mapping[Any, Any]) -> None:
    if content:
        _say(f"\n{title}")
        _lines({str(k): v for k, v in content.items()})


def _lines(content: Mapping[str, Any]) -> None:
    width = max((len(name) for name in content), default=0)
    for name, value in content.items():
        if value not in (None, ""):
            _say(f"  {name:<{width}}  {value}")


def _say(line: str) -> None:
    sys.stdout.write(("\n" if line.startswith("\n") else "") + _one_line(line) + "\n")


def _one_line(text: str) -> str:
    """The text without characters that would move a cursor, its spaces kept."""
    return "".join(c if c.isprintable() else " " for c in text.strip("\n"))


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[f"{prefix}{name}"] = text
    return found


def _without(content: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _spark(values: list[float | None]) -> str:
    """A column of the curve as bars, with its first and last value."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return ""
    low, high = min(known), max(known)
    step = (high - low) / (len(BARS) - 1) or 1.0
    bars = "".join(" " if v is None else BARS[round((v - low) / step)] for v in values)
    return f"{bars}  {known[0]:.4g} to {known[-1]:.4g}"


def print_comparison(found: Comparison, a: str, b: str) -> None:
    """Print which cells differ and by how much, then what all of them were made with."""
    from rich.table import Table

    _say(f"A {a}")
    _say(f"B {b}")
    for name, cells in ((a, found.only_a), (b, found.only_b)):
        for cell in cells[:CELLS]:
            _say(f"only in {name}: {cell}")
        if len(cells) > CELLS:
            _say(f"only in {name}: {len(cells) - CELLS} more")
    rows = [row for cell in found.different[:CELLS] for row in _rows(cell)]
    if rows:
        table = Table("Cell", "What", "A", "B", "Difference")
        for row in rows:
            table.add_row(*map(plain, row))
        console().print(table)
    if len(found.different) > CELLS:
        _say(f"{len(found.different) - CELLS} more cells differ (--json lists all)")
    for title, part in (("Run differently", "settings"), ("Made with", "origin")):
        changes = found.tally(part)
        if changes:
            _say(title)
        for change, count in changes:
            where = "" if len(found.cells) == 1 else f" ({count} of {len(found.cells)} cells)"
            _say(f"  {change.name}: {shown(change.a)} → {shown(change.b)}{where}")
    alike = len(found.cells) - len(found.different)
    _say(
        f"{len(found.cells)} cells in both, {alike} equal, {len(found.different)} different; "
        f"{len(found.only_a)} only in A, {len(found.only_b)} only in B"
    )


def _rows(cell: CellChanges) -> list[list[str]]:
    """The status or the shown number first; of further numbers the first few."""
    own = [c for c in cell.outcome if c.name in ("status", "reason", cell.metric)]
    rest = [c for c in cell.outcome if c not in own]
    lines = [_row(cell, change) for change in [*own, *rest[:OTHERS]]]
    if len(rest) > OTHERS:
        lines.append(["", f"{len(rest) - OTHERS} more", "", "", ""])
    if not lines:
        lines = [["", f"{len(cell.settings)} settings", "", "", ""]]
    lines[0][0] = cell.cell or "the run"
    return lines


def _row(cell: CellChanges, change: Change) -> list[str]:
    name = change.name.removeprefix("metrics.")
    percent = cell.units.get(change.name) == "%"
    values, by = [change.a, change.b], change.by
    if by is None:
        return ["", name, *map(shown, values), ""]
    if percent:
        return ["", name, *(f"{100 * v:.2f} %" for v in values), f"{100 * by:+.2g}"]
    return ["", name, *(f"{v:.6g}" for v in values), f"{by:+.3g}"]
