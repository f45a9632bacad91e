"""Whether data and evaluation keep up with SAM.

Writes JPEG images of Kvasir-SEG's size with masks, prepares them, and measures per image, for a SAM
of 1024 pixels: decoding and resizing (the first epoch), the bytes kept in memory (later epochs),
and scoring of stored predictions with every metric. Then the small SAM of the quick suite trains
and predicts images of 1024 pixels: what evaluating 120 of them (predicting, and scoring at their
own size) costs, over an epoch of 120 and of Kvasir-SEG's 880. CPU time of one thread, so that other
jobs of the machine do not count.

    python benchmarks/segmentation_data.py --out benchmarks/results/segmentation_data_cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from snella.data.prepared import Prepared
from snella.methods.step import train_step
from snella.models.sam import load_sam
from snella.quick.pretrain_sam import ARCHITECTURE
from snella.records import provenance
from snella.tasks.base import DatasetSpec
from snella.tasks.segmentation import TASK
from snella.tasks.segmentation.masks import resize_mask
from snella.tasks.segmentation.pixels import ResizedSplit
from snella.tasks.segmentation.predictions import Index, Writer
from snella.tasks.segmentation.score import SegmentationScorer
from snella.tasks.segmentation.task import Segmentation

HEIGHT, WIDTH = 530, 620
SIDE, MAP = 1024, 256
TESTED, TRAINED = 120, 880
ROWS, BATCH = ("linear", "full"), 4
WEIGHTS = Path(__file__).resolve().parents[1] / "workflow" / "resources" / "sam_quick.safetensors"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        milliseconds = measure(Path(folder, "data"), options.images)
        small = measure_small_sam(Path(folder, "small"), options.images)
    report = {
        "image": [HEIGHT, WIDTH],
        "model_size": SIDE,
        "cpu_milliseconds_per_image": milliseconds,
        "images_per_second": {n: round(1000 / ms, 1) for n, ms in milliseconds.items()},
        "small_sam_cpu_milliseconds_per_image": small,
        "evaluation_of_120_images_over_an_epoch": {
            f"{row}, {count} images": round(
                TESTED * (small["predict"] + small["score"]) / (count * small[f"train {row}"]), 3
            )
            for row in ROWS
            for count in (TESTED, TRAINED)
        },
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": provenance()["hardware"]["cpu"],
        "python": platform.python_version(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path, images: int) -> dict[str, float]:
    """CPU milliseconds per image of each part."""
    draw(folder / "raw", images)
    spec = DatasetSpec(kind="image-mask", task="segmentation", path=(folder / "raw").as_posix())
    prepare = timed(lambda: TASK.prepare("polyps", spec, folder / "polyps"), images)
    data = Prepared.open(folder / "polyps")
    source = ResizedSplit(data, "train", SIDE, masks=True)
    order = [[i] for i in range(source.count)]
    first, later = (
        timed(lambda: sum(1 for _ in source.batches(order)), source.count) for _ in range(2)
    )
    scorer = SegmentationScorer(data, TASK.settings(image_size=SIDE))
    count = data.size("test")
    truths = [target[..., 0] > 127 for target in data.targets("test", "mask")]
    store = timed(lambda: write(folder / "predictions" / "test", truths), count)
    scorer.score(folder / "predictions" / "test", "test")  # imports
    score = timed(lambda: scorer.score(folder / "predictions" / "test", "test"), count)
    return {
        "prepare": prepare,
        "first epoch: decode and resize": first,
        "later epochs: kept bytes": later,
        "store a prediction": store,
        "score a prediction": score,
    }


def measure_small_sam(folder: Path, images: int) -> dict[str, float]:
    """CPU milliseconds per image of training, predicting and scoring by the quick suite's SAM."""
    draw(folder / "raw", images, (SIDE, SIDE))
    spec = DatasetSpec(
        kind="image-mask", task="segmentation", path=(folder / "raw").as_posix(),
        options={"test_fraction": 0.5},
    )  # fmt: skip
    TASK.prepare("polyps", spec, folder / "polyps")
    data = Prepared.open(folder / "polyps")
    settings = TASK.settings(image_size=ARCHITECTURE["image_size"])
    task, scorer = Segmentation(data, settings, BATCH), SegmentationScorer(data, settings)
    model = load_sam("sam_vit", ARCHITECTURE, settings.image_size, WEIGHTS.as_posix())
    deque(task.batches("train", 0), maxlen=0)  # decoded once, as in all epochs but the first
    found = {}
    for row in ROWS:
        model.requires_grad_(row == "full")
        model.mask_decoder.requires_grad_(True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model.train()
        found[f"train {row}"] = timed(
            lambda optimizer=optimizer: epoch(task, model, optimizer), data.size("train")
        )
    model.eval()
    place, count = folder / "predictions" / "test", data.size("test")
    found["predict"] = timed(lambda: task.predict(model, "test", place), count)
    scorer.score(place, "test")  # imports
    found["score"] = timed(lambda: scorer.score(place, "test"), count)
    return found


def epoch(task: Segmentation, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """One epoch of training."""
    for batch in task.batches("train", 1):
        train_step(model, optimizer, [batch], task.loss)


def timed(work: Callable[[], object], count: int) -> float:
    """CPU milliseconds of ``work`` per item."""
    begin = time.process_time()
    work()
    return round(1000 * (time.process_time() - begin) / count, 2)


def draw(folder: Path, count: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """Write smooth random images as JPEG, an ellipse in each, and their masks."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 28, 3), dtype=np.uint8))
        image = np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC))
        noise = rng.integers(-12, 13, image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
        top, left = rng.uniform(0.3, 0.7, 2) * size
        mask = np.hypot((y - top) / (size[0] / 6), (x - left) / (size[1] / 5)) < rng.uniform(
            0.5, 1.3
        )
        Image.fromarray(image).save(folder / "images" / f"{i:03}.jpg", quality=92)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{i:03}.jpg")


def write(folder: Path, masks: list[np.ndarray]) -> None:
    """Store ``masks`` and maps of them as predictions."""
    with Writer(folder, Index(len(masks), SIDE, MAP, "none")) as writer:
        for mask in masks:
            writer.append(mask, resize_mask(mask, SIDE), resize_mask(mask, MAP) * np.uint8(255))


if __name__ == "__main__":
    main()
