"""Images per second from disk to normalised batches, over `ImageFolder` and `DataLoader`.

    python benchmarks/data.py --output benchmarks/results/data_cpu.json

The same JPEG files, transforms, batch and number of worker processes on both sides; epochs of the
two take turns, so that a machine that gets slower gets slower for both. Two paths: "fixed" resizes
to a square (VTAB-1k), "augmented" crops, flips and jitters (FGVC). Every epoch counts, the first
too, which opens the data, starts workers and, in a data set's very first run, decodes and resizes
what all later epochs and runs read. `run` is that first run with as many epochs as the published
codes train, from the measured first epoch and the median of the others; `later_run` is any other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import facts
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from snella.data.pixels import PixelSettings
from snella.data.placement import resident
from snella.data.prepared import Prepared
from snella.data.readers import read_images
from snella.data.resized import kept_folder, open_images
from snella.data.transforms import (
    NORMALISATIONS,
    batches,
    eval_transform,
    train_transform,
)
from snella.tasks.classification.prepare import write_labelled

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as snella's command line does
BATCH, SIZE = 64, 224
PATHS = {
    "fixed": PixelSettings(image_size=SIZE, resize="square"),
    "augmented": PixelSettings(image_size=SIZE, augmentation="timm"),
}
Epoch = Callable[[int], int]
"""Runs through the training images once, given the epoch's number; returns how many they were."""


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        write_images(root / "raw", options.images)
        data = prepared(root)
        figures = {name: measure(name, root, data, options) for name in PATHS}
    for name, found in figures.items():
        sys.stdout.write(
            f"{name}: {found['run']:.1f} x in a first run of {options.run_epochs} epochs, "
            f"{found['later_run']:.1f} x later; epoch by epoch {found['ratios']}\n"
        )
    if options.output:
        content = facts("data.py", "cpu") | {"options": vars(options), "over": figures}
        text = json.dumps(content, indent=2, default=str)
        options.output.write_text(text + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1000, help="training images (VTAB-1k: 1000)")
    parser.add_argument("--epochs", type=int, default=4, help="measured epochs per side")
    parser.add_argument("--run-epochs", type=int, default=100, help="epochs of a whole run")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode, per side")
    parser.add_argument("--folder", type=Path, help="where to write images (default: /tmp)")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def write_images(root: Path, count: int) -> None:
    """Class folders of JPEG files as large as photographs of VTAB-1k's natural sets."""
    rng = np.random.default_rng(0)
    for role, number in (("train", count), ("test", 10)):
        for i in range(number):
            folder = root / role / f"class{i % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
            width = int(rng.integers(400, 500))
            picture = Image.fromarray(coarse).resize((width, 375), Image.Resampling.BICUBIC)
            noise = rng.normal(0, 6, (375, width, 3))
            pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:05}.jpg", quality=90)


def prepared(root: Path) -> Prepared:
    splits, info = read_images(root / "raw", "photographs")
    pairs = {role: (part["image"], part["label"]) for role, part in splits.items()}
    write_labelled(root / "photographs", pairs, info)
    return Prepared.open(root / "photographs")


def measure(name: str, root: Path, data: Prepared, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each epoch of both sides in turns, and their ratios."""
    shutil.rmtree(kept_folder(data.folder), ignore_errors=True)
    settings = PATHS[name]
    theirs, first, later = (
        theirs_of(settings, root / "raw/train", options.workers),
        ours_of(settings, data, options.workers),
        ours_of(settings, data, options.workers),
    )
    seconds: dict[str, list[float]] = {"theirs": [], "first_run": [], "later_run": []}
    sides = {"theirs": theirs, "first_run": first, "later_run": later}
    for number in range(options.epochs):
        for side, epoch in sides.items():
            begin = time.perf_counter()
            assert epoch(number) == options.images
            seconds[side].append(time.perf_counter() - begin)
    whole = {side: run_seconds(found, options.run_epochs) for side, found in seconds.items()}
    return {
        "seconds": {side: [round(s, 4) for s in found] for side, found in seconds.items()},
        "ratios": [
            round(a / b, 2) for a, b in zip(seconds["theirs"], seconds["first_run"], strict=True)
        ],
        "run": round(whole["theirs"] / whole["first_run"], 2),
        "later_run": round(whole["theirs"] / whole["later_run"], 2),
    }


def run_seconds(epochs: list[float], count: int) -> float:
    """A run of ``count`` epochs: the first as measured, the others by their median."""
    return epochs[0] + (count - 1) * statistics.median(epochs[1:])


def theirs_of(settings: PixelSettings, folder: Path, workers: int) -> Epoch:
    mean, std = NORMALISATIONS[settings.normalisation]
    bicubic = v2.InterpolationMode.BICUBIC
    if settings.augmentation == "none":
        steps: list[Any] = [v2.Resize([SIZE, SIZE], bicubic)]
    else:
        steps = [
            v2.RandomResizedCrop(SIZE, scale=(0.08, 1.0), interpolation=bicubic),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4),
        ]
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    loader: list[Any] = []

    def epoch(number: int) -> int:
        if not loader:
            found = datasets.ImageFolder(str(folder), v2.Compose(steps))
            loader.append(DataLoader(found, BATCH, shuffle=True, num_workers=workers))
        return seen(images for images, _ in loader[0])

    return epoch


def ours_of(settings: PixelSettings, data: Prepared, workers: int) -> Epoch:
    opened: list[Any] = []

    def epoch(number: int) -> int:
        if not opened:
            make = eval_transform if settings.augmentation == "none" else train_transform
            images = open_images(data, "train", make(settings, jpeg=data.jpeg))
            opened.append(resident(images) if isinstance(images, torch.Tensor) else images)
        labels = data.labels("train")
        found = batches(opened[0], labels, BATCH, number, workers=workers, settings=settings)
        return seen(batch["image"] for batch in found)

    return epoch


def seen(images: Iterator[torch.Tensor]) -> int:
    return sum(len(batch) for batch in images)


if __name__ == "__main__":
    main()
