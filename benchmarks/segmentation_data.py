"""Whether data and scoring keep up with SAM: images of Kvasir-SEG's size at 1024 pixels.

Writes JPEG images with masks, prepares them, and measures per image: decoding and resizing (the
first epoch), the bytes kept in memory (later epochs), and scoring of stored predictions with every
metric. CPU time of one thread, so that other jobs of the machine do not count.

    python benchmarks/segmentation_data.py --out benchmarks/results/segmentation_data_cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from snella.data.prepared import Prepared
from snella.records import provenance
from snella.tasks.base import DatasetSpec
from snella.tasks.segmentation import TASK
from snella.tasks.segmentation.masks import resize_mask
from snella.tasks.segmentation.pixels import ResizedSplit
from snella.tasks.segmentation.predictions import Index, Writer
from snella.tasks.segmentation.score import SegmentationScorer

HEIGHT, WIDTH = 530, 620
SIDE, MAP = 1024, 256


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        milliseconds = measure(Path(folder), options.images)
    report = {
        "image": [HEIGHT, WIDTH],
        "model_size": SIDE,
        "cpu_milliseconds_per_image": milliseconds,
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
    score = timed(lambda: scorer.score(folder / "predictions" / "test", "test"), count)
    return {
        "prepare": prepare,
        "first epoch: decode and resize": first,
        "later epochs: kept bytes": later,
        "store a prediction": store,
        "score a prediction": score,
    }


def timed(work: Callable[[], object], count: int) -> float:
    """CPU milliseconds of ``work`` per item."""
    begin = time.process_time()
    work()
    return round(1000 * (time.process_time() - begin) / count, 2)


def draw(folder: Path, count: int) -> None:
    """Write smooth random images as JPEG, an ellipse in each, and their masks."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 28, 3), dtype=np.uint8))
        image = np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        noise = rng.integers(-12, 13, image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
        top, left = rng.uniform(0.3, 0.7, 2) * (HEIGHT, WIDTH)
        mask = np.hypot((y - top) / 90, (x - left) / 120) < rng.uniform(0.5, 1.3)
        Image.fromarray(image).save(folder / "images" / f"{i:03}.jpg", quality=92)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{i:03}.jpg")


def write(folder: Path, masks: list[np.ndarray]) -> None:
    """Store ``masks`` and maps of them as predictions."""
    with Writer(folder, Index(len(masks), SIDE, MAP, "none")) as writer:
        for mask in masks:
            writer.append(mask, resize_mask(mask, SIDE), resize_mask(mask, MAP) * np.uint8(255))


if __name__ == "__main__":
    main()
