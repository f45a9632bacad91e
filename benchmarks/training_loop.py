"""The training loop of ``snella run`` over a plain PyTorch loop of the same step.

    python benchmarks/training_loop.py --device cuda
    python benchmarks/training_loop.py --arch test_vit --pixels 160  # tries it

ViT-B/16 with random weights at 224 pixels on images of CIFAR's shape, in bfloat16. The plain loop
is what one would write by hand for speed: pixels and labels on the device, normalised there, the
same adapted model, hooks and optimizer, and no files. The two take turns, an epoch each; medians
without the first epoch. ``waits_per_epoch`` counts how often the host waited for the device within
the steps of an epoch, and ``repeats_exactly`` says whether a second training with the same seed
gave the same adapter to the bit. Last, rows of the quick suite run as `snella run` runs them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import facts
from step_table import show
from step_time import noted, wait, write
from torch.nn import functional as F

from snella.data.placement import resident_bytes
from snella.data.transforms import eval_transform, load_split, normalise
from snella.runs.precision import autocast
from snella.runs.run import Run
from snella.runs.train import Loaded, load_run
from snella.runs.trainer import Trainer
from snella.suite import config as configuration
from snella.suite import plan
from snella.tasks.classification.prepare import write_labelled

ROWS = ("full", "lora-8", "snella-8")
CLASSES = 100


def cifar_shaped(folder: Path, count: int) -> Path:
    """A prepared data set of noise: ``count`` training images, 32 to test."""
    rng = np.random.default_rng(0)
    splits = {
        split: (rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % CLASSES)
        for split, n in (("train", count), ("test", 32))
    }
    place = folder / "prepared" / "cifar-shaped"
    write_labelled(place, splits, {"source": "noise", "num_classes": CLASSES})
    return place


def run_of(row: str, prepared: Path, folder: Path, options: argparse.Namespace) -> Run:
    """A row of config/methods.yaml on such data."""
    file, hyperparameters = plan.find_method(configuration.load(), row)
    return Run.model_validate(
        {
            "suite": "benchmark",
            "backbone": {"name": "random", "arch": options.arch, "file": "random"},
            "dataset": {
                "name": "cifar-shaped", "task": "classification", "prepared": prepared.as_posix(),
            },
            "method": {
                "name": row, "file": file.as_posix(), "hyperparameters": hyperparameters,
            },
            "protocol_name": "benchmark",
            "protocol": {
                "epochs": options.epochs, "warmup_epochs": 1, "batch_size": options.batch,
                "evaluate_every": 1000, "checkpoint_every": 1000, "precision": options.precision,
                "tf32": True, "lr": 1e-4, "threads": options.threads,
            },
            "settings": {"image_size": options.pixels},
            "results": folder.as_posix(),
        }
    )  # fmt: skip


class Plain:
    """The same step in a loop that does nothing else."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.epochs_done = loaded, 0
        self.device = next(loaded.model.parameters()).device
        data, settings = loaded.task.data, loaded.task.settings
        images = load_split(data.images("trainval"), eval_transform(settings))
        self.images = images.to(self.device)
        self.labels = torch.from_numpy(data.labels("trainval")).to(self.device)
        protocol, method = loaded.run.protocol, loaded.method
        method.steps_per_epoch = -(-len(images) // protocol.batch_size)
        groups = method.parameter_groups(loaded.model, protocol.lr, protocol.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=protocol.lr, fused=True)

    def epoch(self) -> float:
        """Train an epoch; seconds."""
        method, model, run = self.loaded.method, self.loaded.model, self.loaded.run
        wait(self.device.type)
        begin = time.perf_counter()
        model.train()
        method.on_epoch_start(model, self.epochs_done, run.protocol.epochs)
        losses = []
        order = torch.randperm(len(self.images), device=self.device)
        for index in order.split(run.protocol.batch_size):
            pixels = normalise(self.images[index], self.loaded.task.settings)
            with autocast(run.protocol.precision, self.device):
                loss = F.cross_entropy(model(pixels).float(), self.labels[index])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            method.on_step_end(model)
            losses.append(loss.detach())
        torch.stack(losses).cpu()
        self.epochs_done += 1
        return time.perf_counter() - begin


def compare(row: str, prepared: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Images per second of both loops, and what else is to be known of ours."""
    run = run_of(row, prepared, folder / row, options)
    plain = Plain(load_run(run))
    seconds: dict[str, list[float]] = {"loop": [], "plain": []}

    def report(shown: dict[str, float], epochs: int) -> None:
        seconds["loop"].append(shown["train_seconds"])
        seconds["plain"].append(plain.epoch())

    trainer = trainer_of(load_run(run), folder / row, report)
    with counted(trainer) as waits:
        progress = trainer.fit()
    count = len(plain.images)
    images = {side: count / statistics.median(found[1:]) for side, found in seconds.items()}
    figures = {
        "images_per_second": images["loop"],
        "plain_images_per_second": images["plain"],
        "over_plain": round(images["loop"] / images["plain"], 3),
        "peak_memory_mb": progress.peak_memory_mb,
        "pixels_on_device": resident_bytes() > 0,
        "epoch_seconds": seconds,
    }
    if options.device == "cuda":
        figures["waits_per_epoch"] = max(waits[1:])
    state = {name: value.clone() for name, value in trainer.method.state(trainer.model).items()}
    again = trainer_of(load_run(run), folder / f"{row} again")
    again.fit()
    other = again.method.state(again.model)
    figures["repeats_exactly"] = all(torch.equal(state[name], other[name]) for name in state)
    return figures


def trainer_of(
    loaded: Loaded, folder: Path, report: Callable[..., None] = lambda row, epochs: None
) -> Trainer:
    folder.mkdir(parents=True)
    protocol, seed = loaded.run.protocol, loaded.seed
    return Trainer(
        loaded.method, loaded.model, loaded.task, protocol, seed, folder, "benchmark", report
    )


@contextmanager
def counted(trainer: Trainer) -> Iterator[list[int]]:
    """How often the host waits for the device in the steps of each epoch."""
    waits: list[int] = []
    steps = trainer._steps

    def watched(*arguments: Any) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                steps(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in told))

    if trainer.device.type == "cuda":
        trainer._steps = watched  # type: ignore[method-assign]
    yield waits


def quick(row: str, folder: Path) -> dict[str, Any]:
    """A run of the quick suite's digits, as `snella run` does it."""
    from snella.jobs.prepare import prepare_dataset
    from snella.runs.execute import execute

    config = configuration.load(
        overrides={"results": f"{folder}/results", "data": f"{folder}/data"}
    )
    prepare_dataset(config, "digits", missing_only=True)
    record = execute(plan.resolve(config, row, "digits", 0))
    kept = ("status", "reason", "metrics", "cost")
    protocol = {name: record["protocol"][name] for name in ("precision", "tf32")}
    device = record["provenance"].get("device")
    return {name: record.get(name) for name in kept} | {"protocol": protocol, "device": device}


def measure(
    options: argparse.Namespace,
    figures: dict[str, Any],
    save: Callable[[], None] = lambda: None,
) -> None:
    """All rows into ``figures``, one by one; what fails is noted there."""
    title = f"{options.arch}, {options.pixels} px, batch {options.batch}, {options.precision}"
    figures |= {"title": title, "failed": {}, "rows": {}, "quick": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = cifar_shaped(folder, options.images)
        for row in options.rows:
            with noted(figures, row):
                figures["rows"][row] = compare(row, prepared, folder, options)
            save()
        for row in options.quick:
            with noted(figures, f"quick suite, {row}"):
                figures["quick"][row] = quick(row, folder)
            save()


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--arch", default="vit_base_patch16_224")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--images", type=int, default=768, help="of an epoch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--quick", nargs="*", default=["lora-8", "snella-8"])
    parser.add_argument("--threads", type=int, default=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = facts("training_loop.py", options.device) | {"rank": 8, "models": {}, "loop": {}}
    measure(options, found["loop"], lambda: write(found, options.output))
    show(found)


if __name__ == "__main__":
    main()
