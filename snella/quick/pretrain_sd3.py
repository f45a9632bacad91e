"""Pre-train quick generation's text-to-image model on captioned rendered scenes.

Transformer and text encoders are trained together by the rectified-flow objective of
:mod:`snella.equations.flow`; one caption in ten is empty, for classifier-free guidance. The
weights written are an exponential moving average.

    python -m snella.quick.pretrain_sd3 --out workflow/resources/sd3_quick
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snella.equations.flow import draw_positions, flow_loss, interpolate
from snella.quick import generation_models as models
from snella.quick import generation_scenes as scenes

log = logging.getLogger(__name__)
EVERY = 100
"""Steps between two lines of the history."""


@dataclass(frozen=True)
class Recipe:
    """Everything that moves the weights."""

    scenes: int = 200_000
    steps: int = 6000
    batch_size: int = 768
    lr: float = 1.5e-3
    warmup: int = 300
    weight_decay: float = 0.02
    ema: float = 0.999
    empty_captions: float = 0.1
    seed: int = 0
    max_seconds: float | None = None
    """The learning rate's cosine ends at ``steps`` or after this time, whatever comes first."""


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


def steps(
    recipe: Any, parameters: Sequence[Tensor], device: torch.device
) -> Iterator[tuple[int, torch.optim.Optimizer, Any]]:
    """Training steps with the learning rate set; the optimizer steps between two of them."""
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )  # fmt: skip
    begin, step = time.perf_counter(), 0
    while True:
        if step % 50 == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        lr = schedule(recipe, step, time.perf_counter() - begin)
        if lr is None:
            return
        for group in optimizer.param_groups:
            group["lr"] = lr
        precision = (
            torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        )
        optimizer.zero_grad(set_to_none=True)
        yield step, optimizer, precision
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1


def pretrain(recipe: Recipe, out: Path, device: torch.device) -> dict[str, Any]:
    """Train and write the pipeline folder ``out`` and its record beside it; return the record."""
    begin = time.perf_counter()
    images, ids = world(recipe.scenes, recipe.seed, device)
    log.info("%d scenes in %.0f s", recipe.scenes, time.perf_counter() - begin)
    torch.manual_seed(recipe.seed)
    parts = nn.ModuleList([models.transformer(), models.text_encoder(), models.text_encoder()])
    parts.to(device).train()
    live = [p for p in parts.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in live]
    scale = models.PixelCodec().config.scaling_factor
    empty = models.token_ids([""]).to(device)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    history: list[dict[str, float]] = []
    sums = torch.zeros((), device=device)
    for step, _, precision in steps(recipe, live, device):
        n = recipe.batch_size
        chosen = torch.randint(len(images), (n,), generator=generator, device=device)
        latent = (images[chosen].float() / 127.5 - 1) * scale
        dropped = torch.rand(n, 1, generator=generator, device=device) < recipe.empty_captions
        text = torch.where(dropped, empty, ids[chosen])
        sigma = draw_positions(n, "logit_normal", generator)
        noise = torch.randn(latent.shape, generator=generator, device=device)
        with precision:
            tokens, pooled = models.text_features(list(parts[1:]), text)
            # SD3's pipeline appends what the absent third encoder would give: one zero token here
            tokens = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], 1)
            velocity = parts[0](
                hidden_states=interpolate(latent, noise, sigma), timestep=sigma * 1000,
                encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False,
            )[0]  # fmt: skip
        loss = flow_loss(velocity, latent, noise, sigma, precondition=False).mean()
        loss.backward()
        decay = min(recipe.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in live], 1 - decay)
        sums += loss.detach()
        if (step + 1) % EVERY == 0:
            history.append({"step": step + 1, "loss": round(float(sums) / EVERY, 5)})
            spent = time.perf_counter() - begin
            log.info("step %d loss %.4f, %.0f s", step + 1, history[-1]["loss"], spent)
            sums.zero_()
    with torch.no_grad():
        for parameter, value in zip(live, average, strict=True):
            parameter.copy_(value)
    parts.cpu()
    models.save_pipeline(out, parts[0], list(parts[1:]))
    count = sum(p.numel() for p in live)
    return write_record(out, recipe, history, count, time.perf_counter() - begin, device)


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
    (out / "recipe.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
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


if __name__ == "__main__":
    pretrain(*arguments(Recipe, __doc__ or "", None))
