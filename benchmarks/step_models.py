"""The models whose training steps ``step_time.py`` measures, with random weights and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CLASSES = 100
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One model, its data, and the rows of the table."""

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[str], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    rows: tuple[str, ...] = ("full", "lora", "snella")
    graph: bool = True  # whether a step can be captured


def vit(arch: str, batch: int, title: str, *rows: str) -> Case:
    """A classifier of timm at 224 pixels."""

    def build() -> nn.Module:
        import timm

        model: Any = timm.create_model(arch, num_classes=CLASSES)
        nn.init.trunc_normal_(model.head.weight, std=0.02)
        return model

    def data(device: str) -> Batch:
        labels = torch.randint(CLASSES, (batch,), device=device)
        return {"image": torch.randn(batch, 3, 224, 224, device=device), "label": labels}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["image"]).float(), batch["label"])

    return Case(f"{title}, batch {batch}", build, data, loss, ("full", "lora", "snella", *rows))


def sam_encoder() -> nn.Module:
    """SAM ViT-B's image encoder at 1024 pixels."""
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        out_chans=256,
        qkv_bias=True,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(2, 5, 8, 11),
        norm_layer=nn.LayerNorm,
    )


def sd3_transformer() -> nn.Module:
    """The shape of SD3-medium: width 1536, depth 24, in bfloat16, checkpointed."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=192,
    )
    # No random numbers to restore, which would make the host wait.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    model.enable_gradient_checkpointing(again)
    return model.to(torch.bfloat16)


def sd3_batch(device: str) -> Batch:
    """Latents of 512 pixels, and 77 + 256 text tokens."""
    sizes = {"hidden_states": (1, 16, 64, 64), "target": (1, 16, 64, 64)}
    sizes |= {"encoder_hidden_states": (1, 333, 4096), "pooled_projections": (1, 2048)}
    batch = {name: torch.randn(*size, device=device) for name, size in sizes.items()}
    return batch | {"timestep": torch.tensor([500], device=device)}


def sd3_loss(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "target"}
    velocity = model(**inputs, return_dict=False)[0]
    return F.mse_loss(velocity.float(), batch["target"])


CASES = {
    "vit-b": vit("vit_base_patch16_224", 64, "ViT-B/16", "plain", "reference"),
    "vit-l": vit("vit_large_patch16_224", 8, "ViT-L/16"),
    "vit-h": vit("vit_huge_patch14_224", 8, "ViT-H/14"),
    "sam": Case(
        "SAM ViT-B, 1024 px, batch 1",
        sam_encoder,
        lambda device: {"image": torch.randn(1, 3, 1024, 1024, device=device)},
        lambda model, batch: model(batch["image"]).float().square().mean(),
        graph=False,  # it makes index tensors on the host
    ),
    "sd3": Case(
        "SD3-medium shape, 512 px", sd3_transformer, sd3_batch, sd3_loss, ("lora", "snella")
    ),
    "vit-b-cpu": vit("vit_base_patch16_224", 8, "ViT-B/16", "plain", "reference"),
}
