"""Merged matrices evaluated and differentiated tile by tile, so that they need not be stored.

A tile is all output features times some input features, so that the softmax over outputs is local.
For D = Σ_p c_p d_p with d_p = ‖A_p,i − B_p,o‖ the squared distances are one small matrix product, and so
is the way back: with R = c_p ∂L/∂D / d_p,

    ∂L/∂A_i = A_i Σ_o R_oi − Σ_o R_oi B_o,    ∂L/∂B_o = B_o Σ_i R_oi − Σ_i R_oi A_i.

``snella.kernels.merge`` is the readable definition, and the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from snella.kernels import Kernel, merge

# Elements per tile: a handful of such buffers stays in a CPU's cache. Accelerators take whole slices.
CPU_TILE = 192 * 1024


class Scratch:
    """Buffers reused from tile to tile; with ``keep`` every request gets memory of its own."""

    def __init__(self, like: Tensor, keep: bool = False) -> None:
        self.like, self.keep = like, keep
        self.flat: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """An uninitialised (rows, columns) matrix."""
        size = rows * columns
        if self.keep:
            return self.like.new_empty(rows, columns)
        buffer = self.flat.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.flat[name] = self.like.new_empty(size)
        return buffer[:size].view(rows, columns)


class PiecewiseTiles:
    """piecewise-linear and mix-k. Shapes as in ``snella.kernels.merge``; tensors need no gradient."""

    def __init__(self, kernel: Kernel, a: Tensor, b: Tensor, scalars: Tensor) -> None:
        self.kernel, self.a, self.b = kernel, a, b
        squares_a = a.square().sum(-1, keepdim=True)
        squares_b = b.square().sum(-1, keepdim=True)
        # Left and right factors whose product is |b|² + |a|² − 2 b·a.
        self.left = torch.cat([b, squares_b, torch.ones_like(squares_b)], -1)
        self.right = torch.cat([a * -2, torch.ones_like(squares_a), squares_a], -1)
        largest = squares_a.amax((2, 3)) + squares_b.amax((2, 3))
        # Below this a squared distance is rounding noise of the product; a true 0 may not divide.
        limits = torch.finfo(a.dtype)
        self.floor = largest * limits.eps + limits.tiny
        self.scalars = dict(zip(kernel.scalars, scalars.unbind(1), strict=True))
        for p, fixed in enumerate(kernel.coefficients):
            self.scalars.setdefault(f"coefficient_{p}", scalars.new_full((len(a),), fixed))
        self.needs_shift = self._exponential_overflows(largest)
        self.grad_left = torch.zeros_like(self.left.mT)
        self.grad_right = torch.zeros_like(self.right.mT)
        self.grad_scalars = torch.zeros_like(scalars)

    def _exponential_overflows(self, largest: Tensor) -> bool:
        """Whether exp(D/τ) needs its maximum subtracted; accelerators are not asked, to avoid a wait."""
        if self.kernel.name != "mix-k" or largest.device.type != "cpu":
            return True
        bound = torch.zeros_like(largest[:, 0])
        for p in range(self.kernel.pieces):
            bound += self.scalars[f"coefficient_{p}"].abs() * (2 * largest[:, p]).sqrt()
        if self.kernel.temperature:
            bound = bound / self.scalars["temperature"].abs()
        return not bool((bound < 60).all())

    def columns(self, s: int) -> Iterator[slice]:
        """Input features of the tiles of slice ``s``."""
        outputs, inputs = self.b.shape[2], self.a.shape[2]
        width = inputs
        if self.a.device.type == "cpu":
            width = max(16, CPU_TILE // outputs // 16 * 16)
        return (slice(i, min(i + width, inputs)) for i in range(0, inputs, width))

    def tile(self, s: int, columns: slice, scratch: Scratch) -> dict[str, Any]:
        """Evaluate ``merged`` and what its gradient needs, for the given input features."""
        right = self.right[s, :, columns]
        rows, width = self.b.shape[2], right.shape[1]
        distances = []
        for p in range(self.kernel.pieces):
            d = scratch.take(f"distance_{p}", rows, width)
            torch.mm(self.left[s, p], right[p].mT, out=d)
            distances.append(d.clamp_min_(self.floor[s, p]).sqrt_())
        linear = scratch.take("linear", rows, width)
        torch.mul(distances[0], self.scalars["coefficient_0"][s], out=linear)
        for p in range(1, self.kernel.pieces):
            linear.addcmul_(distances[p], self.scalars[f"coefficient_{p}"][s])
        tile = {"distances": distances, "linear": linear, "merged": linear}
        if self.kernel.name == "mix-k":
            self._add_softmax(s, tile, scratch)
        return tile

    def _add_softmax(self, s: int, tile: dict[str, Any], scratch: Scratch) -> None:
        linear = tile["linear"]
        exponential = scratch.take("exponential", *linear.shape)
        if self.kernel.temperature:
            torch.div(linear, self.scalars["temperature"][s], out=exponential)
        else:
            exponential.copy_(linear)
        if self.needs_shift:
            exponential.sub_(exponential.amax(0))
        normaliser = exponential.exp_().sum(0).reciprocal_()
        merged = scratch.take("merged", *linear.shape)
        torch.addcmul(linear, exponential, normaliser * self.scalars["scale"][s], out=merged)
        merged.add_(self.scalars["offset"][s])
        tile |= {"exponential": exponential, "normaliser": normaliser, "merged": merged}

    def backward(self, s: int, columns: slice, tile: dict[str, Any], grad: Tensor) -> None:
        """Add the tile's share to the gradients; ``grad`` (∂L/∂merged) is overwritten, so is the tile."""
        if self.kernel.name == "mix-k":
            self._softmax_backward(s, tile, grad)
        left, right = self.left[s].mT, self.right[s, :, columns].mT
        learnable = self.kernel.learnable_coefficients
        for p, distance in enumerate(tile["distances"]):
            if learnable:
                self._add_scalar(s, f"coefficient_{p}", torch.dot(grad.view(-1), distance.view(-1)))
            ratio = torch.div(grad, distance, out=distance)
            ratio.mul_(self.scalars[f"coefficient_{p}"][s])
            torch.mm(left[p], ratio, out=self.grad_right[s, p, :, columns])
            self.grad_left[s, p].addmm_(right[p], ratio.mT)

    def _softmax_backward(self, s: int, tile: dict[str, Any], grad: Tensor) -> None:
        """Turn ∂L/∂merged into ∂L/∂D in place, and collect the scalars' gradients."""
        exponential, normaliser = tile["exponential"], tile["normaliser"]
        self._add_scalar(s, "offset", grad.sum())
        logit = torch.mul(grad, exponential, out=tile["merged"])
        mean = logit.sum(0).mul_(normaliser)
        self._add_scalar(s, "scale", mean.sum())
        logit.addcmul_(exponential, mean, value=-1)
        weight = normaliser * self.scalars["scale"][s]
        if self.kernel.temperature:
            temperature = self.scalars["temperature"][s]
            weight = weight / temperature
            # Σ over outputs of ∂L/∂logit is 0, so the kernel's offset in D does not matter.
            moment = torch.mul(logit, tile["linear"], out=exponential).sum(0)
            self._add_scalar(s, "temperature", -(moment @ weight) / temperature)
        grad.addcmul_(logit, weight)

    def _add_scalar(self, s: int, name: str, value: Tensor) -> None:
        index = list(self.kernel.scalars).index(name)
        self.grad_scalars[s, index] += value

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of A, B and the scalars, once every tile has gone backward."""
        h = self.kernel.coordinates
        # Rows of grad_right: Σ_o R b, Σ_o R |b|², Σ_o R; of grad_left: −2 Σ_i R a, Σ_i R, Σ_i R |a|².
        along_a, along_b = self.grad_right.mT, self.grad_left.mT
        grad_a = self.a * along_a[..., h + 1 :] - along_a[..., :h]
        grad_b = self.b * along_b[..., h : h + 1] + along_b[..., :h] / 2
        return grad_a, grad_b, self.grad_scalars


class AutogradTiles:
    """Any kernel, one slice at a time, differentiated by recomputing ``snella.kernels.merge``."""

    def __init__(self, kernel: Kernel, a: Tensor, b: Tensor, scalars: Tensor) -> None:
        self.kernel = kernel
        self.leaves = [leaf.detach() for leaf in (a, b, scalars)]
        self.grads = [torch.zeros_like(leaf) for leaf in self.leaves]

    def columns(self, s: int) -> Iterator[slice]:
        """One tile: the whole slice."""
        return iter((slice(0, self.leaves[0].shape[2]),))

    def tile(self, s: int, columns: slice, scratch: Scratch) -> dict[str, Any]:
        """Evaluate one slice under autograd."""
        with torch.enable_grad():
            leaves = [leaf[s : s + 1].clone().requires_grad_() for leaf in self.leaves]
            merged = merge(self.kernel, *leaves)[0]
        return {"leaves": leaves, "graph": merged, "merged": merged.detach()}

    def backward(self, s: int, columns: slice, tile: dict[str, Any], grad: Tensor) -> None:
        """Add the slice's gradients."""
        used = [leaf for leaf in tile["leaves"] if leaf.numel()]
        grads = torch.autograd.grad(tile["graph"], used, grad)
        for total, value in zip(self.grads, grads, strict=False):
            total[s] += value[0]

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of A, B and the scalars."""
        return self.grads[0], self.grads[1], self.grads[2]


Tiles = PiecewiseTiles | AutogradTiles


def tiles(kernel: Kernel, a: Tensor, b: Tensor, scalars: Tensor) -> Tiles:
    """The evaluator for this kernel; it keeps only the low-rank matrices."""
    return (PiecewiseTiles if kernel.is_piecewise else AutogradTiles)(kernel, a, b, scalars)
