"""Honest checks of the quick suite: chance < linear probe < fine-tuned, and pre-training helps.

For every task and seed this trains, with one small loop that shares nothing with the package's
trainer: a linear probe on the frozen shipped backbone, full fine-tuning from its weights and full
fine-tuning from random weights, each ten epochs of AdamW on `train800`. The learning rate of each
way is the best of two or three on `val200` (first seed); accuracies are of the last epoch on
`test`. Exit status 1 when a claim fails on a task.

    python benchmarks/quick_suite_checks.py --out benchmarks/results/quick_suite_checks.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from snella.quick.tasks import QUICK, make

Data = dict[str, tuple[torch.Tensor, torch.Tensor]]
Options = argparse.Namespace

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "workflow" / "resources" / "vit_quick.safetensors"
RATES = {"linear": (1e-2, 3e-2, 1e-1), "full": (5e-4, 1e-3), "scratch": (1e-3, 2e-3)}


def tensors(split: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images normalised to mean 0.5, std 0.5 as (N, 3, 32, 32) float32, and labels."""
    images = torch.from_numpy(split[0]).permute(0, 3, 1, 2).float()
    return images / 127.5 - 1, torch.from_numpy(split[1])


def backbone(classes: int, weights: Path | None, seed: int) -> VisionTransformer:
    """The quick backbone with a new head, from its file or from random weights."""
    torch.manual_seed(seed)
    record = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    shape, init = record["architecture"], record["config"]["weight_init"]
    model = VisionTransformer(**shape, num_classes=classes, weight_init=init)
    if weights is not None:
        missing = model.load_state_dict(load_file(weights), strict=False)
        if missing.unexpected_keys or set(missing.missing_keys) != {"head.weight", "head.bias"}:
            raise SystemExit(f"{weights}: does not fit the architecture: {missing}")
    return model


def frozen_features(model: VisionTransformer, data: Data) -> Data:
    """Every split's images replaced by what the frozen backbone hands to its head, (N, 96)."""
    with torch.no_grad():
        return {
            split: (model.forward_head(model.forward_features(images), pre_logits=True), labels)
            for split, (images, labels) in data.items()
        }


def train(
    model: torch.nn.Module, data: Data, rate: float, decay: float, seed: int, options: Options
) -> None:
    """AdamW on every parameter: one epoch of warm-up, then a cosine to zero."""
    inputs, labels = data["train800"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    steps = options.epochs * -(-len(labels) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=1 / options.epochs, cycle_momentum=False
    )
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(options.epochs):
        for batch in torch.randperm(len(labels), generator=shuffle).split(options.batch):
            loss = functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, split: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Top-1 accuracy in per cent."""
    return 100 * (model(split[0]).argmax(1) == split[1]).float().mean().item()


def trained(
    way: str, rate: float, data: Data, classes: int, seed: int, options: Options
) -> tuple[float, float]:
    """Train one way from the start; accuracy on `val200` and on `test`."""
    weights = None if way == "scratch" else options.weights
    model: torch.nn.Module = backbone(classes, weights, seed)
    if way == "linear":
        data, model = frozen_features(model, data), model.head
    train(model, data, rate, 1e-4 if way == "linear" else 0.05, seed, options)
    return accuracy(model, data["val200"]), accuracy(model, data["test"])


def check_task(name: str, options: Options) -> dict:
    """All ways and seeds on one task: chance, chosen rates, and test accuracies per way."""
    data = {split: tensors(value) for split, value in make(name).items()}
    classes = QUICK[name].num_classes
    counts = np.bincount(data["test"][1].numpy(), minlength=classes)
    result: dict = {"chance": 100 * float(counts.max() / counts.sum()), "rate": {}}
    for way, rates in RATES.items():
        scores: list[float] = []
        for seed in range(options.seeds):
            tried = rates if seed == 0 else (result["rate"][way],)
            pairs = [trained(way, rate, data, classes, seed, options) for rate in tried]
            best = max(range(len(tried)), key=lambda i: pairs[i][0])
            result["rate"][way] = tried[best]
            scores.append(round(pairs[best][1], 2))
        result[way] = scores
    return result


def verdicts(result: dict) -> dict[str, bool]:
    """What must hold, on means over seeds."""
    linear, full, scratch = (float(np.mean(result[way])) for way in RATES)
    return {
        "linear above chance": linear > result["chance"],
        "fine-tuned above linear": full > linear,
        "pre-trained above random": full > scratch,
    }


def write_report(task: str, result: dict, seconds: float, options: Options) -> None:
    """Put one task's result into the report; results of another backbone are thrown away."""
    backbone_digest = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
    report: dict = {"backbone": backbone_digest, "tasks": {}}
    if options.out.is_file():
        earlier = json.loads(options.out.read_text(encoding="utf-8"))
        report = earlier if earlier["backbone"] == backbone_digest else report
    report["tasks"][task] = {
        **result,
        "holds": verdicts(result),
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(seconds, 1),
        "seeds": list(range(options.seeds)),
        "epochs": options.epochs,
        "batch": options.batch,
        "rates": RATES,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(QUICK))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, help="JSON report; other tasks' results in it stay")
    options = parser.parse_args()
    say, broken = sys.stdout.write, []
    say(f"{'task':<12} {'chance':>7} {'linear':>13} {'fine-tuned':>13} {'from random':>13}\n")
    for name in options.tasks:
        started = time.perf_counter()
        result = check_task(name, options)
        cells = [f"{np.mean(result[w]):6.1f} ± {np.std(result[w]):4.1f}" for w in RATES]
        failed = [f"NOT {claim}" for claim, holds in verdicts(result).items() if not holds]
        say(f"{name:<12} {result['chance']:7.1f} {' '.join(cells)} {', '.join(failed)}\n")
        sys.stdout.flush()
        broken += [name] if failed else []
        if options.out:
            write_report(name, result, time.perf_counter() - started, options)
    if broken:
        raise SystemExit(f"the checks fail on: {', '.join(broken)}")


if __name__ == "__main__":
    main()
