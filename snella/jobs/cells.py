"""A line per finished cell, with count and time left, for where no terminal shows a display."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from snella.files import write_json

PROGRESS = Path("logs/progress.json")


def begin(records: Iterable[str]) -> None:
    """Note, when a workflow starts, which records it is to make."""
    write_json(PROGRESS, {"started": time.time(), "records": list(records)})


def finished_line(record: dict[str, Any]) -> str:
    """What a log says of a finished run: "full on digits, seed 0: ok, top1 57.2 % (3 of 16)"."""
    run = record["run"]
    line = f"{run['method']} on {run['dataset']}, seed {run['seed']}: {record['status']}"
    if record.get("reason"):
        line += f", {record['reason']}"
    metric = record.get("metric")
    info = next((m for m in record.get("metric_info", []) if m["name"] == metric), None)
    values = record.get("metrics", {}).get("last")
    if info and values:
        percent = info["unit"] == "%"
        value = values[metric] * (100 if percent else 1)
        line += f", {metric} {value:.1f} %" if percent else f", {metric} {value:.3g}"
    return line + _count()


def _count() -> str:
    """How many of the records noted at the start are there by now, and the time left."""
    try:
        noted = json.loads(PROGRESS.read_text())
        records, started = noted["records"], float(noted["started"])
        done = sum(_written(Path(path)) >= started for path in records)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if not 0 < done <= len(records):
        return ""
    left = (time.time() - started) / done * (len(records) - done)
    return f" ({done} of {len(records)}, about {_duration(left)} left)"


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
