"""Merged matrices evaluated and differentiated tile by tile, so that they need not be stored.

A tile is all output features times some input features, so that the softmax over outputs is local.
For D = Σ_p c_p d_p with d_p = ‖A_p,i − B_p,o‖ the squared distances are one small matrix product,
and so is the way back: with R = c_p ∂L/∂D / d_p,

    ∂L/∂A_i = A_i Σ_o R_oi − Σ_o R_oi B_o,    ∂L/∂B_o = B_o Σ_i R_oi − Σ_i R_oi A_i.

``equations.kernels.merge`` is the readable definition, and the oracle of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from snella.backends.scratch import Scratch
from snella.equations.kernels import Kernel, merge

# Elements per tile. Smaller tiles fit a CPU's inner caches, larger ones need fewer calls; in
# between it hardly matters. Accelerators take all slices of a layer at once.
CPU_TILE = 320 * 1024


@contextmanager
def full_precision() -> Iterator[None]:
    """Single precision for matrix products even where the user allows TF32 or bfloat16 for them.

    A squared distance is a small difference of large products.
    """
    precision = torch.get_float32_matmul_precision()
    if precision == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@lru_cache(maxsize=64)
def _fixed_coefficients(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The constant c_p, made once: a copy to a device on every call would wait for it."""
    with torch.inference_mode(False):
        values = torch.tensor(kernel.coefficients, dtype=dtype, device=device)
        return list(values.view(-1, 1, 1, 1).unbind())


@dataclass(frozen=True)
class Span:
    """Where a tile lies: which slices of the layer, and which of their input features."""

    slices: slice
    columns: slice
    row_length: int

    @property
    def width(self) -> int:
        return int(self.columns.stop - self.columns.start)


@dataclass
class Tile:
    """Part of the merged matrices, (slices, out, some in), and what the way back needs besides."""

    merged: Tensor
    linear: Tensor | None = None
    distances: Tensor | None = None
    exponential: Tensor | None = None
    normaliser: Tensor | None = None
    leaves: list[Tensor] = field(default_factory=list)


class PiecewiseTiles:
    """piecewise-linear and mix-k; shapes as in ``equations.kernels.merge``, without gradients."""

    def __init__(self, kernel: Kernel, a: Tensor, b: Tensor, scalars: Tensor) -> None:
        self.kernel, self.a, self.b = kernel, a, b
        self.rows_a, self.rows_b = a.mT.contiguous(), b.mT.contiguous()
        self.scalars = kernel.named(scalars)
        if kernel.learnable_coefficients:
            names = [f"coefficient_{p}" for p in range(kernel.pieces)]
            self.coefficients = [self.scalars[name] for name in names]
        else:
            fixed = _fixed_coefficients(kernel, a.dtype, a.device)
            self.coefficients = [c.expand(len(a), 1, 1) for c in fixed]
        self.grad_left: Tensor | None = None
        self.grad_right: Tensor | None = None
        self.grad_scalars = torch.zeros_like(scalars)

    @cached_property
    def squares(self) -> tuple[Tensor, Tensor]:
        """|a|² and |b|², (slices, P, 1, features)."""
        return (
            self.rows_a.square().sum(-2, keepdim=True),
            self.rows_b.square().sum(-2, keepdim=True),
        )

    @cached_property
    def left(self) -> Tensor:
        """(slices, P, r/P + 2, out), so that leftᵀ right is |b|² + |a|² − 2 b·a."""
        squares = self.squares[1]
        return torch.cat([self.rows_b, squares, torch.ones_like(squares)], -2)

    @cached_property
    def right(self) -> Tensor:
        """(slices, P, r/P + 2, in); see ``left``."""
        squares = self.squares[0]
        return torch.cat([self.rows_a * -2, torch.ones_like(squares), squares], -2)

    @cached_property
    def largest(self) -> Tensor:
        """The largest |a|² plus the largest |b|², (slices, P, 1, 1)."""
        squares_a, squares_b = self.squares
        return squares_a.amax(-1, keepdim=True) + squares_b.amax(-1, keepdim=True)

    @cached_property
    def floor(self) -> Tensor:
        """(slices, P, 1, 1); below it a squared distance is rounding noise of the product that
        forms it, and a true 0 may not divide."""
        limits = torch.finfo(self.largest.dtype)
        return self.largest * limits.eps + limits.tiny

    @cached_property
    def needs_shift(self) -> bool:
        """Whether exp(D/τ) could overflow; a device is not asked, to avoid a wait."""
        if self.largest.device.type != "cpu":
            return True
        coefficient = max(max(map(abs, c.flatten().tolist())) for c in self.coefficients)
        reach = self.kernel.pieces * coefficient * math.sqrt(2 * float(self.largest.max()))
        temperatures = [1.0]
        if self.kernel.temperature:
            temperatures = self.scalars["temperature"].flatten().abs().tolist()
        return not reach < 60 * min(temperatures)

    def spans(self) -> Iterator[Span]:
        """The tiles that make up the layer."""
        slices, _, inputs, _ = self.a.shape
        outputs = self.b.shape[2]
        if self.a.device.type != "cpu" or slices * outputs * inputs <= CPU_TILE:
            yield Span(slice(0, slices), slice(0, inputs), inputs)
            return
        parts = math.ceil(outputs * inputs / CPU_TILE)
        width = 16 * math.ceil(inputs / parts / 16)
        for s in range(slices):
            for start in range(0, inputs, width):
                columns = slice(start, min(start + width, inputs))
                yield Span(slice(s, s + 1), columns, inputs)

    def squared_distances(self, span: Span, scratch: Scratch) -> Tensor:
        """d_p² over a span, (slices, P, out, some in), up to rounding (see ``floor``)."""
        left, right = self.left[span.slices], self.right[span.slices, :, :, span.columns]
        slices, pieces, _, outputs = left.shape
        squares = scratch.take("distances", slices, pieces, outputs, span.width)
        with full_precision():
            torch.bmm(left.flatten(0, 1).mT, right.flatten(0, 1), out=squares.flatten(0, 1))
        return squares

    def tile(self, span: Span, scratch: Scratch, out: Tensor | None = None) -> Tile:
        """Evaluate the merged matrices over a span, into ``out`` if given."""
        distances = self.squared_distances(span, scratch)
        distances.clamp_min_(self.floor[span.slices]).sqrt_()
        slices, pieces, outputs, _ = distances.shape
        mixed = self.kernel.name == "mix-k"
        shape = slices, outputs, span.width
        linear = scratch.take("linear", *shape) if mixed or out is None else out
        torch.mul(distances[:, 0], self.coefficients[0][span.slices], out=linear)
        for p in range(1, pieces):
            linear.addcmul_(distances[:, p], self.coefficients[p][span.slices])
        tile = Tile(linear, linear, distances)
        if mixed:
            self._add_softmax(span, tile, scratch, out)
        return tile

    def _add_softmax(self, span: Span, tile: Tile, scratch: Scratch, out: Tensor | None) -> None:
        linear = tile.linear
        assert linear is not None
        exponential = scratch.take("exponential", *linear.shape)
        logits = linear
        if self.kernel.temperature:
            logits = torch.div(linear, self.scalars["temperature"][span.slices], out=exponential)
        if self.needs_shift:
            logits = torch.sub(logits, logits.amax(-2, keepdim=True), out=exponential)
        torch.exp(logits, out=exponential)
        tile.exponential = exponential
        tile.normaliser = exponential.sum(-2, keepdim=True).reciprocal_()
        weight = tile.normaliser * self.scalars["scale"][span.slices]
        merged = scratch.take("merged", *linear.shape) if out is None else out
        # The offset stays inside D from here on; sums over logits do not see it.
        linear.add_(self.scalars["offset"][span.slices])
        tile.merged = torch.addcmul(linear, exponential, weight, out=merged)

    def backward(self, span: Span, tile: Tile, grad: Tensor) -> None:
        """Add the tile's share to the gradients; ``grad`` (∂L/∂merged) and tile are used up."""
        if self.kernel.name == "mix-k":
            self._softmax_backward(span, tile, grad)
        assert tile.distances is not None
        self.add_ratio(span, torch.div(grad.unsqueeze(1), tile.distances, out=tile.distances))

    def add_ratio(self, span: Span, ratio: Tensor) -> None:
        """Contract ∂L/∂D / d_p, (slices, pieces, out, some in), with A and B."""
        if self.grad_left is None or self.grad_right is None:
            self.grad_left = torch.zeros_like(self.left)
            self.grad_right = torch.zeros_like(self.right)
        left, right = self.left[span.slices], self.right[span.slices]
        along_columns = self.grad_right[span.slices, :, :, span.columns]
        with full_precision():
            along_columns.copy_(left @ ratio)
            self.grad_left[span.slices] += right[..., span.columns] @ ratio.mT

    def _softmax_backward(self, span: Span, tile: Tile, grad: Tensor) -> None:
        """Turn ∂L/∂merged into ∂L/∂D in place, and collect the scalars' gradients."""
        linear, exponential, normaliser = tile.linear, tile.exponential, tile.normaliser
        assert linear is not None and exponential is not None and normaliser is not None
        self.add_scalar(span, "offset", grad.sum((1, 2)))
        logit = torch.mul(grad, exponential, out=tile.merged)
        mean = logit.sum(-2, keepdim=True).mul_(normaliser)
        self.add_scalar(span, "scale", mean.sum((1, 2)))
        logit.addcmul_(exponential, mean, value=-1)
        weight = normaliser * self.scalars["scale"][span.slices]
        if self.kernel.temperature:
            temperature = self.scalars["temperature"][span.slices]
            weight = weight / temperature
            moment = torch.mul(logit, linear, out=exponential).sum(-2, keepdim=True)
            share = (moment * weight).sum((1, 2)) / temperature[:, 0, 0]
            self.add_scalar(span, "temperature", -share)
        grad.addcmul_(logit, weight)

    def add_scalar(self, span: Span, name: str, value: Tensor) -> None:
        """Add to the gradient of one scalar of every slice of the span."""
        self.grad_scalars[span.slices, self.kernel.scalar_index[name]] += value

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of A, B and the scalars, once every tile has gone backward."""
        if self.grad_left is None or self.grad_right is None:
            return torch.zeros_like(self.a), torch.zeros_like(self.b), self.grad_scalars
        h = self.kernel.coordinates
        # With R short of c_p, along_a: Σ_o R b, Σ_o R |b|², Σ_o R; along_b: −2 Σ_i R a, Σ_i R, …
        along_a, along_b = self.grad_right.mT, self.grad_left.mT
        grad_a = self.a * along_a[..., h + 1 :] - along_a[..., :h]
        if self.kernel.learnable_coefficients:
            # Σ ∂L/∂D d = Σ R d², and d² = |a|² + |b|² − 2 a·b.
            moment = grad_a * self.a - self.a * along_a[..., :h]
            total = moment.sum((2, 3)) + along_a[..., h].sum(2)
            first = self.kernel.scalar_index["coefficient_0"]
            self.grad_scalars[:, first : first + self.kernel.pieces] = total
        coefficients = torch.stack(self.coefficients, 1)
        grad_b = self.b * along_b[..., h : h + 1] + along_b[..., :h] / 2
        return grad_a * coefficients, grad_b * coefficients, self.grad_scalars


class AutogradTiles:
    """Any kernel, one slice at a time; backward recomputes ``equations.kernels.merge``."""

    def __init__(self, kernel: Kernel, a: Tensor, b: Tensor, scalars: Tensor) -> None:
        self.kernel = kernel
        self.leaves = [leaf.detach() for leaf in (a, b, scalars)]
        self.grads = [torch.zeros_like(leaf) for leaf in self.leaves]

    def spans(self) -> Iterator[Span]:
        """One tile per slice."""
        slices, _, inputs, _ = self.leaves[0].shape
        return (Span(slice(s, s + 1), slice(0, inputs), inputs) for s in range(slices))

    def tile(self, span: Span, scratch: Scratch, out: Tensor | None = None) -> Tile:
        """Evaluate one slice under autograd, into ``out`` too if given."""
        with torch.enable_grad():
            leaves = [leaf[span.slices].clone().requires_grad_() for leaf in self.leaves]
            graph = merge(self.kernel, *leaves)
        merged = graph.detach() if out is None else out.copy_(graph.detach())
        return Tile(merged, linear=graph, leaves=leaves)

    def backward(self, span: Span, tile: Tile, grad: Tensor) -> None:
        """Add the slice's gradients."""
        used = [leaf for leaf in tile.leaves if leaf.numel()]
        assert tile.linear is not None
        for total, value in zip(
            self.grads, torch.autograd.grad(tile.linear, used, grad), strict=False
        ):
            total[span.slices] += value

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of A, B and the scalars."""
        return self.grads[0], self.grads[1], self.grads[2]


Tiles = PiecewiseTiles | AutogradTiles


def tiles(kernel: Kernel, a: Tensor, b: Tensor, scalars: Tensor) -> Tiles:
    """The evaluator for this kernel; it keeps only the low-rank matrices."""
    kind = PiecewiseTiles if kernel.is_piecewise else AutogradTiles
    return kind(kernel, a, b, scalars)
