"""What the recipes of quick generation's SD3 and CLIP share: data, steps, and the record."""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snella.files import write_text
from snella.methods.base import Batch, LossFn
from snella.methods.step import train_step
from snella.quick import generation_models as models
from snella.quick import generation_scenes as scenes


def world(n: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 3, 32, 32) and caption tokens int64 (n, CONTEXT) on ``device``."""
    rng = np.random.default_rng(seed)
    images, texts = [], []
    for start in range(0, n, 4096):
        drawn = scenes.draw_scenes(rng, min(4096, n - start))
        images.append(scenes.paint(drawn, device, seed * 100_003 + start))
        texts += scenes.captions(rng, drawn)
    return torch.cat(images), models.token_ids(texts).to(device)


def schedule(recipe: Any, step: int, seconds: float) -> float | None:
    """The learning rate at ``step``: linear warm-up, then a cosine; None at the end."""
    progress = step / recipe.steps
    if recipe.max_seconds:
        progress = max(progress, seconds / recipe.max_seconds)
    if progress >= 1:
        return None
    warm = min(1.0, (step + 1) / recipe.warmup)
    return float(recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * progress)))


def half_precision(device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast on CUDA, nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def train(
    recipe: Any,
    model: nn.Module,
    draw: Callable[[], Batch],
    loss: LossFn,
    device: torch.device,
    after_backward: Callable[[], object] = lambda: None,
) -> Iterator[tuple[int, Tensor]]:
    """Train by the recipe; yields the number of each step done, from 1, and its loss."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=recipe.lr,
        weight_decay=recipe.weight_decay, betas=(0.9, 0.98), fused=device.type == "cuda",
    )  # fmt: skip
    begin, step = time.perf_counter(), 0
    while (lr := schedule(recipe, step, time.perf_counter() - begin)) is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        value = train_step(
            model, optimizer, [draw()], loss, clip_grad=1.0, after_backward=after_backward
        )
        step += 1
        yield step, value
        if step % 50 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # so that the clock is right


def write_record(
    out: Path,
    recipe: Any,
    history: list[dict[str, float]],
    parameters: int,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """Write what made the weights into ``out``/recipe.json."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    record = {
        "data": "rendered scenes (snella.quick.generation_scenes); no photograph, no quick subject",
        "recipe": asdict(recipe),
        "parameters": parameters,
        "history": history,
        "seconds": round(seconds, 1),
        "device": name,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_text(out / "recipe.json", json.dumps(record, indent=1) + "\n")
    return record


def arguments(recipe: type, doc: str, argv: list[str] | None) -> tuple[Any, Path, torch.device]:
    """Command line of a recipe: one option per field; the defaults made the shipped weights."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    for name, value in asdict(recipe()).items():
        kind = float if value is None else type(value)
        parser.add_argument(f"--{name}", type=kind, default=value)
    chosen = vars(parser.parse_args(argv))
    out, device = chosen.pop("out"), torch.device(chosen.pop("device"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return recipe(**chosen), out, device
