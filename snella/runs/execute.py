"""One run from its resolved settings to its record: build, adapt, train, score, measure."""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from snella.backends import cpu
from snella.data.prepared import Prepared
from snella.errors import CannotMerge, Diverged, UserError
from snella.methods.base import (
    Method,
    build_method,
    count_parameters,
    prepare_model,
    seed_everything,
)
from snella.models.backbones import file_digest
from snella.records import SCHEMA, atomic, now, provenance, write_json, write_record
from snella.runs.evaluate import score_run
from snella.runs.measure import gflops
from snella.runs.protocol import Protocol
from snella.runs.trainer import Progress, Row, Trainer
from snella.suite import plan
from snella.tasks import TASKS, Task

log = logging.getLogger("snella")
Report = Callable[[Row, int], None]
WAIT_SECONDS = 60


class Terminated(Exception):
    """The run was asked to stop, by a scheduler's time limit or by a person."""


@dataclass
class Loaded:
    """What a run works on, built from its settings."""

    method: Method
    model: nn.Module
    task: Task
    seed: int
    identity: str
    digests: dict[str, str]


def execute(settings: dict[str, Any], folder: Path, report: Report = lambda row, n: None) -> dict:
    """Do the run and write its record into ``folder``; return the record.

    The status says how it ended. Only a :class:`~snella.errors.UserError` is raised, after it
    was recorded as the reason of the failure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder), _log_file(folder / "log.txt"), _terminable():
        write_json(folder / "config.json", settings)
        record = _header(settings)
        try:
            record |= _run(settings, folder, report)
            record["status"] = "ok"
        except UserError as error:
            _finish(folder, record, "failed", str(error))
            raise
        except Exception as error:
            _finish(folder, record, _status(error), _reason(error))
            log.exception("The run ended with status %s", record["status"])
            return record
        _finish(folder, record, "ok", None)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        return record


def load_run(settings: dict[str, Any]) -> Loaded:
    """Build the adapted model and the task of a run, seeded and before any training."""
    values = {k: v for k, v in settings["protocol"].items() if k != "name"}
    dataset = settings["dataset"]
    data = Prepared.open(Path(dataset["prepared"]))
    task = TASKS[dataset["task"]](data, Protocol(**values))
    path = Path(settings["method"]["file"])
    method = build_method(path, settings["method"]["hyperparameters"])
    seed = plan.derive_seed(settings["base_seed"], dataset["name"], settings["seed"])
    seed_everything(seed)
    model = task.build_model(settings["backbone"])
    prepare_model(method, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digests = {
        "data": str(data.manifest["digest"]),
        "backbone": file_digest(settings["backbone"]["file"]),
        "method": file_digest(path),
    }
    canonical = json.dumps(settings, sort_keys=True)
    identity = plan.identity(canonical, path.read_bytes(), digests["data"], digests["backbone"])
    return Loaded(method, model.to(device), task, seed, identity, digests)


def _run(settings: dict[str, Any], folder: Path, report: Report) -> dict[str, Any]:
    loaded = load_run(settings)
    log.info("Run %s on %s", loaded.identity[:12], next(loaded.model.parameters()).device)
    trainer = Trainer(
        loaded.method,
        loaded.model,
        loaded.task,
        loaded.seed,
        folder / "checkpoint.pt",
        loaded.identity,
        report,
    )
    progress = trainer.fit()
    counts = count_parameters(loaded.model)
    parameters = counts | {"with_head": counts["trainable"] + counts["head"]}
    _write_adapter(folder, loaded.method.state(loaded.model), loaded.identity)
    _write_history(folder, progress.history)
    data = loaded.task.data
    trained_on_val = loaded.task.protocol.train_split == "trainval"
    targets = None if trained_on_val else data.labels("val200")
    return {
        "identity": loaded.identity,
        "metric": loaded.task.metric,
        "metrics": score_run(loaded.task, progress.predictions, data.folder, targets),
        "parameters": parameters,
        "merge": _merge(loaded),
        "cost": _cost(progress, loaded),
        "digests": loaded.digests,
    }


def _header(settings: dict[str, Any]) -> dict[str, Any]:
    named = {key: settings[key]["name"] for key in ("backbone", "dataset", "method", "protocol")}
    return {
        "schema": SCHEMA,
        "run": {"suite": settings["suite"], **named, "seed": settings["seed"]},
        "protocol": settings["protocol"],
        "method": settings["method"],
        "provenance": provenance() | {"threads": torch.get_num_threads()},
    }


def _finish(folder: Path, record: dict[str, Any], status: str, reason: str | None) -> None:
    record |= {"status": status, "reason": reason}
    record["provenance"] |= {"ended": now(), "compiled_loops": cpu.in_use()}
    write_record(folder, record)


def _status(error: Exception) -> str:
    if isinstance(error, Diverged):
        return "diverged"
    if isinstance(error, Terminated):
        return "timeout"
    return "oom" if isinstance(error, torch.OutOfMemoryError | MemoryError) else "failed"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Diverged | Terminated) else f"{type(error).__name__}: {text}"


def _merge(loaded: Loaded) -> dict[str, Any]:
    """Fold the update in and say how far the outputs moved, or why it cannot be folded."""
    image = _example(loaded)
    loaded.model.eval()
    with torch.inference_mode():
        before = loaded.model(image)
    try:
        loaded.method.merge(loaded.model)
    except CannotMerge as error:
        return {"merged": False, "max_difference": None, "reason": str(error)}
    with torch.inference_mode():
        difference = (loaded.model(image) - before).abs().max().item()
    return {"merged": True, "max_difference": difference, "reason": None}


def _cost(progress: Progress, loaded: Loaded) -> dict[str, Any]:
    """Costs of training, and of inference with the update folded in where that is possible."""
    rows = progress.history
    seconds = sum(row["train_seconds"] for row in rows)
    tested = [row for row in rows if "test_seconds" in row][-1]
    return {
        "gflops": gflops(loaded.model, _example(loaded)),
        "peak_memory_mb": progress.peak_memory_mb,
        "train_seconds": seconds,
        "train_seconds_per_image": seconds / sum(row["images"] for row in rows),
        "inference_seconds_per_image": tested["test_seconds"] / tested["test_images"],
    }


def _example(loaded: Loaded) -> Tensor:
    first = next(iter(loaded.task.train_batches(None)))["image"][:1]
    return first.to(next(loaded.model.parameters()).device)


def _write_adapter(folder: Path, state: dict[str, Tensor], identity: str) -> None:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    with atomic(folder / "adapter.safetensors") as path:
        save_file(tensors, path, metadata={"identity": identity})


def _write_history(folder: Path, rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic(folder / "history.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Keep a second process out of the run: an orphan of a killed workflow may still be at it."""
    with open(folder / ".lock", "w") as lock:
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - begin > WAIT_SECONDS:
                    raise UserError(
                        f"Another process is working on {folder}; wait for it or end it."
                    ) from None
                time.sleep(0.5)
        yield


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn the scheduler's SIGTERM into an exception, so that the record can say so."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated("stopped by a signal (time limit or cancelled); rerun to resume")

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: leave signals to whoever is
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def set_threads() -> None:
    """Use as many CPU threads as the scheduler granted (``OMP_NUM_THREADS``)."""
    granted = os.environ.get("OMP_NUM_THREADS")
    if granted and granted.isdigit():
        torch.set_num_threads(int(granted))
