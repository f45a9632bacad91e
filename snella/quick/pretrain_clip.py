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
from torch import Tensor, nn
from torch.nn import functional

from snella.methods.base import Batch
from snella.quick import generation_models as models
from snella.quick.generation_recipe import arguments, half_precision, train, world, write_record

log = logging.getLogger(__name__)
EVERY = 100
"""Steps between two lines of the history."""
LARGEST_SCALE = 4.6052
"""ln 100: the bound on the logarithm of the temperature's inverse in CLIP's paper."""


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


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Similarities (B, B) of images and captions, times the inverse temperature.

    Scenes that were drawn with the same caption are no negatives of each other.
    """
    with torch.no_grad():
        model.get_parameter("logit_scale").clamp_(max=LARGEST_SCALE)
    with half_precision(batch["image"].device):
        image, text, scale = model(batch["image"], batch["text"])
    same = (batch["text"][:, None] == batch["text"][None]).all(-1)
    same.fill_diagonal_(False)
    similarity: Tensor = scale.float() * image.float() @ text.float().T
    return similarity.masked_fill(same, float("-inf"))


def pretrain(recipe: Recipe, out: Path, device: torch.device) -> dict[str, Any]:
    """Train and write the open_clip folder ``out`` and its record in it; return the record."""
    begin = time.perf_counter()
    images, ids = world(recipe.scenes, recipe.seed, device)
    torch.manual_seed(recipe.seed)
    model = models.clip_model().to(device).train()
    generator = torch.Generator(device).manual_seed(recipe.seed)
    target = torch.arange(recipe.batch_size, device=device)
    right = torch.zeros((), device=device)

    def draw() -> Batch:
        shape = (recipe.batch_size,)
        chosen = torch.randint(len(images), shape, generator=generator, device=device)
        return {"image": images[chosen].float() / 127.5 - 1, "text": ids[chosen]}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        found = logits(model, batch)
        right.copy_((found.argmax(1) == target).float().mean())
        both = functional.cross_entropy(found, target) + functional.cross_entropy(found.T, target)
        return both / 2

    history: list[dict[str, float]] = []
    for step, value in train(recipe, model, draw, loss, device):
        if step % EVERY == 0:
            numbers = {"loss": round(float(value), 4), "accuracy": round(float(right), 4)}
            history.append({"step": step, **numbers})
            log.info("%s, %.0f s", history[-1], time.perf_counter() - begin)
    models.save_clip(out, model.cpu())
    count = sum(p.numel() for p in model.parameters())
    return write_record(out, recipe, history, count, time.perf_counter() - begin, device)


if __name__ == "__main__":
    pretrain(*arguments(Recipe, __doc__ or "", None))
