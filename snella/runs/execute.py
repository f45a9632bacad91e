"""One run from its settings to its record: train, evaluate, record, and say how it ended."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from snella.data.prepared import Prepared
from snella.errors import Diverged, UserError, contained, one_line
from snella.files import digest_file, remove_leftovers, try_lock, write_text
from snella.records import (
    FINAL,
    FINISHED,
    RECORD,
    SCHEMA,
    Record,
    now,
    provenance,
    read_file,
    sign,
    write_record,
)
from snella.runs.evaluate import SCORES, Evaluation, evaluate, require_files, write_scores
from snella.runs.run import Run
from snella.runs.stopping import Terminated, terminable
from snella.runs.train import Report, finished_training, looks, open_data, run_identity, train

log = logging.getLogger("snella")
MEMORY = (
    "lower `batch_size` (`accumulation` makes up for it), or set `gradient_checkpointing: true`"
)
POLL_SECONDS = 0.5


def execute(
    run: Run, report: Report = lambda row, n: None, *, again: bool = False, stage: str = "all"
) -> Record:
    """Do what is missing of a run and return its record.

    A finished record of the same identity is returned as it is, unless ``again``; a finished
    training of the same identity is only scored. ``stage`` "train" stops before scoring, for the
    workflow to score in a job of its own. The status says how the run ended. Only a
    :class:`~snella.errors.UserError` is raised, after it was recorded as the reason of the failure.
    """
    folder = run.folder
    _make(folder)
    with exclusive(folder), _log_file(folder / "log.txt"), terminable(), contained():
        remove_leftovers(folder)
        torch.set_num_threads(run.protocol.threads)
        write_text(folder / "config.json", run.to_json() + "\n")
        record = _header(run)
        try:
            data = open_data(run)
            require_files(run)
            ids = run_identity(run, data)
            if not again and (done := finished(folder, ids)) is not None:
                return _asked_now(folder, done, record)
            if again:
                (folder / "training.json").unlink(missing_ok=True)
                (folder / "checkpoint.pt").unlink(missing_ok=True)
            record["identity"] = ids
            training = train(run, data, ids, folder, report)
            if stage == "train":
                return {**record, "status": "ok", "reason": None}
            record |= _score(run, data, training, folder)
        except UserError as error:
            _finish(folder, record | {"transient": transient(error)}, "failed", str(error))
            raise
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a method may raise what it likes
            log.exception("The run ended before its record was complete")
            record["transient"] = transient(error)
            _finish(folder, record, _status(error), _reason(error, run))
            return sign(record)
        _finish(folder, record, "ok", None)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        return sign(record)


def finished(folder: Path, ids: dict[str, Any]) -> Record | None:
    """The finished record of this very identity, with ``record.json`` put back if it is gone.

    None if what it was made of is no longer as recorded: then that is made anew.
    """
    for name in (RECORD, FINISHED):
        try:
            record = read_file(folder / name)
        except UserError:
            continue
        if record["status"] in FINAL and record["identity"].get("run") == ids["run"]:
            if record["status"] == "ok" and not _intact(folder, ids, record):
                return None
            write_record(folder, record)
            return record
    return None


def _intact(folder: Path, ids: dict[str, Any], record: Record) -> bool:
    """Whether the files of a finished run are those that its record saw."""
    if finished_training(folder, ids) is None:
        place = f"{folder}: the adapter or the predictions are gone or changed"
        sys.stderr.write(f"snella: {place} since the run finished; training again\n")
        return False
    name = record["scores"]
    file = folder / str(name)
    return not name or (file.is_file() and digest_file(file) == record["files"].get(name))


def _asked_now(folder: Path, done: Record, header: Record) -> Record:
    """A finished record with what the protocol asks of it now, such as another selection."""
    if done["protocol"] != header["protocol"]:
        done = sign(done | {"protocol": header["protocol"]})
        write_record(folder, done)
    return done


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise UserError(f"Cannot write results in {folder}: {error.strerror or error}.") from error
    if not (folder / ".lock").is_file():
        raise UserError(f"{folder / '.lock'} is no regular file; remove it.")


def _score(run: Run, data: Prepared, training: dict[str, Any], folder: Path) -> Record:
    found = evaluate(run, data, looks(training, folder))
    files = dict(training["files"])
    scores = write_scores(folder, found.per_example)
    if scores is not None:
        files[SCORES] = digest_file(folder / SCORES)
    info = run.task
    scorer = info.scorer_class()(data, run.task_settings)
    chance = scorer.chance()
    return {
        "metric": info.primary.name,
        "metric_info": [vars(m) | {"chance": chance.get(m.name)} for m in info.metrics],
        "metrics": found.metrics,
        "groups": found.groups,
        "scores": scores,
        "test_size": data.size("test"),
        "parameters": training["parameters"],
        "merge": training["merge"],
        "cost": training["cost"] | {"gflops": training["gflops"]},
        "files": files,
        "warnings": _warnings(run, data, training, found, chance),
        "provenance": training["provenance"],
    }


def _warnings(
    run: Run,
    data: Prepared,
    training: dict[str, Any],
    found: Evaluation,
    chance: dict[str, float],
) -> list[str]:
    """What a reader of the number should know."""
    result = [*run.notes, *data.manifest.get("warnings", []), *found.warnings]
    if training["merge"].get("failed"):
        result.append(f"merging failed: {training['merge']['reason']}")
    metric = run.task.primary
    if metric.name in chance:
        level, n = chance[metric.name], data.size("test")
        margin = 2 * math.sqrt(max(level * (1 - level), 0.0) / n)
        better = found.metrics["last"][metric.name] - level
        if (better if metric.higher_is_better else -better) <= margin:
            result.append("at chance level")
    return result


def _header(run: Run) -> Record:
    return {
        "schema": SCHEMA,
        "task": run.dataset.task,
        "run": {
            "suite": run.suite,
            "backbone": run.backbone.name,
            "dataset": run.dataset.name,
            "method": run.method.name,
            "protocol": run.protocol_name,
            "seed": run.seed,
        },
        "protocol": {
            "name": run.protocol_name,
            **run.protocol.model_dump(mode="json"),
            **run.settings,
        },
        "method": run.method.model_dump() | {"file": Path(run.method.file).name},
        "provenance": provenance() | {"threads": torch.get_num_threads()},
    }


def _finish(folder: Path, record: Record, status: str, reason: str | None) -> None:
    record |= {"status": status, "reason": reason}
    record["provenance"].setdefault("ended", now())
    write_record(folder, record)


def _status(error: BaseException) -> str:
    if isinstance(error, Diverged):
        return "diverged"
    if isinstance(error, Terminated):
        return "timeout"
    return "oom" if _out_of_memory(error) else "failed"


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking; on the CPU torch says so with a plain error."""
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return True
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def transient(error: BaseException) -> bool:
    """Whether another try may end otherwise: what the machine did, not what the code says.

    Out of memory, stopped by a signal, a disk or network that failed, a GPU in disorder.
    """
    if isinstance(error, Terminated | OSError) or _out_of_memory(error):
        return True
    if isinstance(error, UserError):
        return isinstance(error.__cause__, OSError)
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def _reason(error: BaseException, run: Run) -> str:
    """One line, with the line of the method's file or of the task's folder that raised."""
    if isinstance(error, Diverged | Terminated):
        return " ".join(str(error).split())
    text = one_line(error, Path(run.method.file), Path(run.tasks, run.dataset.task))
    if text == one_line(error) and not transient(error):
        text = f"{text} (method {Path(run.method.file).name})"
    unexplained = _status(error) == "oom" and error.__cause__ is None
    return f"{text}; {MEMORY}" if unexplained else text


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep a second process out of the run, which waits: the first may well finish it.

    A job whose workflow was killed goes on, and so does one of another node. The lock is the
    kernel's, so that no crash leaves it behind; where there are none, two processes waste time but
    no result, since files are written whole.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as lock:
        told = False
        while (held := try_lock(lock)) is False:
            if not told:
                lock.seek(0)
                sys.stderr.write(
                    f"snella: {folder} is at work in {_holder(lock.read())}; waiting\n"
                )
                told = True
            time.sleep(POLL_SECONDS)
        if held is None:
            log.warning("%s: this file system has no locks", folder)
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()} | _job()))
        lock.flush()
        yield


def _holder(text: str) -> str:
    try:
        who = json.loads(text)
        job = f", SLURM job {who['slurm']}" if "slurm" in who else ""
        return f"process {who['pid']} on {who['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _job() -> dict[str, str]:
    number = os.environ.get("SLURM_JOB_ID")
    return {"slurm": number} if number else {}


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, mode="w", delay=True)  # a finished run keeps its log
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    propagate, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.propagate = propagate
        log.removeHandler(handler)
        handler.close()
