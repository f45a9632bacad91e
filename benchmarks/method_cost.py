"""Training, inference and memory of configured rows, as ratios to a reference row.

    python benchmarks/method_cost.py --methods sparse-tuning-0.7 ssf --reference lora-8

All rows run in one process on the same random images and take turns, so that a machine that gets
slower gets slower for all; ratios are those of the medians. Memory is what a training step adds
to the model: tensors kept for backward, gradients, optimizer state.

Inference of a row is after merging where the method can be merged, and is given over both forms
of the reference: merged, where LoRA costs what the plain backbone costs (the strictest
comparison, and what Sparse-Tuning's GFLOPs are set against), and unmerged, as the reference runs
during training.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from facts import facts
from measuring import (
    CLOCKS,
    MIB,
    Setup,
    Training,
    configured_method,
    configured_row,
    interleaved,
    medians,
)
from rich.console import Console
from rich.table import Table
from torch import nn

from snella.errors import CannotMerge
from snella.method import Method

UNMERGED = "reference, unmerged"


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    figures = measure(options)
    show(figures, options)
    if options.output:
        write(figures, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", required=True, help="rows of config/methods.yaml")
    parser.add_argument("--reference", default="lora-8")
    parser.add_argument("--arch", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu, with one thread, on a busy machine"
    )
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Per row: seconds, bytes, and their ratios to the reference."""
    setup = Setup(arch=options.arch, batch=options.batch, device=options.device)
    names = list(dict.fromkeys([options.reference, *options.methods]))
    methods = {name: configured_method(name) for name in names}
    rows = {name: configured_row(method, setup) for name, method in methods.items()}
    steps = {name: row.step for name, row in rows.items()}
    training = interleaved(steps, options.repeats, setup, options.clock)
    memory = {name: row.memory() for name, row in rows.items()}
    unmerged = copy.deepcopy(rows[options.reference].model).eval()
    merged = {name: merge(methods[name], rows[name]) for name in names}
    models = {name: rows[name].model for name in names} | {UNMERGED: unmerged}
    image = setup.data()["image"]
    calls = {name: lambda model=model: model(image) for name, model in models.items()}
    inference = interleaved(calls, options.repeats, setup, options.clock, inference=True)
    figures: dict[str, dict[str, Any]] = {}
    for name in names:
        figures[name] = {
            "training_seconds": medians(training)[name],
            "inference_seconds": medians(inference)[name],
            "memory_bytes": memory[name],
            "merged": merged[name],
            "training_samples": training[name],
            "inference_samples": inference[name],
        }
    add_ratios(figures, options.reference, medians(inference)[UNMERGED])
    return figures


def add_ratios(figures: dict[str, dict[str, Any]], reference: str, unmerged: float) -> None:
    base = figures[reference]
    for row in figures.values():
        total = sum(row["memory_bytes"].values()) / sum(base["memory_bytes"].values())
        row["ratios"] = {
            "training": row["training_seconds"] / base["training_seconds"],
            "inference": row["inference_seconds"] / base["inference_seconds"],
            "inference_over_unmerged": row["inference_seconds"] / unmerged,
            "memory": total,
        }


def merge(method: Method, row: Training) -> bool:
    """Bring the row's model into the form it is used in; whether that is a merged one."""
    model: nn.Module = row.model.eval()
    try:
        method.merge(model)
    except CannotMerge:
        return False
    return True


def show(figures: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    title = f"{options.arch}, batch {options.batch}, {options.device}: over {options.reference}"
    columns = ("Method", "Training", "Inference", "over unmerged", "Memory", "MiB", "Merged")
    table = Table(*columns, title=title)
    for name, row in figures.items():
        ratios = [f"{value:.2f}" for value in row["ratios"].values()]
        mib = sum(row["memory_bytes"].values()) / MIB
        table.add_row(name, *ratios, f"{mib:.0f}", "yes" if row["merged"] else "no")
    Console().print(table)


def write(figures: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    names = ("reference", "arch", "batch", "repeats", "clock", "device")
    settings = {name: getattr(options, name) for name in names}
    content = facts("method_cost.py", options.device) | {"settings": settings, "rows": figures}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
