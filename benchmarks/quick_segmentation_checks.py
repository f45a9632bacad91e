"""Honest checks of the quick segmentation task: untrained < decoder only < adapted, and
pre-training helps.

With one small loop that shares nothing with the package's trainer, and for every seed, this trains
on the rendered polyps: the mask decoder alone, SNELLA and full fine-tuning from the shipped
weights, and full fine-tuning from random weights; it scores the shipped weights untrained as well.
The learning rate of each way is the best of two or three by mean Dice on the validation split
(first seed); what counts is the mean Dice of the last epoch on the test split. Exit status 1 when
a claim fails.

    python benchmarks/quick_segmentation_checks.py --out benchmarks/results/quick_segmentation.json
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
    "decoder": (3e-4, 1e-3),
    "snella": (1e-3, 3e-3),
    "full": (5e-4, 1e-3),
    "scratch": (5e-4, 1e-3),
}


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
def dice(model: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    """Mean Dice over the images, in per cent."""
    model.eval()
    values = []
    for image, mask in zip(split[0].split(16), split[1].split(16), strict=True):
        found = upsample(mask_logits(model, image), (SIDE, SIDE)) > 0
        both = (found & (mask > 0.5)).sum((1, 2))
        either = found.sum((1, 2)) + mask.sum((1, 2))
        values.append(torch.where(either > 0, 2 * both / either, torch.ones(())))
    return 100 * torch.cat(values).mean().item()


def trained(way: str, rate: float, data: Data, seed: int, options: Options) -> tuple[float, float]:
    """Train one way from the start; Dice on the validation and on the test split."""
    model, method = adapted(way, seed)
    if way != "untrained":
        train(model.train(), method, data, rate, seed, options)
    return dice(model, data["val"]), dice(model, data["test"])


def check(options: Options) -> dict:
    """All ways and seeds: chosen rates, and test Dice per way."""
    data = {split: tensors(drawn) for split, drawn in make("polyps").items()}
    share = data["test"][1].mean((1, 2))
    everywhere = 100 * (2 * share / (1 + share)).mean().item()
    result: dict = {"everywhere": round(everywhere, 2), "rate": {}}
    for way, rates in RATES.items():
        scores: list[float] = []
        for seed in range(options.seeds):
            tried = rates if seed == 0 else (result["rate"][way],)
            pairs = [trained(way, rate, data, seed, options) for rate in tried]
            best = max(range(len(tried)), key=lambda i: pairs[i][0])
            result["rate"][way] = tried[best]
            scores.append(round(pairs[best][1], 2))
            sys.stderr.write(f"{way} seed {seed}: Dice {scores[-1]} ({pairs})\n")
        result[way] = scores
    return result


def verdicts(result: dict) -> dict[str, bool]:
    """What must hold, on means over seeds."""
    mean = {way: float(np.mean(result[way])) for way in RATES}
    return {
        "decoder above untrained": mean["decoder"] > mean["untrained"],
        "decoder above foreground everywhere": mean["decoder"] > result["everywhere"],
        "adapted above decoder": min(mean["snella"], mean["full"]) > mean["decoder"],
        "full below the ceiling": mean["full"] < 95,
        "pre-trained above random": mean["full"] > mean["scratch"],
    }


def main() -> None:
    """Run all checks and write the report; exit status 1 when one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
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
