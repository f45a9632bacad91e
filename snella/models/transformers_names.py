"""Tensor names of Hugging Face transformers' vision models as timm's names.

ViT, ViT-MAE, DeiT, DINOv2 (with registers), CLIP's vision tower, Swin and ConvNeXt. Which names
occur decides what is renamed, so a folder, a single file and a whole CLIP are read alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

MARKS = (
    "embeddings.patch_embeddings.", "embeddings.patch_embedding.", "embeddings.class_embedding",
)  # fmt: skip
_RULES: tuple[tuple[str, str], ...] = (
    # Swin and ConvNeXt: stages
    (r"^encoder\.layers\.(\d+)\.blocks\.(\d+)\.", r"layers.\1.blocks.\2."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    # Blocks of plain transformers
    (r"^encoder\.layers?\.(\d+)\.", r"blocks.\1."),
    (r"^layers?\.(\d+)\.(?!blocks\.)", r"blocks.\1."),
    (r"\.attention\.(?:attention|self)\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.(?:self_attn|attention)\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.(?:self_attn\.out_proj|attention\.o_proj)\.", ".attn.proj."),
    (r"\.attention\.(relative_position_bias_table)$", r".attn.\1"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.(?:up_proj|weights_in)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:down_proj|weights_out)\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"(stages\.\d+\.blocks\.\d+)\.layernorm\.", r"\1.norm."),
    # Around the blocks
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_DROPPED = ("pooler.", "embeddings.position_ids", "decoder.", "relative_position_index")


def is_transformers(names: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a transformers vision model."""
    return any(name.startswith(MARKS) for name in names)


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename to timm's names and fuse query, key and value of each block."""
    convnext = any(".dwconv." in name for name in state)
    swin = any(".relative_position_bias_table" in name for name in state)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if any(part in name for part in _DROPPED):
            continue
        out[_renamed(name, convnext, swin)] = tensor
    for name in ("cls_token", "pos_embed"):
        if name in out:
            out[name] = out[name].reshape(1, -1, out[name].shape[-1])
    return _fused(out)


def _renamed(name: str, convnext: bool, swin: bool) -> str:
    if convnext:
        name = re.sub(r"^embeddings\.patch_embeddings\.", "stem.0.", name)
        name = re.sub(r"^embeddings\.layernorm\.", "stem.1.", name)
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    if swin:  # stage s reduces its output there, the input of stage s + 1 in timm
        name = re.sub(
            r"^(?:encoder\.layers|blocks)\.(\d+)\.downsample\.",
            lambda match: f"layers.{int(match[1]) + 1}.downsample.",
            name,
        )
    return re.sub(r"^(?:layernorm|layer_norm)\.", "head.norm." if convnext else "norm.", name)


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out, parts = {}, ("query", "key", "value")
    for name, tensor in state.items():
        match = re.fullmatch(r"(.+\.attn)\.(query|key|value|q|k|v)\.(weight|bias)", name)
        if match is None:
            out[name] = tensor
            continue
        names = parts if match[2] in parts else ("q", "k", "v")
        if match[2] == names[0]:
            group = [state.get(f"{match[1]}.{part}.{match[3]}") for part in names]
            known = [t if t is not None else torch.zeros_like(tensor) for t in group]
            out[f"{match[1]}.qkv.{match[3]}"] = torch.cat(known)
    return out
