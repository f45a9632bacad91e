"""HydraLoRA: one A for all, several B's, and a router that weighs them for each token.

    y = W x + b + (α / r) Σ_i ω_i B_i A x,   ω = softmax(R x)

Tian et al., HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning, NeurIPS 2024
(arXiv 2404.19245). ViT-B/16, query and value, rank 8, two B's: 479,232 parameters, the 0.56 % of
the S2FT paper's VTAB table. Its FGVC table's 0.47 % fits four B's on one projection (405,504); the
paper states neither. The weights depend on the token, so that the update folds into the weights
with a single B only, where ω = 1. The released code draws a new dropout mask for each B; here they
share one, as the shared A suggests. Its load-balancing loss is off by default and left out.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import CannotMerge, Method, fuse_qkv, replace, slots, split_qkv


class HydraLoRA(Method):
    """Shared down projection, routed up projections."""

    paper: ClassVar[str] = "HydraLoRA (NeurIPS 2024)"
    bibkey: ClassVar[str] = "tian2024hydralora"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "sam"})

    rank: int = Field(default=8, gt=0)
    experts: int = Field(default=2, gt=0, description="number of B matrices")
    alpha: float = Field(default=8.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the input of A")
    roles: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = ("q", "v")

    def adapt(self, model: nn.Module) -> None:
        split_qkv(model)
        for slot in slots(model, self.roles):
            replace(model, slot.path, _HydraLinear(self, model.get_submodule(slot.path)))

    def merge(self, model: nn.Module) -> None:
        if self.experts > 1:
            raise CannotMerge("HydraLoRA's router weighs the experts anew for every token.")
        for path, layer in list(model.named_modules()):
            if isinstance(layer, _HydraLinear):
                replace(model, path, layer.merged())
        fuse_qkv(model)


class _HydraLinear(nn.Linear):
    """A frozen layer plus routed low-rank experts; ``b`` (out, experts r) holds all B's."""

    def __init__(self, settings: HydraLoRA, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        place = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.a = nn.Linear(base.in_features, settings.rank, **place)
        self.b = nn.Linear(settings.experts * settings.rank, base.out_features, **place)
        self.router = nn.Linear(base.in_features, settings.experts, **place)
        nn.init.zeros_(self.b.weight)
        self.dropout = nn.Dropout(settings.dropout)
        self.scaling = settings.alpha / settings.rank

    def forward(self, x: Tensor) -> Tensor:
        routes = self.router(x).softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        inner = self.scaling * self.a(self.dropout(x))
        routed = (routes.unsqueeze(-1) * inner.unsqueeze(-2)).flatten(-2)
        return F.linear(x, self.weight, self.bias) + self.b(routed)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with the weight W + (α / r) B A of a single expert."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.weight + self.scaling * self.b.weight @ self.a.weight
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer
