"""Records: one JSON file per run that says what was run, how it ended, and what it measured.

The record is the hinge between runs and reports. A finished run (``ok``, or ``diverged``, which
would diverge again) writes ``record.json``, and a copy of it, ``finished.json``, that nothing but
the next finished run of the cell replaces. A run that broke (``failed``, ``oom``, ``timeout``)
writes ``failure.json`` beside them, so that the workflow tries it again while the table can still
say why the cell is empty. A digest over the content shows accidents, such as an edit by hand; it
is no signature.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from snella.errors import UserError
from snella.files import digest_json, json_text, sha256, write_json

SCHEMA = 2
READABLE = (1, 2)
FINAL = ("ok", "diverged")
STATUSES = (*FINAL, "failed", "oom", "timeout")
RECORD, FINISHED, FAILURE = "record.json", "finished.json", "failure.json"
PACKAGES = ("torch", "timm", "peft", "numpy", "pillow", "safetensors", "snella")
PACKAGE = Path(__file__).resolve().parent
Record = dict[str, Any]


def write_record(folder: Path, record: Record) -> Path:
    """Write a record with its digest; a failure leaves what was finished before as it is."""
    signed = sign(record)
    if record["status"] not in FINAL:
        write_json(folder / FAILURE, signed)
        return folder / FAILURE
    write_json(folder / FINISHED, signed)
    write_json(folder / RECORD, signed)
    (folder / FAILURE).unlink(missing_ok=True)
    return folder / RECORD


def sign(record: Record) -> Record:
    """The record with the digest of its content, as text: a reader need not write it anew."""
    content = {key: value for key, value in record.items() if key != "digest"}
    return {**content, "digest": sha256(json_text(content).encode())}


def read_record(folder: Path) -> Record | None:
    """The record of a run's folder, a failure's if there is no finished one, or None.

    Raises :class:`~snella.errors.UserError` for a file that is unreadable, of an unknown schema,
    or not as it was written.
    """
    for name in (RECORD, FINISHED, FAILURE):
        if os.path.exists(f"{folder}/{name}"):
            return read_file(f"{folder}/{name}")
    return None


def read_failure(folder: Path) -> Record | None:
    """How the last try of a run broke, if it did after its last finished result."""
    path = f"{folder}/{FAILURE}"
    return read_file(path) if os.path.exists(path) else None


@contextmanager
def many() -> Iterator[None]:
    """Plan and read thousands of runs without the garbage collector.

    It would look through all of them again and again, and finds nothing: they hold no circles.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_file(path: Path | str) -> Record:
    """One record, in the present schema; errors as in :func:`read_record`."""
    try:
        with open(path, "rb") as file:
            text = file.read()
        record = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a readable record ({type(error).__name__}); delete it and rerun."
        ) from error
    found = record.get("schema") if isinstance(record, dict) else None
    if found not in READABLE:
        raise UserError(
            f"{path} has record schema {found}, this version reads schemas 1 and 2; "
            "delete the file and rerun the run."
        )
    try:
        if found == 1:
            return _from_schema_1(record)
        _check(record, text)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else f"it lacks or breaks {error}"
        raise UserError(f"{path}: {reason}; delete the file and rerun the run.") from error
    return dict(record)


def _check(record: Record, text: bytes) -> None:
    """Raise ``ValueError`` for a record that is not as it was written, or out of range."""
    if record["status"] not in STATUSES:
        raise ValueError(f"status {record['status']!r} is unknown")
    for name in ("suite", "backbone", "dataset", "method", "protocol", "seed"):
        record["run"][name]
    if not _unchanged(record, text):
        raise ValueError("its content does not match its digest, so it was changed by hand")
    for info in record.get("metric_info", []):
        for rule, values in record.get("metrics", {}).items():
            value = values[info["name"]]
            if not (math.isfinite(value) and info["lower"] <= value <= info["upper"]):
                raise ValueError(f"{rule} {info['name']} {value} is out of its range")


def _unchanged(record: Record, text: bytes) -> bool:
    """Whether a record is as it was written: by its text or, laid out anew, by its values.

    Records of earlier versions have a digest of another text of the same content.
    """
    digest = str(record.get("digest"))
    if sha256(text.replace(f'  "digest": "{digest}",\n'.encode(), b"", 1)) == digest:
        return True
    content = {key: value for key, value in record.items() if key != "digest"}
    return digest in (sign(record)["digest"], digest_json(content))


def _from_schema_1(record: Record) -> Record:
    """A record of the first version, which knew classification only, in today's form."""
    if record["status"] not in STATUSES:
        raise ValueError(f"status {record['status']!r} is unknown")
    record["run"]["dataset"], record["run"]["method"], record["run"]["seed"]
    for values in record.get("metrics", {}).values():
        if not 0 <= values["top1"] <= 1:
            raise ValueError(f"top1 {values['top1']} is out of its range")
    info = {"name": "top1", "title": "Top-1 accuracy", "unit": "%", "higher_is_better": True}
    return {
        **record,
        "schema": SCHEMA,
        "task": "classification",
        "metric": "top1",
        "metric_info": [{**info, "lower": 0.0, "upper": 1.0}],
        "identity": {"run": record.get("identity", ""), **record.get("digests", {})},
        "groups": {},
        "scores": None,
        "warnings": [],
    }


def provenance() -> dict[str, Any]:
    """Where and with what a run happens: commit, versions, hardware, command."""
    return {
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": _hardware(),
        "command": shlex.join(sys.argv),
        "started": now(),
    }


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git() -> dict[str, Any]:
    """The commit of the package's own repository, not of the working directory's."""

    def ask(*arguments: str) -> str | None:
        command = ["git", "-C", str(PACKAGE), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        if ask("ls-files", "--error-unmatch", "records.py") is None:  # installed elsewhere
            return {"commit": None, "dirty": None}
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
