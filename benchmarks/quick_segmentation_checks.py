"""Honest checks of the quick segmentation task: untrained < decoder only < adapted, and
pre-training helps.

With one small loop that shares nothing with the package's trainer, and for every seed, this trains
on the rendered polyps: the mask decoder alone, SNELLA and full fine-tuning from the shipped
weights, and full fine-tuning from random weights; it scores the shipped weights untrained as well.
The learning rate of each way is the best of two by mean Dice on the validation split (first seed),
and every model's threshold, also that of the untrained one, is the best on the validation split;
what counts is the mean Dice of the last epoch on the test split. Dice at 0.5 stands beside it. Exit
status 1 when a claim fails.

    python benchmarks/quick_segmentation_checks.py --out benchmarks/results/quick_segmentation.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from snella.method import Method, load_method, trainable
from snella.models.sam import (
    build_sam,
    load_sam,
    mask_logits,
    mask_loss,
    pixel_statistics,
    upsample,
)
from snella.quick.pretrain_sam import ARCHITECTURE
from snella.quick.segmentation import make

Data = dict[str, tuple[Tensor, Tensor]]
Options = argparse.Namespace

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "workflow" / "resources" / "sam_quick.safetensors"
SIDE = ARCHITECTURE["image_size"]
RATES = {
    "untrained": (1.0,),
    "decoder": (1e-3, 3e-3),
    "snella": (1e-2, 2e-2),
    "full": (1e-3, 2e-3),
    "scratch": (1e-3, 2e-3),
}
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
CLEARLY = 5.0
"""Points of Dice by which the decoder alone must stay below full fine-tuning."""


def tensors(split: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, 96, 96) and masks (N, 96, 96), float32."""
    mean, std = pixel_statistics("cpu")
    images = torch.from_numpy(split["image"]).permute(0, 3, 1, 2).float() / 255
    return (images - mean) / std, torch.from_numpy(split["mask"]).float()


def adapted(way: str, seed: int) -> tuple[nn.Module, Method | None]:
    """The model of one way with what trains marked, and the method whose hooks it needs."""
    torch.manual_seed(seed)
    if way == "scratch":
        model = build_sam("sam_vit", ARCHITECTURE)
    else:
        model = load_sam("sam_vit", ARCHITECTURE, SIDE, WEIGHTS.as_posix())
    model.requires_grad_(False)
    method = None
    if way == "snella":
        method = load_method(ROOT / "baselines" / "snella.py")(rank=8)
        method.adapt(model)
    model.mask_decoder.requires_grad_(True)
    if way in ("full", "scratch"):
        model.image_encoder.requires_grad_(True)
    return model, method


def train(
    model: nn.Module, method: Method | None, data: Data, rate: float, seed: int, options: Options
) -> None:
    """AdamW with one epoch of warm-up, then a cosine to zero; half of the images mirrored."""
    images, masks = data["train"]
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=rate, weight_decay=1e-4)
    steps = options.epochs * -(-len(images) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=1 / options.epochs, cycle_momentum=False
    )
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(options.epochs):
        if method is not None:
            method.on_epoch_start(model, epoch, options.epochs)
        for batch in torch.randperm(len(images), generator=shuffle).split(options.batch):
            image, mask = images[batch], masks[batch]
            flip = torch.rand(len(batch), generator=shuffle) < 0.5
            image[flip], mask[flip] = image[flip].flip(-1), mask[flip].flip(-1)
            loss = mask_loss(upsample(mask_logits(model, image), (SIDE, SIDE)), mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if method is not None:
                method.on_step_end(model)
            schedule.step()


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """Foreground probability (N, 96, 96) of every pixel."""
    model.eval()
    found = [upsample(mask_logits(model, part), (SIDE, SIDE)) for part in images.split(16)]
    return torch.cat(found).sigmoid()


def dice(level: Tensor, masks: Tensor, threshold: float) -> float:
    """Mean Dice over the images, in per cent."""
    found = level > threshold
    both = (found & (masks > 0.5)).sum((1, 2))
    either = found.sum((1, 2)) + masks.sum((1, 2))
    return 100 * torch.where(either > 0, 2 * both / either, torch.ones(())).mean().item()


@dataclass(frozen=True)
class Trained:
    """Mean Dice of one trained model."""

    val: float
    test: float
    test_at_half: float
    threshold: float


def trained(way: str, rate: float, data: Data, seed: int, options: Options) -> Trained:
    """Train one way from the start; Dice at the threshold that is best on the validation split."""
    model, method = adapted(way, seed)
    if way != "untrained":
        train(model.train(), method, data, rate, seed, options)
    val, test = (probabilities(model, data[split][0]) for split in ("val", "test"))
    scores = {t: dice(val, data["val"][1], t) for t in THRESHOLDS}
    best = max(THRESHOLDS, key=lambda t: (scores[t], -abs(t - 0.5)))
    masks = data["test"][1]
    return Trained(scores[best], dice(test, masks, best), dice(test, masks, 0.5), best)


def check(options: Options) -> dict:
    """All ways and seeds: chosen rates, and test Dice per way."""
    data = {split: tensors(drawn) for split, drawn in make("polyps").items()}
    share = data["test"][1].mean((1, 2))
    everywhere = 100 * (2 * share / (1 + share)).mean().item()
    result: dict = {"everywhere": round(everywhere, 2), "rate": {}, "at_half": {}, "threshold": {}}
    for way, rates in RATES.items():
        runs: list[Trained] = []
        for seed in range(1 if way == "untrained" else options.seeds):
            tried = rates if seed == 0 else (result["rate"][way],)
            found = [trained(way, rate, data, seed, options) for rate in tried]
            best = max(range(len(tried)), key=lambda i: found[i].val)
            result["rate"][way] = tried[best]
            runs.append(found[best])
            sys.stderr.write(
                f"{way} seed {seed}: {runs[-1]} (of {dict(zip(tried, found, strict=True))})\n"
            )
        result[way] = [round(run.test, 2) for run in runs]
        result["at_half"][way] = [round(run.test_at_half, 2) for run in runs]
        result["threshold"][way] = [run.threshold for run in runs]
    return result


def verdicts(result: dict) -> dict[str, bool]:
    """What must hold, on means over seeds."""
    mean = {way: float(np.mean(result[way])) for way in RATES}
    return {
        "decoder above untrained": mean["decoder"] > mean["untrained"],
        "decoder above foreground everywhere": mean["decoder"] > result["everywhere"],
        "adapted above decoder": min(mean["snella"], mean["full"]) > mean["decoder"],
        "full clearly above decoder": mean["full"] > mean["decoder"] + CLEARLY,
        "full below the ceiling": mean["full"] < 95,
        "pre-trained above random": mean["full"] > mean["scratch"],
    }


def main() -> None:
    """Run all checks and write the report; exit status 1 when one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    result = check(options)
    holds = verdicts(result)
    record = WEIGHTS.with_suffix(".json")
    report = {
        **result,
        "holds": holds,
        "backbone": json.loads(record.read_text(encoding="utf-8"))["sha256"],
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - begin, 1),
        "seeds": list(range(options.seeds)),
        "epochs": options.epochs,
        "batch": options.batch,
        "rates": RATES,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(holds.values()) else 1)


if __name__ == "__main__":
    main()
