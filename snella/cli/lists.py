"""What there is and how far it is: rows, columns, runs; for people and, as JSON, for programs."""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from snella.errors import UserError
from snella.jobs import budget, tables
from snella.jobs.inputs import missing_of
from snella.jobs.prepare import inputs_of
from snella.records import many
from snella.runs.run import Run
from snella.suite import plan
from snella.suite.config import Config
from snella.suite.status import state

WIDE = 10_000
LONG = 500
"""Rows from which on a list is plain columns."""
FINISHED = ("done", "diverged")
ATTENTION = ("running", "failed", "stale", "damaged", "diverged")


def console() -> Console:
    """A console that cuts nothing where the output is no terminal."""
    found = Console(markup=False, highlight=False)
    return found if found.is_terminal else Console(width=WIDE, markup=False, highlight=False)


def print_json(content: Any) -> None:
    """Write indented JSON to stdout."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _table(*columns: str, title: str | None = None, fixed: int = 1) -> Table:
    """A table whose first columns are never cut; the others fold onto further lines."""
    heads = [
        Column(name, no_wrap=number < fixed, overflow="fold") for number, name in enumerate(columns)
    ]
    return Table(*heads, title=title, title_justify="left")


def _print(table: Table, rows: list[list[str]], fixed: int = 1) -> None:
    if len(rows) > LONG:  # rich takes half a millisecond per row
        names = [str(column.header) for column in table.columns]
        widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
        for row in (names, *rows):
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            sys.stdout.write(f"{line.rstrip()}\n")
        return
    for number, column in enumerate(table.columns[:fixed]):
        column.min_width = max([len(row[number]) for row in rows] + [len(str(column.header))])
    for row in rows:
        table.add_row(*row)
    console().print(table)


def run_list(config: Config, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs with their state and why."""
    found: list[dict[str, Any]] = []
    inputs = inputs_of(config, runs)
    for run in runs:
        try:
            how = state(run, inputs)
            name, reason, record = how.name, how.reason, how.record
        except UserError as error:
            name, reason, record = "damaged", str(error), None  # type: ignore[assignment]
        found.append({
            "suite": run.suite,
            "method": run.method.name,
            "dataset": run.dataset.name,
            "seed": run.seed,
            "state": name,
            "reason": reason,
            "seconds": ((record or {}).get("cost") or {}).get("train_seconds"),
            "folder": run.place,
        })  # fmt: skip
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by state, and the time that is left, by the median of what is known."""
    counts = Counter(run["state"] for run in runs)
    known = [run["seconds"] for run in runs if run["seconds"] is not None]
    done = sum(counts[name] for name in FINISHED)
    typical = statistics.median(known) if known else None
    waiting = len(runs) - done
    return {
        "runs": len(runs),
        "done": done,
        "to_do": waiting,
        "states": dict(sorted(counts.items())),
        "seconds_per_run": typical,
        "core_minutes_left": None if typical is None else waiting * typical / 60,
    }


@many()
def print_plan(config: Config, table_name: str, as_json: bool = False) -> None:
    """Print each run, its state, and the time the rest may take."""
    planned = tables.table_runs(config, table_name)
    runs, missing = run_list(config, planned), missing_of(config, planned)
    total = summary(runs)
    if as_json:
        content = {"suite": config.suite, "table": table_name, **total}
        print_json({**content, "missing": missing, "list": runs})
        return
    _print_runs(runs, f"{table_name}, suite {config.suite}")
    _print_total(total)
    for line in missing:
        sys.stdout.write(f"missing: {line}\n")


@many()
def print_search(config: Config, as_json: bool = False) -> None:
    """Print what the suite's search costs, and each of its trials."""
    planned = plan.search_runs(config)
    cost, runs = budget.search(config, planned), run_list(config, planned)
    if as_json:
        print_json({"suite": config.suite, **asdict(cost), "list": runs})
        return
    sys.stdout.write("\n".join(cost.lines()) + "\n")
    _print_runs(runs, f"search, suite {config.suite}")


def print_budget(config: Config, suites: Sequence[str], as_json: bool = False) -> None:
    """Print what suites cost."""
    found = budget.suites(config, suites)
    if as_json:
        print_json([asdict(cost) for cost in found])
        return
    for cost in found:
        sys.stdout.write("\n".join(cost.lines()) + "\n")
    sys.stdout.write(f"{budget.total(found)}\n")


def _print_runs(runs: list[dict[str, Any]], title: str) -> None:
    table = _table("Method", "Data set", "Seed", "State", "Seconds", "Why", title=title, fixed=4)
    rows = [
        [run["method"], run["dataset"], str(run["seed"]), run["state"], _seconds(run["seconds"]),
         run["reason"]]
        for run in runs
    ]  # fmt: skip
    _print(table, rows, fixed=4)


@many()
def print_status(config: Config, table_name: str, as_json: bool = False) -> None:
    """Print how many runs are in which state, where some are running, and what is wrong and why."""
    runs = run_list(config, tables.table_runs(config, table_name))
    total = summary(runs)
    wrong = [run for run in runs if run["state"] in ATTENTION]
    if as_json:
        print_json({"suite": config.suite, "table": table_name, **total, "attention": wrong})
        return
    _print_total(total)
    for run in wrong:
        cell = f"{run['method']} on {run['dataset']}, seed {run['seed']}"
        sys.stdout.write(f"  {run['state']}: {cell}: {run['reason']}\n")
    if total["states"].get("failed") or total["states"].get("diverged"):
        sys.stdout.write(
            "The workflow tries failed runs again; `snella retry RUN` a diverged one.\n"
        )


def _print_total(total: dict[str, Any]) -> None:
    states = ", ".join(f"{count} {name}" for name, count in total["states"].items())
    sys.stdout.write(f"{total['runs']} runs, {total['done']} done, {total['to_do']} to do")
    sys.stdout.write(f" ({states})\n")
    if total["to_do"] and total["core_minutes_left"] is not None:
        sys.stdout.write(
            f"about {total['core_minutes_left']:.0f} core-minutes of training "
            f"({total['seconds_per_run']:.0f} s per run, the median of the finished ones)\n"
        )
    elif total["to_do"]:
        sys.stdout.write("no run has finished yet, so there is nothing to estimate time from\n")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def print_methods(config: Config, as_json: bool = False) -> None:
    """Print the configured rows."""
    enabled = plan.suite_methods(config)
    entries: list[dict[str, Any]] = [
        {
            "name": name,
            "label": entry.label or name,
            "file": plan.method_path(config, entry.file),
            "hyperparameters": entry.hyperparameters,
            "protocol": entry.protocol,
            "in_suite": name in enabled,
        }
        for name, entry in config.methods.items()
    ]
    if as_json:
        print_json(entries)
        return
    rows = []
    for e in entries:
        settings = ", ".join(f"{k}={v}" for k, v in e["hyperparameters"].items())
        rows.append([e["name"], e["label"], e["file"], settings])
    _print(_table("Name", "Label", "File", "Hyper-parameters"), rows)


def print_datasets(config: Config, as_json: bool = False) -> None:
    """Print the configured data sets and whether they are prepared."""
    enabled = plan.current_suite(config).datasets
    entries: list[dict[str, Any]] = [
        {
            "name": name,
            "label": entry.label or name,
            "task": entry.task,
            "kind": entry.kind,
            "path": entry.path,
            "made": plan.is_made(config, name),
            "prepared": plan.manifest(config, name).exists(),
            "in_suite": name in enabled,
        }
        for name, entry in config.datasets.items()
    ]
    if as_json:
        print_json(entries)
        return
    rows = []
    for e in entries:
        where = e["path"] or ("packaged or rendered" if e["made"] else "not set")
        prepared = "yes" if e["prepared"] else "no"
        rows.append([e["name"], e["label"], e["task"], e["kind"], where, prepared])
    _print(_table("Name", "Label", "Task", "Kind", "Folder", "Prepared"), rows)
