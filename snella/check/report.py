"""The report of ``snella check``: a row per check, a column per backbone family."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from snella.check.contract import CHECKS, TRAINS
from snella.check.findings import ALL, Finding
from snella.check.suite import check_method
from snella.errors import contained
from snella.models.tiny import BASE_SIZE

_MARK = {"passed": "[green]✓[/]", "noted": "[yellow]•[/]", "failed": "[red]✗[/]"}


def check_and_report(
    name: str, path: Path, hyperparameters: dict[str, Any], others: Sequence[Path]
) -> int:
    """Check a method, print the report, and return the exit status: 1 if something failed."""
    torch.set_num_threads(1)  # the fastest for models this small
    console = Console()
    started = time.monotonic()
    with contained(), console.status("loading") as status:
        findings = check_method(path, hyperparameters, others, status.update)
    seconds = time.monotonic() - started
    print_report(name, path, hyperparameters, findings, seconds, console)
    return int(any(found.status == "failed" for found in findings))


def print_report(
    name: str,
    path: Path,
    hyperparameters: dict[str, Any],
    findings: Sequence[Finding],
    seconds: float,
    console: Console,
) -> None:
    """Print all findings, then one line for each failure and each note."""
    settings = ", ".join(f"{key}={value}" for key, value in hyperparameters.items())
    where = "" if name == str(path) else f"  {path}"
    console.print(f"[bold]{escape(name)}[/]{escape(f'{where}  {settings}')}", soft_wrap=True)
    cells = {(f.check, f.family): f for f in findings}
    families = list(dict.fromkeys(f.family for f in findings if f.family != ALL))
    table = Table("", *families, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for check in (TRAINS, *CHECKS):
        row = [cells.get((check, family)) for family in families]
        if any(row):
            table.add_row(check, *(_cell(found) for found in row))
    console.print(table)
    for found in findings:
        if found.family == ALL:
            console.print(f"{_MARK[found.status]} {found.check}: {escape(found.text)}")
    for status, title in (("noted", "note"), ("failed", "FAILED")):
        for (check, detail), kinds in _details(findings, status).items():
            places = f" ({', '.join(kinds)})" if kinds != [ALL] else ""
            line = f"{_MARK[status]} {title}: {check}{places}: {escape(detail)}"
            console.print(line, soft_wrap=True)
    _print_summary(findings, families, seconds, console)


def _details(findings: Sequence[Finding], status: str) -> dict[tuple[str, str], list[str]]:
    """The families by check and detail, so that what is true of all is said once."""
    places: dict[tuple[str, str], list[str]] = {}
    for found in findings:
        if found.status == status:
            places.setdefault((found.check, found.detail), []).append(found.family)
    return places


def _cell(found: Finding | None) -> str:
    if found is None:
        return ""
    if found.status == "passed":
        return f"[green]{escape(found.text) or '✓'}[/]"
    return f"{_MARK[found.status]} {escape(found.text)}"


def _print_summary(
    findings: Sequence[Finding], families: Sequence[str], seconds: float, console: Console
) -> None:
    failed = sum(found.status == "failed" for found in findings)
    supported = {found.family for found in findings if found.check in CHECKS}
    where = ", ".join(family for family in families if family in supported)
    sizes = ", ".join(f"{BASE_SIZE[f][0]}" for f in families if f in BASE_SIZE)
    if sizes:
        console.print(f"Parameters are counted without the head; full size is {sizes}.")
    if failed:
        console.print(f"[red]{failed} of {len(findings)} checks failed[/] ({seconds:.0f} s).")
    else:
        console.print(f"[green]All {len(findings)} checks passed[/] on {where} ({seconds:.0f} s).")
