"""One run as a person wants to see it: what ran, how it ended, where, and how to repeat it.

Everything comes from the run's own folder, so that it reads the same on another machine.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snella.errors import UserError
from snella.files import digest_file, digest_tree
from snella.records import Record, read_failure, read_record

LOG_LINES, LOG_CHARACTERS = 20, 3000
REPEATED = "reproduced"
"""The results folder that the repeating command writes to, so that nothing is overwritten."""
RUN_FILES = ("config.json", "history.csv", "log.txt")


def describe(folder: Path, *, check: bool = True) -> dict[str, Any]:
    """All that a run's folder says, as plain values for JSON.

    Keys: ``folder``, ``run``, ``status``, ``reason``, ``failure`` (of a try after the last
    finished one), ``warnings``, ``metric``, ``metric_info``, ``metrics``, ``parameters``, ``cost``,
    ``method``, ``protocol``, ``settings`` (all of the run, resolved), ``identity``, ``digests``,
    ``changed`` (files that are no longer as recorded; only with ``check``), ``environment``,
    ``curve``, ``log`` and ``commands``. Raises :class:`~snella.errors.UserError` where the folder
    holds no run, or a record that cannot be read.
    """
    record, settings = read_record(folder), read_settings(folder)
    if record is None and settings is None:
        raise UserError(f"{folder} holds no run (record.json, failure.json or config.json).")
    found = record or _unfinished(settings or {})
    failure = read_failure(folder)
    later = failure is not None and failure.get("digest") != found.get("digest")
    names = ("run", "status", "reason", "metric", "metric_info", "metrics", "parameters", "cost")
    return {
        "folder": folder.as_posix(),
        **{name: found.get(name) for name in names},
        "failure": f"{failure['status']}: {failure['reason']}" if failure and later else None,
        "warnings": found.get("warnings") or [],
        "method": found.get("method") or {},
        "protocol": found.get("protocol") or {},
        "settings": settings,
        "identity": found.get("identity") or {},
        "digests": found.get("files") or {},
        "changed": changed_files(folder, found) if check else [],
        "environment": found.get("provenance") or {},
        "curve": read_curve(folder),
        "log": log_tail(folder),
        "commands": commands(folder, found, settings),
    }


def _unfinished(settings: Mapping[str, Any]) -> Record:
    """What is known of a run before it has a record."""
    parts = ("backbone", "dataset", "method")
    found = {part: settings.get(part) for part in parts}
    names = {k: v.get("name", "") if isinstance(v, dict) else "" for k, v in found.items()}
    run = {
        "suite": settings.get("suite", ""),
        **names,
        "protocol": settings.get("protocol_name", ""),
        "seed": settings.get("seed", 0),
    }
    return {"run": run, "status": "unfinished", "reason": "no record yet"}


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The run's resolved settings, if the folder has them in a readable form."""
    try:
        content = json.loads(_text(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _text(path: Path) -> str:
    """A text file's content; raises ``OSError`` for anything else, which could block."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_bytes().decode("utf-8")


def read_curve(folder: Path) -> dict[str, list[float | None]]:
    """The columns of ``history.csv``, one value per epoch; None where there is no number."""
    try:
        rows = list(csv.DictReader(io.StringIO(_text(folder / "history.csv"), newline="")))
    except (OSError, ValueError, csv.Error):
        return {}
    names = [name for name in (rows[0] if rows else {}) if name]
    return {name: [_number(row.get(name)) for row in rows] for name in names}


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def log_tail(folder: Path, lines: int = LOG_LINES) -> list[str]:
    """The last lines of the run's log, without characters that would move a cursor."""
    try:
        if not (folder / "log.txt").is_file():
            return []
        with (folder / "log.txt").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LOG_CHARACTERS))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    shown = text.splitlines()[-lines:]
    return ["".join(c if c.isprintable() or c == "\t" else "�" for c in line) for line in shown]


def changed_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """The files, and folders of files, that are gone or differ from what the record saw."""
    recorded = record.get("files") or {}
    return [name for name, digest in recorded.items() if _digest(folder / name) != digest]


def _digest(path: Path) -> str | None:
    if path.is_dir():
        return digest_tree(path)
    return digest_file(path) if path.is_file() else None


def commands(
    folder: Path, record: Mapping[str, Any], settings: Mapping[str, Any] | None
) -> list[str]:
    """What to type in the repository to repeat exactly this run, and to compare the two.

    The settings stand in the command, so that it needs no configuration of ours. Without them
    (an older run) the names of its parts have to do.
    """
    run = record["run"]
    commit = ((record.get("provenance") or {}).get("git") or {}).get("commit")
    lines = [f"git checkout {shlex.quote(str(commit))}"] if commit else []
    lines.append(f"snella prepare {shlex.quote(str(run['dataset']))}")
    if settings is None:
        names = [
            f"--{part} {shlex.quote(str(run[part]))}" for part in ("method", "dataset", "seed")
        ]
        where = f"suite={run['suite']} results={REPEATED}"
        return [*lines, f"snella run {' '.join(names)} --config {where}"]
    lines.append(repeat(settings))
    names = [*(str(run[part]) for part in ("suite", "backbone", "dataset", "method")),
             f"seed{run['seed']}"]  # fmt: skip
    twin = "/".join((REPEATED, "runs", *names))
    return [*lines, f"snella diff {shlex.quote(folder.as_posix())} {shlex.quote(twin)}"]


def repeat(settings: Mapping[str, Any]) -> str:
    """The command that does a run of these settings anew, into a results folder of its own."""
    text = json.dumps({**settings, "results": REPEATED}, sort_keys=True)
    return f"snella execute --settings {shlex.quote(text)}"


def shown_metrics(record: Mapping[str, Any]) -> list[tuple[str, str, int | None, str]]:
    """(selection, metric's title, epoch from 1, number with unit), the protocol's choice first."""
    infos: Sequence[Mapping[str, Any]] = record.get("metric_info") or ()
    own = (record.get("protocol") or {}).get("selection", "last")
    found = []
    numbers = record.get("metrics") or {}
    for selection in sorted(numbers, key=lambda name: name != own):
        values = numbers[selection]
        epoch = values.get("epoch")
        for info in infos:
            if info["name"] in values:
                text = with_unit(values[info["name"]], info.get("unit", ""))
                title = info.get("title") or info["name"]
                found.append((selection, title, None if epoch is None else epoch + 1, text))
    return found


def with_unit(value: float, unit: str) -> str:
    """A recorded number as printed: a fraction in per cent, others with four digits."""
    if unit == "%":
        return f"{100 * value:.2f} %"
    return f"{value:.4g}{' ' if unit else ''}{unit}"
