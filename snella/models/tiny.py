"""Tiny untrained backbones of every family, and a batch for each: one factory for all checks."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from snella.models.families import family

CLASSES = 5
_EXTRAS = {"sam": ("segment_anything", "segmentation"), "sd3": ("diffusers", "generation")}
BASE_SIZE = {
    "vit": ("ViT-B/16", "vit_base_patch16_224"),
    "swin": ("Swin-B", "swin_base_patch4_window7_224"),
    "convnext": ("ConvNeXt-B", "convnext_base"),
}
"""Per family the usual backbone of the papers' tables: its name and timm's."""
# As wide as the quick suite's backbone, so that the settings of every row fit.
_TIMM: dict[str, dict[str, Any]] = {
    "vit": {
        "model_name": "vit_tiny_patch16_224",
        "img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 4,
    },
    "swin": {
        "model_name": "swin_tiny_patch4_window7_224", "drop_path_rate": 0.0,
        "img_size": 32, "embed_dim": 96, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4,
    },
    "convnext": {
        "model_name": "convnext_tiny",
        "depths": (1, 1, 1, 1), "dims": (32, 32, 32, 64), "ls_init_value": 1.0,
    },
}  # fmt: skip
TIMM_FAMILIES = tuple(_TIMM)
FAMILIES = (*TIMM_FAMILIES, "sam", "sd3")


def tiny_backbone(kind: str = "vit", **overrides: Any) -> nn.Module:
    """A tiny backbone of the family ``kind``; its weights are the same in every process."""
    torch.manual_seed(0)
    if kind in _TIMM:
        import timm

        return timm.create_model(**{"num_classes": CLASSES, **_TIMM[kind], **overrides})
    return _tiny_sam(**overrides) if kind == "sam" else _tiny_sd3(**overrides)


def missing_extra(kind: str) -> str | None:
    """The optional dependency group that the family ``kind`` needs and that is not installed."""
    library, extra = _EXTRAS.get(kind, ("timm", ""))
    return None if importlib.util.find_spec(library) else extra


def _tiny_sam(**overrides: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 4,
        "window_size": 2, "out_chans": 16, "use_rel_pos": True,
    }  # fmt: skip
    return _sam_encoder_with_head()(**{**sizes, **overrides})


@cache
def _sam_encoder_with_head() -> type[nn.Module]:
    """segment-anything's encoder with a linear head in the place of its mask decoder."""
    from segment_anything.modeling import ImageEncoderViT

    class Encoder(ImageEncoderViT):  # type: ignore[misc]  # a library without types
        def __init__(self, **sizes: Any) -> None:
            super().__init__(**sizes)
            self.head = nn.Linear(sizes["out_chans"], CLASSES)

        def get_classifier(self) -> nn.Module:
            return self.head

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(super().forward(x).mean((2, 3)))
            return logits

    return Encoder


def _tiny_sd3(**overrides: Any) -> nn.Module:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    sizes: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 24, "num_attention_heads": 4, "joint_attention_dim": 16,
        "caption_projection_dim": 96, "pooled_projection_dim": 16, "pos_embed_max_size": 8,
    }  # fmt: skip
    model: nn.Module = SD3Transformer2DModel(**{**sizes, **overrides})
    return model


def base_backbone(kind: str) -> nn.Module:
    """The family's usual backbone in full size, without storage: for counting."""
    import timm

    with torch.device("meta"):
        return timm.create_model(BASE_SIZE[kind][1], num_classes=CLASSES)


def toy_batch(kind: str = "vit", size: int = 8) -> dict[str, Tensor]:
    """The batch to learn: images (B, 3, 32, 32) and labels, or SD3's inputs and a target."""
    generator = torch.Generator().manual_seed(1)
    if kind != "sd3":
        images = torch.randn(size, 3, 32, 32, generator=generator)
        return {"image": images, "label": torch.arange(size) % CLASSES}
    return {
        "hidden_states": torch.randn(size, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(size, 3, 16, generator=generator),
        "pooled_projections": torch.randn(size, 16, generator=generator),
        "timestep": torch.linspace(10, 990, size),
        "target": torch.randn(size, 4, 8, 8, generator=generator),
    }


def output(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    """The model's answer to ``batch`` (the toy batch): logits (B, classes), or SD3's velocity."""
    kind = family(model)
    batch = toy_batch(kind) if batch is None else batch
    if kind == "sd3":
        inputs = {name: value for name, value in batch.items() if name != "target"}
        velocity: Tensor = model(**inputs, return_dict=False)[0]
        return velocity
    logits: Tensor = model(batch["image"])
    return logits
