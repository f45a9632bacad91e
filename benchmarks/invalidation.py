"""What it costs that a changed parameter is always seen: ViT-B/16 on a CPU, in processor time.

In evaluation the kept matrix W + S is compared with what it was made of: "check" is that of all
layers, "evaluation" the whole forward, "merged" that of a plain backbone. In training thresholds
are found once per forward, which the step needs anyway; only further micro-batches of a step find
again what has not changed: "finding", with the merging that every forward needs, is put over a
whole training "step". The rows take turns.

    python benchmarks/invalidation.py --output benchmarks/results/invalidation_cpu.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from facts import facts
from peft import get_peft_model
from rich.console import Console
from torch import nn

from snella import SnellaConfig
from snella.backends.dispatch import effective_weight
from snella.tuner import SnellaLayer


def processor_time(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


@torch.no_grad()
def find(layers: list[SnellaLayer]) -> None:
    """Merge and select in every layer, as a forward does before its product."""
    for layer in layers:
        effective_weight(layer._update("default"), None, *layer._tensors("default"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = torch.randn(options.batch, 3, 224, 224)
    backbone = timm.create_model("vit_base_patch16_224", num_classes=10)
    model = get_peft_model(copy.deepcopy(backbone), SnellaConfig(rank=8, initial_sparsity=0.7))
    model.on_epoch_start(0, 2)
    layers = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    @torch.no_grad()
    def evaluate(chosen: nn.Module) -> None:
        chosen.eval()(images)

    @torch.no_grad()
    def check() -> None:
        model.eval()
        for layer in layers:
            layer._fold(["default"])

    def step() -> None:
        optimizer.zero_grad()
        model.train()(images).square().mean().backward()
        optimizer.step()
        model.on_step_end()

    rows: dict[str, Callable[[], None]] = {
        "evaluation": lambda: evaluate(model),
        "check": check,
        "merged": lambda: evaluate(backbone),
    }
    training: dict[str, Callable[[], None]] = {"finding": lambda: find(layers), "step": step}
    found: dict[str, list[float]] = {name: [] for name in rows | training}
    for part in (rows, training):
        for number in range(options.rounds + 1):
            for name, action in reversed(part.items()) if number % 2 else part.items():
                seconds = processor_time(action)
                found[name] += [seconds] if number else []  # the first round warms up
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = {
        "check, of an evaluation": medians["check"] / medians["evaluation"],
        "evaluation over the merged model": medians["evaluation"] / medians["merged"],
        "merging and finding, of a training step": medians["finding"] / medians["step"],
    }
    console = Console()
    for name, value in (medians | ratios).items():
        console.print(f"{name:36s} {value:.4f}")
    if options.output:
        record = facts("invalidation.py", "cpu") | {
            "batch": options.batch, "seconds": found, "medians": medians, "ratios": ratios,
        }  # fmt: skip
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
