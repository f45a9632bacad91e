"""Pre-train quick generation's CLIP on captioned rendered scenes, by the contrastive loss of CLIP.

python -m snella.quick.pretrain_clip --out workflow/resources/clip_quick
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from snella.quick import generation_models as models
from snella.quick.pretrain_sd3 import arguments, steps, world, write_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that moves the weights."""

    scenes: int = 200_000
    steps: int = 2500
    batch_size: int = 768
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.1
    seed: int = 1
    max_seconds: float | None = None


def pretrain(recipe: Recipe, out: Path, device: torch.device) -> dict[str, Any]:
    """Train and write the open_clip folder ``out`` and its record in it; return the record."""
    begin = time.perf_counter()
    images, ids = world(recipe.scenes, recipe.seed, device)
    torch.manual_seed(recipe.seed)
    model = models.clip_model().to(device).train()
    generator = torch.Generator(device).manual_seed(recipe.seed)
    history: list[dict[str, float]] = []
    target = torch.arange(recipe.batch_size, device=device)
    for step, _, precision in steps(recipe, list(model.parameters()), device):
        shape = (recipe.batch_size,)
        chosen = torch.randint(len(images), shape, generator=generator, device=device)
        with torch.no_grad():  # the same bound on the temperature as in CLIP's paper
            model.logit_scale.clamp_(max=4.6052)
        with precision:
            image, text, scale = model(images[chosen].float() / 127.5 - 1, ids[chosen])
        logits = scale.float() * image.float() @ text.float().T
        # scenes drawn with the same caption are no negatives of each other
        same = (ids[chosen][:, None] == ids[chosen][None]).all(-1)
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
        loss = (
            functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        ) / 2
        loss.backward()
        if (step + 1) % 100 == 0:
            right = (logits.argmax(1) == target).float().mean()
            value, accuracy = round(float(loss.detach()), 4), round(float(right), 4)
            history.append({"step": step + 1, "loss": value, "accuracy": accuracy})
            log.info("%s, %.0f s", history[-1], time.perf_counter() - begin)
    models.save_clip(out, model.cpu())
    count = sum(p.numel() for p in model.parameters())
    return write_record(out, recipe, history, count, time.perf_counter() - begin, device)


if __name__ == "__main__":
    pretrain(*arguments(Recipe, __doc__ or "", None))
