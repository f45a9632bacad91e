"""The training stage of a run: adapter and predictions on disk, and ``training.json`` about them.

Training never sees sealed test targets. What it leaves is complete: scoring, and folding the update
into the weights with another version of ``merge``, need no training.
"""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from snella.data.prepared import Prepared
from snella.errors import CannotMerge, one_line
from snella.files import atomic, digest_file, digest_tree, write_json
from snella.methods.base import Batch, Method, build_method, counted, prepare_model
from snella.models.parameters import seed_everything
from snella.records import now, provenance
from snella.runs.identity import backbone_digest, identity
from snella.runs.measure import gflops
from snella.runs.run import Run
from snella.runs.trainer import PREDICTIONS, Progress, Row, Trainer, prediction_folder
from snella.seeds import derive_seed
from snella.tasks.base import Task

log = logging.getLogger("snella")
Report = Callable[[Row, int], None]
TRAINING, ADAPTER = "training.json", "adapter.safetensors"


@dataclass
class Loaded:
    """What a run works on, built from its settings."""

    run: Run
    method: Method
    model: nn.Module
    task: Task
    seed: int


def open_data(run: Run) -> Prepared:
    """The run's prepared data, every byte as it was written."""
    data = Prepared.open(Path(run.dataset.prepared), run.dataset.scored)
    data.verify()
    return data


def run_identity(run: Run, data: Prepared) -> dict[str, Any]:
    """All parts of the run's identity."""
    return identity(run, data.digest, backbone_digest(run))


def load_run(run: Run, data: Prepared | None = None) -> Loaded:
    """Build the adapted model and the task of a run, seeded and before any training."""
    data = open_data(run) if data is None else data
    task = run.task.task_class()(data, run.task_settings, run.protocol.batch_size)
    method = build_method(Path(run.method.file), run.method.hyperparameters)
    seed = derive_seed(run.base_seed, run.dataset.name, run.seed)
    seed_everything(seed)
    model = task.build_model(run.backbone)
    prepare_model(method, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Loaded(run, method, model.to(device), task, seed)


def train(run: Run, data: Prepared, ids: dict[str, Any], folder: Path, report: Report) -> Any:
    """Train, or find that this very training is done; returns the content of ``training.json``.

    Raises what ends a training: see :class:`~snella.runs.trainer.Trainer`.
    """
    done = finished_training(folder, ids)
    if done is not None and done["merge"]["code"] == ids["merge"]:
        return done
    loaded = load_run(run, data)
    if done is None:
        done = _train(loaded, ids, folder, report)
    else:
        loaded.method.load_state(loaded.model, load_file(folder / ADAPTER))
    done |= _fold(loaded, ids["merge"])
    write_json(folder / TRAINING, done)
    return done


def finished_training(folder: Path, ids: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished training of this identity left, if all its files are as it wrote them."""
    try:
        done = json.loads((folder / TRAINING).read_text())
        same = done["identity"] == ids["training"] and done["files"] == _files(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return done if same else None


def looks(done: dict[str, Any], folder: Path) -> dict[int, dict[str, Path]]:
    """The folders of predictions by epoch and split."""
    return {
        epoch: {split: prediction_folder(folder, epoch, split) for split in done["splits"]}
        for epoch in done["looks"]
    }


def _train(loaded: Loaded, ids: dict[str, Any], folder: Path, report: Report) -> dict[str, Any]:
    run, device = loaded.run, next(loaded.model.parameters()).device
    log.info("Training %s on %s", ids["training"][:12], device)
    started = provenance()
    if run.protocol.tf32:
        torch.set_float32_matmul_precision("high")
    trainer = Trainer(
        loaded.method, loaded.model, loaded.task, run.protocol, loaded.seed, folder,
        ids["training"], report, _validator(loaded),
    )  # fmt: skip
    progress = trainer.fit()
    counts = counted(loaded.method, loaded.model)
    _write_adapter(folder, loaded.method.state(loaded.model), ids["training"])
    _write_history(folder, progress.history)
    chosen = [int(row["epoch"]) for row in progress.history if "predicted" in row]
    splits = sorted(p.name for p in prediction_folder(folder, chosen[-1], "test").parent.iterdir())
    return {
        "identity": ids["training"],
        "looks": chosen,
        "splits": splits,
        "parameters": counts | {"with_head": counts["trainable"] + counts["head"]},
        "cost": _cost(progress),
        "files": _files(folder),
        "provenance": started
        | {
            "ended": now(),
            "threads": torch.get_num_threads(),
            "device": device.type,
            "compiled_loops": _compiled_loops(),
        },
    }


def _compiled_loops() -> bool:
    """Whether SNELLA ran as compiled loops; not imported, since most methods do not use them."""
    loops = sys.modules.get("snella.backends.cpu")
    return bool(loops is not None and loops.in_use())


def _files(folder: Path) -> dict[str, str]:
    return {ADAPTER: digest_file(folder / ADAPTER), PREDICTIONS: digest_tree(folder / PREDICTIONS)}


def _validator(loaded: Loaded) -> Callable[[Path], float | None]:
    """Scores validation predictions for the display, where that is cheap."""
    info = loaded.run.task
    if info.expensive_scoring:
        return lambda folder: None
    scorer = info.scorer_class()(loaded.task.data, loaded.task.settings)
    return lambda folder: scorer.score(folder, "val")[info.primary.name].value


def _fold(loaded: Loaded, code: str) -> dict[str, Any]:
    """Fold the update in, say how far the output moved, and count the operations that are left.

    An error in ``merge`` costs no training: it is recorded, and fixed by correcting the file.
    """
    batch, model = _example(loaded), loaded.model.eval()
    with torch.inference_mode():
        before = loaded.task.forward(model, batch)
    merge: dict[str, Any] = {"merged": False, "max_difference": None, "failed": False, "code": code}
    try:
        loaded.method.merge(model)
        with torch.inference_mode():
            after = loaded.task.forward(model, batch)
        merge |= {"merged": True, "max_difference": (after - before).abs().max().item()}
        merge["reason"] = None
    except CannotMerge as error:
        merge["reason"] = str(error)
    except (Exception, SystemExit) as error:
        log.exception("merge failed after complete training")
        merge |= {"failed": True, "reason": one_line(error, Path(loaded.run.method.file))}
    return {"merge": merge, "gflops": _gflops(loaded, batch)}


def _gflops(loaded: Loaded, batch: Batch) -> float | None:
    try:
        return gflops(loaded.model, batch, loaded.task.forward)
    except Exception:
        log.exception("Operations could not be counted")
        return None


def _cost(progress: Progress) -> dict[str, Any]:
    """Costs of training, and of prediction as the model was trained."""
    rows = progress.history
    seconds = sum(row["train_seconds"] for row in rows)
    timed = [row["predict_seconds"] / row["predicted"] for row in rows if "predict_seconds" in row]
    return {
        "peak_memory_mb": progress.peak_memory_mb,
        "train_seconds": seconds,
        "train_seconds_per_image": seconds / sum(row["examples"] for row in rows),
        "inference_seconds_per_image": timed[-1] if timed else None,
    }


def _example(loaded: Loaded) -> Batch:
    """The first training example, as a batch on the model's device."""
    device = next(loaded.model.parameters()).device
    first = next(iter(loaded.task.batches(loaded.run.protocol.train_split, None)))
    return {name: value[:1].to(device) for name, value in first.items()}


def _write_adapter(folder: Path, state: dict[str, Tensor], training: str) -> None:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    with atomic(folder / ADAPTER) as path:
        save_file(tensors, path, metadata={"identity": training})


def _write_history(folder: Path, rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic(folder / "history.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
