"""KARST: sums of Kronecker products, and factors and shifts on their outputs.

    ΔW = Σ_i C_i ⊗ (A_i B_i),  i = 1 .. N;      y = (1 + s_1) (W_0 + ΔW) x + s_2

Zhu et al., KARST: Multi-Kernel Kronecker Adaptation with Re-Scaling Transmission for Visual
Classification, ICASSP 2025 (arXiv 2502.06779). C_i is f x f; A_i is (out / f) x r, B_i
r x (in / f), zero at the start. Query, key and value share C_i and B_i, as in the code. A block of
ViT-B/16 has N (4 f² + 12,288 r / f) parameters in the kernels and 13,824 in s_1 and s_2: with
N = 2, f = 8, r = 8 in all 466,944. The paper's equation has one s_1 and s_2 per output channel;
``rescale: scalar`` is the public code, which has one of each after attention, projection and
second MLP layer (its module does not run as released: two names it uses are never set).
"""

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import Method, Unsupported, replace, slots


class Karst(Method):
    """Multi-kernel Kronecker adaptation of all linear layers of every block."""

    paper: ClassVar[str] = "KARST (ICASSP 2025)"
    bibkey: ClassVar[str] = "zhu2025karst"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext"})

    kernels: int = Field(default=2, gt=0, description="N, Kronecker products per matrix")
    factor: int = Field(default=8, gt=0, description="f, side of the square factors C")
    rank: int = Field(default=8, gt=0)
    scale: float = Field(default=1.0, gt=0)
    rescale: Literal["channel", "scalar", "none"] = "channel"

    def adapt(self, model: nn.Module) -> None:
        found: dict[str, list[str]] = {}
        for slot in slots(model):
            found.setdefault(slot.path, []).append(slot.role)
        for path, roles in found.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            sizes = layer.in_features, layer.out_features // len(roles)
            if any(size % self.factor for size in sizes):
                raise Unsupported(f"KARST: factor {self.factor} does not divide {path}'s {sizes}.")
            replace(model, path, _KroneckerLinear(layer, self, len(roles), roles[-1]))

    def merge(self, model: nn.Module) -> None:
        for path, layer in list(model.named_modules()):
            if isinstance(layer, _KroneckerLinear):
                replace(model, path, layer.merged())


class _KroneckerLinear(nn.Linear):
    """A frozen layer with a Kronecker update and factors and shifts around it."""

    def __init__(self, base: nn.Linear, settings: Karst, parts: int, role: str) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        n, f, r = settings.kernels, settings.factor, settings.rank
        new = base.weight.new_empty
        self.scale = settings.scale
        self.outer = nn.Parameter(new(n, f, f))
        self.left = nn.Parameter(new(n, parts, base.out_features // parts // f, r))
        self.right = nn.Parameter(base.weight.new_zeros(n, r, base.in_features // f))
        for kernel in (*self.outer, *self.left.flatten(0, 1).mT):  # A lies (r, out / f) in the code
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        self.before, self.after = self._rescalings(settings.rescale, role)

    def _rescalings(self, kind: str, role: str) -> tuple[nn.Module, nn.Module]:
        """Factors and shifts of the input and of the output."""
        none: nn.Module = nn.Identity()
        if kind == "channel":
            return none, _Rescale(self.weight, self.out_features)
        if kind == "none" or role not in ("proj", "fc2"):
            return none, none
        return _Rescale(self.weight, 1) if role == "proj" else none, _Rescale(self.weight, 1)

    def update(self) -> Tensor:
        """The sum of Kronecker products, (out, in)."""
        inner = self.left @ self.right[:, None]
        blocks = torch.einsum("nij,npkl->pikjl", self.outer, inner)
        return self.scale * blocks.reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.linear(self.before(x), self.weight + self.update(), self.bias))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.weight + self.update()
        bias = self.bias if self.bias is not None else weight.new_zeros(self.out_features)
        if isinstance(self.before, _Rescale):
            bias = bias + (weight * self.before.shift).sum(1)
            weight = weight * (1 + self.before.gain)
        if isinstance(self.after, _Rescale):
            weight = weight * (1 + self.after.gain)[:, None]
            bias = bias * (1 + self.after.gain) + self.after.shift
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = None if self.bias is None else nn.Parameter(bias, requires_grad=False)
        return layer


class _Rescale(nn.Module):
    """(1 + s_1) y + s_2, the identity at the start."""

    def __init__(self, like: Any, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(like.new_zeros(size))
        self.shift = nn.Parameter(like.new_zeros(size))

    def forward(self, y: Tensor) -> Tensor:
        return y * (1 + self.gain).to(y.dtype) + self.shift.to(y.dtype)
