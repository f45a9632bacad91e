"""FacT: the updates of all layers are one tensor, factorised over layers, outputs and inputs.

    ΔW_i = s V Σ_i U,  U (r, d) and V (d, r) shared by all layers, Σ_i (r, r) the layer's own;
    tt (tensor train): Σ_i is free;  tk (Tucker): Σ_i = C ×₃ P_i with C (r, r, r), P (r, 12 L)

Jie and Deng, FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer, AAAI 2023
(arXiv 2212.03145). A block is twelve d x d matrices: q, k, v, proj, four of fc1, four of fc2.
ViT-B/16: 1,536 r + 144 r² (tt) or 1,536 r + 144 r + r³ (tk), 61,440 and 30,976 for r = 16. The
released Tucker code mixes rank and block index of the four cores of fc1 and of fc2 when it
flattens them, which the paper does not; with tt both are the same.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import Method, Unsupported, replace, slots


class FacT(Method):
    """FacT-TT and FacT-TK."""

    paper: ClassVar[str] = "FacT (AAAI 2023)"
    bibkey: ClassVar[str] = "jie2023fact"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    form: Literal["tt", "tk"] = "tt"
    rank: int = Field(default=16, gt=0)
    scale: float = Field(default=1.0, gt=0, description="s; the paper tunes it per task")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="on the features of size rank")
    variant: Literal["paper", "released"] = "paper"

    def adapt(self, model: nn.Module) -> None:
        paths = list(dict.fromkeys(slot.path for slot in slots(model)))
        layers = [model.get_submodule(path) for path in paths]
        width = layers[0].in_features
        if any(layer.in_features % width or layer.out_features % width for layer in layers):
            raise Unsupported(
                f"FacT cuts every matrix into blocks of {width} x {width}, so the hidden size of "
                "the MLPs must be a multiple of the width."
            )
        count = sum(layer.weight.numel() // width**2 for layer in layers)
        model.fact = _Factors(self, width, count).to(layers[0].weight)
        first = 0
        for path, layer in zip(paths, layers, strict=True):
            mixed = self.variant == "released" and "mlp" in path
            adapted = _FacTLinear(self, layer, model.fact, first, mixed)
            first += adapted.outs * adapted.ins
            replace(model, path, adapted)

    def merge(self, model: nn.Module) -> None:
        for path, layer in list(model.named_modules()):
            if isinstance(layer, _FacTLinear):
                replace(model, path, layer.merged())
        del model.fact


class _Factors(nn.Module):
    """What the layers share: U and V and, for tk, the core tensor C and the layer factor P."""

    def __init__(self, settings: FacT, width: int, count: int) -> None:
        super().__init__()
        rank = settings.rank
        self.u = nn.Parameter(torch.empty(rank, width))
        self.v = nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.u, a=math.sqrt(5))
        if settings.form == "tk":
            self.c = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, rank, rank)))
            self.p = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, count)))


class _FacTLinear(nn.Linear):
    """A frozen layer of outs x ins blocks of d x d, plus its part of the factorised update."""

    def __init__(
        self, settings: FacT, base: nn.Linear, factors: _Factors, first: int, mixed: bool
    ) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        rank, width = factors.u.shape
        self.outs, self.ins = base.out_features // width, base.in_features // width
        self.scale, self.first, self.mixed = settings.scale, first, mixed
        self.factors = (factors,)  # in a tuple, so that it is a submodule of the model only
        self.dropout = nn.Dropout(settings.dropout)
        self.free = settings.form == "tt"
        if self.free:
            self.core = nn.Parameter(factors.u.new_empty(self.outs * rank, self.ins * rank))
            nn.init.kaiming_uniform_(self.core, a=math.sqrt(5))

    def middle(self) -> Tensor:
        """The layer's Σ (outs r, ins r), one r x r core for each block of d x d."""
        if self.free:
            return self.core
        (factors,) = self.factors
        cores = factors.c @ factors.p[:, self.first : self.first + self.outs * self.ins]
        if self.mixed:
            return cores.flatten(1).T if self.ins == 1 else cores.flatten(1)
        if self.ins == 1:
            return cores.permute(2, 1, 0).flatten(0, 1)
        return cores.permute(1, 2, 0).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        (factors,) = self.factors
        inner = F.linear(x.unflatten(-1, (self.ins, -1)), factors.u).flatten(-2)
        inner = self.dropout(F.linear(inner, self.middle())).unflatten(-1, (self.outs, -1))
        update = F.linear(inner, factors.v).flatten(-2)
        return F.linear(x, self.weight, self.bias) + self.scale * update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with the weight W + ΔW."""
        (factors,) = self.factors
        rank = factors.u.shape[0]
        core = self.middle().view(self.outs, rank, self.ins, rank)
        delta = torch.einsum("dr,oris,se->odie", factors.v, core, factors.u)
        weight = self.weight + self.scale * delta.reshape(self.weight.shape)
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer
