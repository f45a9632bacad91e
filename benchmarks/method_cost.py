"""Training step, inference and memory of configured rows, as ratios to a reference row.

    python benchmarks/method_cost.py --methods sparse-tuning-0.7 ssf --reference lora-8

All rows run in one process on the same random images, interleaved, so that a machine that gets
slower gets slower for all; medians are reported. Memory is what autograd keeps for backward,
counted tensor by tensor, plus gradients and optimizer state. Inference is after merging where
the method can be merged.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from snella import config as configuration
from snella import plan
from snella.errors import CannotMerge
from snella.method import build_method, head, prepare_model, trainable

MIB = 2**20


class Row:
    """One method on one backbone, ready to step."""

    def __init__(
        self, name: str, config: configuration.Config, options: argparse.Namespace
    ) -> None:
        entry = config.methods[name]
        path = Path(plan.method_path(config, entry.file or name))
        self.name, self.method = name, build_method(path, entry.hyperparameters)
        torch.manual_seed(0)
        self.model = timm.create_model(options.arch, num_classes=100).to(options.device)
        prepare_model(self.method, self.model)
        torch.nn.init.trunc_normal_(head(self.model).weight, std=0.02)
        data = torch.randn(options.batch, 3, 224, 224, device=options.device)
        label = torch.randint(100, (options.batch,), device=options.device)
        self.batch = {"image": data, "label": label}
        self.method.calibrate(self.model, [self.batch], self.loss)
        self.optimizer = torch.optim.AdamW(self.method.parameter_groups(self.model, 1e-4, 1e-4))
        self.method.on_epoch_start(self.model, 0, 10)

    @staticmethod
    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"])

    def step(self) -> None:
        self.model.train()
        loss = self.loss(self.model, self.batch)
        extra = self.method.auxiliary_loss(self.model, self.batch, self.loss)
        self.optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        self.optimizer.step()
        self.method.on_step_end(self.model)

    @torch.inference_mode()
    def infer(self) -> None:
        self.model(self.batch["image"])

    def kept_mib(self) -> float:
        """Memory that one training step adds to the weights, in MiB."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(self.model, self.batch)
        trained = sum(p.numel() * p.element_size() for p in trainable(self.model).values())
        del loss
        return (sum(kept.values()) + 3 * trained) / MIB

    def merge(self) -> bool:
        self.model.eval()
        try:
            self.method.merge(self.model)
        except CannotMerge:
            return False
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--reference", default="lora-8")
    parser.add_argument("--arch", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = configuration.load()
    names = list(dict.fromkeys([options.reference, *options.methods]))
    rows = [Row(name, config, options) for name in names]
    memory = {row.name: row.kept_mib() for row in rows}
    training = interleaved(rows, Row.step, options)
    merged = {row.name: row.merge() for row in rows}
    inference = interleaved(rows, Row.infer, options)
    figures = {
        row.name: {
            "training": training[row.name] / training[options.reference],
            "inference": inference[row.name] / inference[options.reference],
            "memory": memory[row.name] / memory[options.reference],
            "memory_mib": memory[row.name],
            "merged": merged[row.name],
        }
        for row in rows
    }
    show(figures, options)
    if options.json:
        write(figures, options)


def interleaved(rows: list[Row], what: Any, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds per call, the rows taking turns; the first round warms up."""
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(options.repeats + 1):
        for row in rows:
            begin = time.perf_counter()
            what(row)
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[row.name].append(time.perf_counter() - begin)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def show(figures: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    title = (
        f"{options.arch}, batch {options.batch}, {options.device}: ratios to {options.reference}"
    )
    table = Table("Method", "Training", "Inference", "Memory", "Merged", title=title)
    for name, row in figures.items():
        ratios = [f"{row[key]:.2f}" for key in ("training", "inference", "memory")]
        table.add_row(name, *ratios, "yes" if row["merged"] else "no")
    Console().print(table)


def write(figures: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    about = {key: str(value) for key, value in vars(options).items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    date = datetime.now(UTC).date().isoformat()
    content = {"date": date, "options": about, "versions": versions, "ratios": figures}
    options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
