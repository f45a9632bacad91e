"""Golden whole-model run of the released code, rebuilt on timm's ViT for the SNELLA tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden" / "snella"
SLICES = {"qkv": ("attn", ("q", "k", "v")), "proj": ("attn", ("proj",))} | {
    name: ("mlp", (name,)) for name in ("fc1", "fc2")
}


def load(name: str) -> dict[str, np.ndarray]:
    """One archive of golden vectors."""
    with np.load(GOLDEN / name) as archive:
        return {key: archive[key] for key in archive.files}


def tiny_vit(run: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> VisionTransformer:
    """timm's ViT in double precision with the golden frozen weights; q, k, v fused."""
    model = VisionTransformer(
        img_size=int(run["img_size"]),
        patch_size=int(run["patch_size"]),
        embed_dim=int(run["embed_dim"]),
        depth=int(run["depth"]),
        num_heads=int(run["num_heads"]),
        mlp_ratio=float(run["mlp_ratio"]),
        num_classes=int(run["num_classes"]),
    ).double()
    state = {}
    for name, value in model.state_dict().items():
        if ".attn.qkv." in name:
            parts = [weights[name.replace("qkv", part)] for part in "qkv"]
            state[name] = torch.from_numpy(np.concatenate(parts)).double()
        else:
            state[name] = torch.from_numpy(weights[name]).double().view_as(value)
    model.load_state_dict(state)
    return model


def snella_tensor(arrays: dict[str, np.ndarray], block: int, layer: str, field: str) -> Tensor:
    """Golden A, B or scalars of one (fused) layer in the tuner's layout."""
    group, parts = SLICES[layer]
    prefix = f"blocks.{block}.{group}.additional_"
    if field in ("A", "B"):
        key = {"A": "In_Qs", "B": "Out_Qs"}[field]
        values = [arrays[f"{prefix}{part}.learnable.{key}"] for part in parts]
        return torch.from_numpy(np.stack(values)).double()
    scalars = [
        np.concatenate(
            [arrays[f"{prefix}{part}.learnable.{key}"] for key in ("alpha", "beta", "gamma")]
        )
        for part in parts
    ]
    return torch.from_numpy(np.concatenate(scalars)).double()


def snella_parameters(model: nn.Module) -> list[tuple[int, str, str, nn.Parameter]]:
    """(block, layer, field, parameter) of every SNELLA tensor of an adapted timm ViT."""
    found = []
    for name, parameter in model.named_parameters():
        if ".snella_" in name:
            parts = name.split(".")
            field = parts[-2].removeprefix("snella_")
            found.append((int(parts[parts.index("blocks") + 1]), parts[-3], field, parameter))
    return found
