"""Kernels κ that merge two low-rank matrices into one dense, full-rank matrix (Eq. 6, Table 14).

``merged[o, i] = κ(B_o, A_i)`` for output feature o and input feature i. The rank is cut into P
equal pieces; with D = Σ_p c_p ‖A_p,i − B_p,o‖₂ the kernels are

    linear             A_i · B_o
    piecewise-linear   D
    sigmoid            α / (1 + exp(−β A_i · B_o)) + γ
    rbf                α exp(−β ‖A_i − B_o‖²) + γ
    rbf-normalised     α softmax_o(−β ‖A_i − B_o‖²) + γ
    mix-k              D + α softmax_o(D / τ) + β

The softmax runs over the output features, for every input feature separately ("normalise each
column", paper Sec. 3.2). The scalars α, β, γ, τ are called scale, slope or offset, and temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from snella.errors import UserError, unknown

PIECEWISE = ("piecewise-linear", "mix-k")

# Names and initial values of the learnable scalars. Table 14 gives no initial values: the offset of
# sigmoid and rbf cancels their value at A = B = 0, so that training starts near the frozen weights.
_SCALARS: dict[str, dict[str, float]] = {
    "linear": {},
    "piecewise-linear": {},
    "sigmoid": {"scale": 1.0, "slope": 1.0, "offset": -0.5},
    "rbf": {"scale": 1.0, "slope": 1.0, "offset": -1.0},
    "rbf-normalised": {"scale": 1.0, "slope": 1.0, "offset": 0.0},
    "mix-k": {"scale": 1.0, "offset": 0.0},
}
KERNELS = tuple(_SCALARS)


@dataclass(frozen=True)
class Kernel:
    """A kernel and the choices on which the paper and the released code differ.

    name: one of ``KERNELS``.
    rank: r, shared out over the pieces.
    pieces: P of the piecewise kernels; the others always see the whole rank as one piece.
    learnable_coefficients: c_p trained (paper) or fixed at ±0.1 (released).
    temperature: whether mix-k has the learnable τ of the released code.
    """

    name: str
    rank: int
    pieces: int = 2
    learnable_coefficients: bool = True
    temperature: bool = False

    def __post_init__(self) -> None:
        if self.name not in _SCALARS:
            raise unknown("kernel", self.name, KERNELS)
        if self.rank < 1:
            raise UserError(f"rank must be a positive integer, got {self.rank}.")
        if self.pieces < 1 or self.rank % self.pieces:
            raise UserError(
                f"rank {self.rank} is not divisible by pieces {self.pieces}: every piece of the "
                "kernel takes the same number of coordinates. Choose another rank or pieces."
            )
        if self.name not in PIECEWISE:
            object.__setattr__(self, "pieces", 1)

    @property
    def is_piecewise(self) -> bool:
        return self.name in PIECEWISE

    @property
    def coordinates(self) -> int:
        """Coordinates per piece, r / P."""
        return self.rank // self.pieces

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Initial (or fixed) piece coefficients c_p: +0.1, −0.1, +0.1, … (released code)."""
        return tuple(0.1 if piece % 2 == 0 else -0.1 for piece in range(self.pieces))

    @cached_property
    def scalars(self) -> dict[str, float]:
        """Learnable scalars in storage order, with their initial values."""
        values = dict(_SCALARS[self.name])
        if self.name == "mix-k" and self.temperature:
            values["temperature"] = 1.0
        if self.is_piecewise and self.learnable_coefficients:
            values |= {f"coefficient_{p}": c for p, c in enumerate(self.coefficients)}
        return values

    @cached_property
    def scalar_index(self) -> dict[str, int]:
        """Position of every scalar in storage order."""
        return {name: k for k, name in enumerate(self.scalars)}

    def named(self, scalars: Tensor) -> dict[str, Tensor]:
        """Split the (slices, K) scalars into name → (slices, 1, 1), ready to broadcast."""
        columns = scalars.view(*scalars.shape, 1, 1).unbind(1)
        return dict(zip(self.scalars, columns, strict=True))


def initial_factor(kernel: Kernel, slices: int, features: int) -> Tensor:
    """Draw A or B, (slices, P, features, r/P), from U(−s, s) with s = 1/√(features · r/P).

    This is what ``kaiming_uniform_(a=√5)`` yields on the released code's three-dimensional tensors.
    """
    bound = 1.0 / math.sqrt(features * kernel.coordinates)
    shape = (slices, kernel.pieces, features, kernel.coordinates)
    return torch.empty(shape).uniform_(-bound, bound)


def merge(kernel: Kernel, a: Tensor, b: Tensor, scalars: Tensor) -> Tensor:
    """Dense merged matrix, by the formulas above, differentiable by autograd.

    a: (slices, P, in, r/P); b: (slices, P, out, r/P); scalars: (slices, K), ordered as
    ``kernel.scalars``. Returns (slices, out, in). Distances have gradient 0 where points coincide.
    """
    return _FORMULAS[kernel.name](kernel, a, b, kernel.named(scalars))


def _products(a: Tensor, b: Tensor) -> Tensor:
    return b[:, 0] @ a[:, 0].mT


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    a, b = a[:, 0], b[:, 0]
    squares = b.square().sum(-1, keepdim=True) + a.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * (b @ a.mT)).clamp_min(0)


def _piecewise_linear(kernel: Kernel, a: Tensor, b: Tensor, scalars: dict[str, Tensor]) -> Tensor:
    distances = torch.cdist(b, a)
    pieces = []
    for p, fixed in enumerate(kernel.coefficients):
        pieces.append(distances[:, p] * scalars.get(f"coefficient_{p}", fixed))
    return torch.stack(pieces).sum(0)


def _linear(kernel: Kernel, a: Tensor, b: Tensor, scalars: dict[str, Tensor]) -> Tensor:
    return _products(a, b)


def _sigmoid(kernel: Kernel, a: Tensor, b: Tensor, scalars: dict[str, Tensor]) -> Tensor:
    activation = torch.sigmoid(scalars["slope"] * _products(a, b))
    return scalars["scale"] * activation + scalars["offset"]


def _rbf(kernel: Kernel, a: Tensor, b: Tensor, scalars: dict[str, Tensor]) -> Tensor:
    similarity = torch.exp(-scalars["slope"] * _squared_distances(a, b))
    return scalars["scale"] * similarity + scalars["offset"]


def _rbf_normalised(kernel: Kernel, a: Tensor, b: Tensor, scalars: dict[str, Tensor]) -> Tensor:
    similarity = torch.softmax(-scalars["slope"] * _squared_distances(a, b), dim=-2)
    return scalars["scale"] * similarity + scalars["offset"]


def _mix_k(kernel: Kernel, a: Tensor, b: Tensor, scalars: dict[str, Tensor]) -> Tensor:
    linear = _piecewise_linear(kernel, a, b, scalars)
    logits = linear / scalars["temperature"] if kernel.temperature else linear
    return linear + scalars["scale"] * torch.softmax(logits, dim=-2) + scalars["offset"]


_FORMULAS: dict[str, Callable[[Kernel, Tensor, Tensor, dict[str, Tensor]], Tensor]] = {
    "linear": _linear,
    "piecewise-linear": _piecewise_linear,
    "sigmoid": _sigmoid,
    "rbf": _rbf,
    "rbf-normalised": _rbf_normalised,
    "mix-k": _mix_k,
}
