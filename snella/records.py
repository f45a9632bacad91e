"""Records: one JSON file per run that says what was run, how it ended, and what it measured.

A finished run (``ok``, or ``diverged``, which would diverge again) writes ``record.json``.
A run that broke (``failed``, ``oom``, ``timeout``) writes the same content to ``failure.json``
instead, so that the workflow tries it again while the table can still say why the cell is empty.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from snella.errors import UserError

SCHEMA = 1
FINAL = ("ok", "diverged")
STATUSES = (*FINAL, "failed", "oom", "timeout")
PACKAGES = ("torch", "timm", "peft", "numpy", "pillow", "safetensors", "snella")


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Write a record; a final one replaces what an earlier failure left behind."""
    final = record["status"] in FINAL
    path = folder / ("record.json" if final else "failure.json")
    write_json(path, record)
    (folder / ("failure.json" if final else "record.json")).unlink(missing_ok=True)
    return path


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run's folder, a failure's if there is no final one, or None.

    Raises :class:`~snella.errors.UserError` for an unreadable file or another schema.
    """
    for name in ("record.json", "failure.json"):
        path = folder / name
        if path.exists():
            return _read(path)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable record ({error}); delete it and rerun."
        ) from error
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA:
        raise UserError(
            f"{path} has record schema {found}, this version reads schema {SCHEMA}; "
            "delete the file and rerun the run."
        )
    return record


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place if the block succeeds.

    Raises :class:`~snella.errors.UserError` when the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def provenance() -> dict[str, Any]:
    """Where and with what a run happens: commit, versions, hardware, command."""
    return {
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": _hardware(),
        "command": " ".join(sys.argv),
        "started": now(),
    }


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git() -> dict[str, Any]:
    def ask(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, status = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "-uno")
    except OSError:
        commit, status = None, None
    return {"commit": commit, "dirty": bool(status) if status is not None else None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
