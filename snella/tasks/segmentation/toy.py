"""A tiny SAM with one batch to learn by heart: what `snella check` trains."""

from __future__ import annotations

import torch

from snella.errors import Unsupported
from snella.methods.base import Batch
from snella.models.sam import build_sam, mask_logits, mask_loss, upsample
from snella.tasks.base import Toy

SIZES = {
    "image_size": 32, "patch_size": 8, "encoder_dim": 96, "encoder_depth": 2, "encoder_heads": 4,
    "window_size": 2, "global_blocks": [1], "decoder_dim": 32, "decoder_mlp_dim": 32,
    "decoder_heads": 2,
}  # fmt: skip
"""As wide as the quick suite's backbone, so that the settings of every row fit."""


def toy(family: str) -> Toy:
    """A SAM of two blocks and eight images with a bright square each, whose mask is the square."""
    if family != "sam":
        raise Unsupported(f"Segmentation trains sam backbones, not {family}.")
    torch.manual_seed(0)
    model = build_sam("sam_vit", SIZES)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(8, 3, 32, 32, generator=generator)
    mask = torch.zeros(8, 32, 32)
    for i in range(8):
        y, x = 4 * (i % 4), 8 * (i // 4)
        image[i, :, y : y + 16, x : x + 16] += 2
        mask[i, y : y + 16, x : x + 16] = 1
    return Toy(model, {"image": image, "mask": mask}, _loss, _forward)


def _forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return mask_logits(model, batch["image"])


def _loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return mask_loss(upsample(_forward(model, batch), (32, 32)), batch["mask"])
