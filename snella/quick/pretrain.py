"""Pre-train the quick suite's backbone by supervised classification of formula-driven images.

A 32-pixel timm VisionTransformer (patch 8, width 96, 6 blocks) learns to tell classes of fractals,
visual atoms and gratings apart (`snella.quick.formula`), painted in random colours over random
backgrounds at random places and sizes. Each epoch depends only on (config, epoch), and a checkpoint
follows each, so that a killed run resumes to the same weights.

    python -m snella.quick.pretrain --out workflow/resources/vit_quick.safetensors
"""

from __future__ import annotations

import argparse
import logging
import math
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from snella.methods.step import train_step
from snella.quick import formula
from snella.quick.epochs import run_epochs, write

ARCHITECTURE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "class_token": True,
    "global_pool": "token",
}
MEAN = STD = 0.5


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that moves the weights."""

    architecture: dict[str, Any] = field(default_factory=lambda: dict(ARCHITECTURE))
    classes: dict[str, int] = field(
        default_factory=lambda: {"fractal": 120, "atom": 120, "grating": 60}
    )
    instances: int = 100
    epochs: int = 30
    warmup_epochs: int = 1
    batch_size: int = 64
    lr: float = 1.5e-3
    weight_init: Literal["", "jax"] = (
        "jax"  # timm's default (std 0.02) leaves a narrow ViT on a plateau for long
    )
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    seed: int = 0


# ---------------------------------------------------------------------------- augmentation


def augment(grey: Tensor, rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """Grey shapes (B, 1, 48, 48) in [0, 1] -> normalised colour images (B, 3, 32, 32).

    The random crop of the standard recipe is a random place, size (0.6 to 1.4 of the image) and
    aspect; colour jitter is a random colour over a smooth random background, inverted half of the
    time, with noise. There is no flip and no rotation: a shape's direction is part of its class.
    `strength` in [0, 1] scales all of it.
    """
    n = len(grey)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=rng) * (high - low) + low

    size = torch.exp(strength * uniform(math.log(0.6), math.log(1.4)))
    aspect = torch.exp(strength * uniform(-0.2, 0.2))
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = aspect / size, 1 / (aspect * size)
    reach = strength * (1 - 0.6 * size).clamp(min=0.25)
    theta[:, :, 2] = uniform(-1, 1, 2) * (reach / size)[:, None]
    grid = functional.affine_grid(theta, [n, 1, 32, 32], align_corners=False)
    shape = functional.grid_sample(grey, grid, align_corners=False)

    light = uniform(0.0, 0.35, 1, 1, 1)
    ground = light + strength * uniform(-0.2, 0.2, 3, 4, 4)
    ground = functional.interpolate(ground, size=(32, 32), mode="bilinear", align_corners=True)
    bright = light + uniform(0.3, 0.65, 1, 1, 1) + uniform(-0.35, 0.35, 3, 1, 1)
    cover = (shape * uniform(1.2, 2.5, 1, 1, 1)).clamp(max=1)
    image = ground + cover * (bright - ground)
    image = torch.where(uniform(0, 1, 1, 1, 1) < 0.5 * strength, 1 - image, image)
    image = image + strength * uniform(0, 0.06, 1, 1, 1) * torch.randn(image.shape, generator=rng)
    return (image.clamp(0, 1) - MEAN) / STD


# -------------------------------------------------------------------------------- training


def _learning_rate(config: PretrainConfig, progress: float) -> float:
    """Linear warm-up, then a cosine to zero; progress is in epochs."""
    if progress < config.warmup_epochs:
        return config.lr * progress / config.warmup_epochs
    left = (progress - config.warmup_epochs) / max(1e-9, config.epochs - config.warmup_epochs)
    return config.lr * 0.5 * (1 + math.cos(math.pi * left))


def _epoch(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    config: PretrainConfig,
    epoch: int,
) -> tuple[float, float]:
    """One pass over the images; mean loss and accuracy on the augmented images as trained."""
    rng = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
    batches = torch.randperm(len(labels), generator=rng).split(config.batch_size)
    total_loss, correct = 0.0, 0
    model.train()
    for step, batch in enumerate(batches):
        progress = epoch + (step + 1) / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, progress)
        strength = min(1.0, 0.3 + 1.4 * progress / config.epochs)  # full from half-way on
        seen: list[Tensor] = []

        def loss(model: torch.nn.Module, batch: dict[str, Tensor], seen: Any = seen) -> Tensor:
            seen.append(model(batch["image"]))
            return functional.cross_entropy(
                seen[-1], batch["label"], label_smoothing=config.label_smoothing
            )

        view = augment(images[batch].unsqueeze(1).float() / 255, rng, strength)
        pair = {"image": view, "label": labels[batch]}
        value = train_step(model, optimizer, [pair], loss, clip_grad=1.0)
        total_loss += value.item() * len(batch)
        correct += int((seen[-1].argmax(1) == labels[batch]).sum())
    return total_loss / len(labels), correct / len(labels)


def _decayed(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; biases, norms, token and positions do not."""
    plain = [
        p
        for n, p in model.named_parameters()
        if p.ndim >= 2 and "token" not in n and "pos_embed" not in n
    ]
    chosen = {id(p) for p in plain}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": plain, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def pretrain(config: PretrainConfig, out: Path, stop_after: int | None = None) -> dict[str, Any]:
    """Train, write the weights without their head to `out` and their record beside it (.json).

    Resumes from `out` + ".checkpoint" when that was made by the same config; `stop_after` ends the
    call after that many epochs of this call (None: train to the end). Returns the record, or an
    empty dict when stopped before the end.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    pixels, numbers = formula.render(config.seed, config.classes, config.instances)
    images, labels = torch.from_numpy(pixels), torch.from_numpy(numbers)
    torch.manual_seed(config.seed)
    classes = sum(config.classes.values())
    model = VisionTransformer(
        **config.architecture, num_classes=classes, weight_init=config.weight_init
    )
    optimizer = torch.optim.AdamW(_decayed(model, config.weight_decay), lr=config.lr)

    def epoch(number: int) -> dict[str, float]:
        loss, accuracy = _epoch(model, optimizer, images, labels, config, number)
        return {"loss": loss, "accuracy": accuracy}

    done = run_epochs(config, out, model, optimizer, epoch, stop_after)
    if done is None:
        return {}
    about = {
        "model_class": "timm.models.vision_transformer.VisionTransformer",
        "architecture": config.architecture,
        "normalisation": {"mean": [MEAN] * 3, "std": [STD] * 3},
        "data": {
            "description": "formula-driven images only: no photograph, no image of a quick task",
            "families": {
                "fractal": "FractalDB (Kataoka et al., IJCV 2022)",
                "atom": "VisualAtom (Takashima et al., CVPR 2023)",
                "grating": "sums of plane waves",
            },
            "images": sum(config.classes.values()) * config.instances,
        },
        "config": asdict(config),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }
    weights = {n: v for n, v in model.state_dict().items() if not n.startswith("head.")}
    versions = {"timm": timm.__version__, "numpy": np.__version__}
    return write(out, weights, about, *done, versions)


def main(argv: list[str] | None = None) -> None:
    """Command line: the defaults are the recipe of the shipped file."""
    recipe = PretrainConfig()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=recipe.epochs)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pretrain(PretrainConfig(epochs=args.epochs, seed=args.seed), args.out)


if __name__ == "__main__":
    main()
