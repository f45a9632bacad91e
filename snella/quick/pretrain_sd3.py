"""Pre-train quick generation's text-to-image model on captioned rendered scenes.

Transformer and text encoders are trained together by the rectified-flow objective of
:mod:`snella.equations.flow`; one caption in ten is empty, for classifier-free guidance. The
weights written are an exponential moving average.

    python -m snella.quick.pretrain_sd3 --out workflow/resources/sd3_quick
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snella.equations.flow import draw_positions, flow_loss, interpolate
from snella.methods.base import Batch
from snella.quick import generation_models as models
from snella.quick.generation_recipe import arguments, half_precision, train, world, write_record

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


class Average:
    """An exponential moving average of parameters that follows them closely at first."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.live, self.decay, self.updates = parameters, decay, 0
        self.values = [p.detach().clone() for p in parameters]

    def update(self) -> None:
        """Move towards the present values."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def put(self) -> None:
        """Give the parameters the averaged values."""
        for parameter, value in zip(self.live, self.values, strict=True):
            parameter.copy_(value)


class Scenes:
    """Training batches: latents and noise (B, 3, 32, 32), noise levels (B,), tokens (B, T)."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.images, self.ids = world(recipe.scenes, recipe.seed, device)
        self.recipe, self.device = recipe, device
        self.scale = models.PixelCodec().config.scaling_factor
        self.empty = models.token_ids([""]).to(device)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)

    def draw(self) -> Batch:
        """The next batch; some captions are empty."""
        n = self.recipe.batch_size
        random: dict[str, Any] = {"generator": self.generator, "device": self.device}
        chosen = torch.randint(len(self.images), (n,), **random)
        latent = (self.images[chosen].float() / 127.5 - 1) * self.scale
        dropped = torch.rand(n, 1, **random) < self.recipe.empty_captions
        return {
            "latent": latent,
            "text": torch.where(dropped, self.empty, self.ids[chosen]),
            "sigma": draw_positions(n, "logit_normal", self.generator),
            "noise": torch.randn(latent.shape, **random),
        }


def loss(parts: nn.Module, batch: Batch) -> Tensor:
    """The mean flow loss of transformer and text encoders, ``parts``."""
    assert isinstance(parts, nn.ModuleList)
    latent, noise, sigma = batch["latent"], batch["noise"], batch["sigma"]
    with half_precision(latent.device):
        tokens, pooled = models.text_features(list(parts[1:]), batch["text"])
        # SD3's pipeline appends what the absent third encoder would give: one zero token here
        tokens = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], 1)
        velocity = parts[0](
            hidden_states=interpolate(latent, noise, sigma), timestep=sigma * 1000,
            encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False,
        )[0]  # fmt: skip
    return flow_loss(velocity, latent, noise, sigma, precondition=False).mean()


def pretrain(recipe: Recipe, out: Path, device: torch.device) -> dict[str, Any]:
    """Train and write the pipeline folder ``out`` and its record beside it; return the record."""
    begin = time.perf_counter()
    drawn = Scenes(recipe, device)
    log.info("%d scenes in %.0f s", recipe.scenes, time.perf_counter() - begin)
    torch.manual_seed(recipe.seed)
    parts = nn.ModuleList([models.transformer(), models.text_encoder(), models.text_encoder()])
    parts.to(device).train()
    live = [p for p in parts.parameters() if p.requires_grad]
    average = Average(live, recipe.ema)
    history: list[dict[str, float]] = []
    total = torch.zeros((), device=device)
    for step, value in train(recipe, parts, drawn.draw, loss, device, average.update):
        total += value
        if step % EVERY == 0:
            history.append({"step": step, "loss": round(float(total) / EVERY, 5)})
            log.info("%s, %.0f s", history[-1], time.perf_counter() - begin)
            total.zero_()
    average.put()
    parts.cpu()
    models.save_pipeline(out, parts[0], list(parts[1:]))
    count = sum(p.numel() for p in live)
    return write_record(out, recipe, history, count, time.perf_counter() - begin, device)


if __name__ == "__main__":
    pretrain(*arguments(Recipe, __doc__ or "", None))
