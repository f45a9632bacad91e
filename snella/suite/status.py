"""How a planned run stands: done, running, failed, stale and why, or not yet run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from snella.errors import UserError
from snella.models.backbone_files import RANDOM, weights_path
from snella.records import FINAL, Record, read_failure, read_record
from snella.runs.identity import Stats, code_parts, stats, weights_digest
from snella.runs.run import Run
from snella.tasks.base import Backbone

PARTS = {
    "settings": "other settings",
    "code": "other code",
    "libraries": "other library versions",
    "evaluation": "another scorer",
    "merge": "another merge",
    "data": "other data",
    "backbone": "other weights",
}
"""What a record's identity may differ in from the plan's, in words."""
LARGE = 1 << 30
"""Bytes of weights that take seconds to read."""


@dataclass(frozen=True)
class State:
    """``record`` is the finished one, if any; ``reason`` says why it does not count, or broke."""

    name: Literal["done", "diverged", "stale", "failed", "running", "missing"]
    reason: str
    record: Record | None


class Inputs:
    """Data and weights as they lie on the disk, looked at once for all runs that are compared.

    The data sets ``moved`` are no longer what their prepared folders were made from.
    """

    def __init__(self, moved: Collection[str] = ()) -> None:
        self._data: dict[str, str | None] = dict.fromkeys(moved, "")
        self._weights: dict[str, tuple[Path | None, Stats]] = {}

    def data(self, run: Run) -> str | None:
        """The digest of the prepared data; None where there are none."""
        name = run.dataset.name
        if name not in self._data:
            self._data[name] = _data_digest(run.dataset.prepared)
        return self._data[name]

    def weights(self, run: Run) -> str | None:
        """Of the weights; None where they are missing, or large and no younger than the record."""
        try:
            path, files = self._files(run.backbone)
            if path is None:
                return RANDOM
            if sum(size for _, size, _ in files) > LARGE:
                written = os.stat(f"{run.place}/record.json").st_mtime_ns
                if all(changed < written for *_, changed in files):
                    return None
            return weights_digest(path, files) if files else None
        except (OSError, UserError):
            return None

    def _files(self, backbone: Backbone) -> tuple[Path | None, Stats]:
        if backbone.name not in self._weights:
            path = weights_path(backbone.entry)
            self._weights[backbone.name] = path, () if path is None else stats(path)
        return self._weights[backbone.name]


def state(run: Run, inputs: Inputs | None = None) -> State:
    """Compare a run's folder with the plan, as the workflow does.

    Many runs share their ``inputs``. Raises :class:`~snella.errors.UserError` for a record that
    cannot be read or was changed.
    """
    folder = run.place
    record = read_record(folder)
    if is_running(folder):
        return State("running", whereabouts(folder), record)
    broken = read_failure(folder)
    if record is None or record["status"] not in FINAL:
        if broken is None:
            return State("missing", "not run", None)
        return State("failed", f"{broken['status']}: {broken['reason']}", None)
    differs = differences(run, record, inputs)
    if differs:
        why = f"made with {' and '.join(differs)}"
        if broken is not None:
            return State("failed", f"{broken['status']}: {broken['reason']}", record)
        return State("stale", why, record)
    return State("done" if record["status"] == "ok" else "diverged", record["reason"] or "", record)


def differences(run: Run, record: Record, inputs: Inputs | None = None) -> list[str]:
    """In which parts a record's identity differs from the plan's, in words."""
    known: dict[str, Any] = record.get("identity") or {}
    if "settings" not in known:
        return ["an earlier version, whose identity cannot be compared"]
    inputs = inputs or Inputs()
    planned = {**code_parts(run), "data": inputs.data(run), "backbone": inputs.weights(run)}
    return [
        words
        for part, words in PARTS.items()
        if planned[part] is not None and planned[part] != known.get(part)
    ]


def _data_digest(folder: str) -> str | None:
    try:
        return str(json.loads(Path(folder, "manifest.json").read_bytes())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for a writer, should a pipe stand there."""
    return os.open(path, flags | os.O_NONBLOCK)


def is_running(folder: Path | str) -> bool:
    """Whether a process holds the run's lock."""
    try:
        with open(f"{folder}/.lock", opener=_at_once) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # NFS: an exclusive one needs writing
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def whereabouts(folder: Path | str) -> str:
    """Where a run is at work, as its process noted in the lock: host, process, SLURM job."""
    try:
        noted = json.loads(Path(folder, ".lock").read_text(encoding="utf-8"))
        job = f", SLURM job {noted['slurm']}" if "slurm" in noted else ""
        return f"on {noted['host']}, process {noted['pid']}{job}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def usable(
    run: Run, stale: bool = False, inputs: Inputs | None = None
) -> tuple[Record | None, State]:
    """The record that a table may show for a run, and how the run stands.

    A stale one counts only where ``stale`` ones are asked for.
    """
    found = state(run, inputs)
    shown = found.name in ("done", "diverged") or (stale and found.name == "stale")
    return (found.record if shown else None), found
