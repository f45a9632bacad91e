"""The released SNELLA algorithm, plainly: what the step-time benchmark measures SNELLA against.

Per matrix: y = W x + DropPath(S x'), x' with dropout; S = merged · |merged| above its quantile. Two
products, activation checkpointing of the second, and a sort-based quantile in forward and again in
the recomputation, as in github.com/ssfgunner/SNELL at e9d5185 (MIT), written from its description.
"""

from __future__ import annotations

import math

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class ReferenceDelta(nn.Module):
    """The sparse update of one weight matrix."""

    def __init__(
        self, inputs: int, outputs: int, rank: int, sparsity: float, dropped: float = 0.0
    ) -> None:
        super().__init__()
        half = rank // 2
        self.sparsity = sparsity
        self.In_Qs = nn.Parameter(torch.empty(2, inputs, half))
        self.Out_Qs = nn.Parameter(torch.empty(2, outputs, half))
        self.alpha = nn.Parameter(torch.ones(1))
        self.gamma = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.zeros(1))
        self.register_buffer("coefficients", torch.tensor([0.1, -0.1]).view(2, 1, 1))
        for factor in (self.In_Qs, self.Out_Qs):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.drop_path = DropPath(dropped)

    def sparse(self) -> Tensor:
        """The update, shape (in, out)."""
        linear = (self.coefficients * torch.cdist(self.In_Qs, self.Out_Qs, p=2)).sum(0)
        merged = linear + self.alpha * torch.softmax(linear / self.gamma, dim=-1) + self.beta
        magnitude = merged.detach().abs()
        threshold = torch.quantile(magnitude.flatten(), self.sparsity)
        return merged * F.threshold(magnitude, float(threshold), 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(checkpoint(self._product, x, use_reentrant=False))

    def _product(self, x: Tensor) -> Tensor:
        return x @ self.sparse()


class ReferenceLinear(nn.Module):
    """A frozen linear layer plus the updates of the matrices it stacks."""

    def __init__(
        self,
        base: nn.Linear,
        parts: int,
        rank: int,
        sparsity: float,
        dropout: float,
        dropped: float,
    ) -> None:
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(dropout)
        outputs = base.out_features // parts
        self.deltas = nn.ModuleList(
            ReferenceDelta(base.in_features, outputs, rank, sparsity, dropped) for _ in range(parts)
        )

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.dropout(x)
        return self.base(x) + torch.cat([delta(dropped) for delta in self.deltas], -1)


def adapt_reference(
    model: nn.Module, rank: int = 8, sparsity: float = 0.5, dropout: float = 0.1, path: float = 0.1
) -> nn.Module:
    """Freeze a timm ViT and give q, k, v, proj, fc1 and fc2 of every block the released update."""
    model.requires_grad_(False)
    for block in model.blocks:
        for parent, name, parts in (
            (block.attn, "qkv", 3),
            (block.attn, "proj", 1),
            (block.mlp, "fc1", 1),
            (block.mlp, "fc2", 1),
        ):
            rate = 0.0 if name == "proj" else dropout
            layer = ReferenceLinear(getattr(parent, name), parts, rank, sparsity, rate, path)
            setattr(parent, name, layer)
    return model
