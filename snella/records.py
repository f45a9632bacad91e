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
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from snella.errors import UserError
from snella.files import digest_json, json_text, sha256, write_json

SCHEMA = 2
READABLE = (1, 2)
FINAL = ("ok", "diverged")
STATUSES = (*FINAL, "failed", "oom", "timeout")
FILES = RECORD, FINISHED, FAILURE = "record.json", "finished.json", "failure.json"
PACKAGES = ("torch", "timm", "peft", "numpy", "pillow", "safetensors", "snella")
PACKAGE = Path(__file__).resolve().parent
LARGEST = 64 * 2**20
"""Bytes of a record; more is some other file."""
Record = dict[str, Any]
Number = float | None


class _Part(BaseModel):
    """What readers rely on in a record, where it is there; other keys may hold anything."""

    model_config = ConfigDict(strict=True)


class _Run(_Part):
    suite: str
    backbone: str
    dataset: str
    method: str
    protocol: str
    seed: int


class _Metric(_Part):
    name: str
    title: str = ""
    unit: str = ""
    higher_is_better: bool = True
    lower: float
    upper: float
    chance: Number = None


class _Git(_Part):
    commit: str | None = None
    dirty: bool | None = None


class _Provenance(_Part):
    command: str = ""
    git: _Git = _Git()
    hardware: dict[str, str | int | None] = {}
    packages: dict[str, str | None] = {}
    python: str = ""
    started: str = ""
    ended: str = ""


class _Shape(_Part):
    status: str
    reason: str | None = None
    task: str = ""
    run: _Run
    protocol: dict[str, Any] | None = None
    method: dict[str, Any] = {}
    metric: str | None = None
    metric_info: list[_Metric] = []
    metrics: dict[str, dict[str, Number]] = {}
    groups: dict[str, dict[str, dict[str, Number]]] | None = None
    parameters: dict[str, Number] | None = None
    cost: dict[str, Number] | None = None
    identity: dict[str, Any] = {}
    files: dict[str, str] | None = None
    merge: dict[str, Any] | None = None
    scores: str | None = None
    warnings: list[str] = []
    provenance: _Provenance = _Provenance()


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


def read_record(folder: Path | str) -> Record | None:
    """The record of a run's folder, a failure's if there is no finished one, or None.

    Raises :class:`~snella.errors.UserError` for a file that is unreadable, of an unknown schema,
    or not as it was written.
    """
    for name in FILES:
        if os.path.exists(f"{folder}/{name}"):
            return read_file(f"{folder}/{name}")
    return None


def read_failure(folder: Path | str) -> Record | None:
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
        text = _bytes(path)
        record = _parsed(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a readable record ({_unreadable(error)}); {_remedy(path)}."
        ) from error
    found = record.get("schema") if isinstance(record, dict) else None
    if type(found) is not int or found not in READABLE:
        newer = type(found) is int and found > SCHEMA
        raise UserError(
            f"{path} has record schema {str(found)[:40]}, this version reads schemas 1 and 2; "
            f"{'update snella, which wrote it' if newer else _remedy(path)}."
        )
    try:
        if found == 1:
            record = _from_schema_1(record)
            _Shape.model_validate(record)
            return record
        _check(record, text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"it lacks or breaks {place!r} ({first['msg'].lower()})"
        raise UserError(f"{path}: {reason}; {_remedy(path)}.") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else f"it lacks or breaks {error}"
        raise UserError(f"{path}: {reason}; {_remedy(path)}.") from error
    return dict(record)


def _bytes(path: Path | str) -> bytes:
    """The file's bytes; raises ``ValueError`` for what is no regular file, without waiting."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is a folder" if stat.S_ISDIR(found.st_mode) else "no regular file")
        if found.st_size > LARGEST:
            raise ValueError(f"it has {found.st_size:,} bytes")
        return os.read(file, found.st_size)
    finally:
        os.close(file)


def _parsed(text: bytes) -> Any:
    """JSON as a value: pydantic's parser is the faster, Python's says where a text is none."""
    try:
        return from_json(text)
    except ValueError:
        return json.loads(text)


def _unreadable(error: Exception) -> str:
    """Why a file is no record, in words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON from line {error.lineno}, column {error.colno}" if error.doc else "empty"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "no text" if isinstance(error, UnicodeDecodeError) else str(error)[:100]


def _remedy(path: Path | str) -> str:
    """What helps: of a finished run there is a copy, which counts once the record is gone."""
    path = Path(path)
    if path.name == RECORD and path.with_name(FINISHED).is_file():
        return f"delete it, so that its copy {FINISHED} counts"
    return "delete it and rerun the run"


def _check(record: Record, text: bytes) -> None:
    """Raise ``ValueError`` for a record that is not as it was written, or out of range."""
    _Shape.model_validate(record)
    if record["status"] not in STATUSES:
        raise ValueError(f"status {record['status'][:40]!r} is unknown")
    if not _unchanged(record, text):
        raise ValueError("its content does not match its digest, so it was changed by hand")
    for info in record.get("metric_info", []):
        name, lower, upper = info["name"], info["lower"], info["upper"]
        for rule, values in record.get("metrics", {}).items():
            value = values[name]
            if value is None or not (math.isfinite(value) and lower <= value <= upper):
                raise ValueError(f"{rule} {name} {value} is out of its range")
        for rule, parts in (record.get("groups") or {}).items():
            for part, value in parts.get(name, {}).items():
                if value is not None and (value < lower or value > upper):
                    raise ValueError(f"{rule} {name} of {part[:40]!r} {value} is out of its range")


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
        raise ValueError(f"status {str(record['status'])[:40]!r} is unknown")
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


@cache
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
