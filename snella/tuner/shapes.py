"""Which parameter of a module is the matrix that SNELLA adapts, and its shape."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_attention(module: nn.Module) -> bool:
    """Whether query, key and value are one parameter, (3 · width, width), of this module."""
    weight = module._parameters.get("in_proj_weight")
    return weight is not None and weight.ndim == 2 and weight.shape[0] % 3 == 0


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Output and input features of the matrix of a module's weight."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels, module.weight[0].numel()
    if is_attention(module):
        out_features, in_features = module.in_proj_weight.shape  # type: ignore[misc]
        return out_features, in_features
    return module.out_features, module.in_features  # type: ignore[return-value]
