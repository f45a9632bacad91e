"""y = x (W + S)ᵀ + bias as one autograd operation that keeps x and the low-rank matrices only.

Forward merges, sparsifies and adds the frozen weight into one transient matrix. Backward evaluates
the same tiles again for ∂L/∂x, forms gᵀx once, and contracts it at once into the gradients of A, B
and the kernel's scalars.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from snella.kernels import Kernel
from snella.sparsify import NOTHING, Region, Selection, factors, select
from snella.tiles import CPU_TILE, Bounds, FreshMemory, Scratch, Span, Tile, Tiles, tiles


@dataclass(eq=False)
class Update:
    """What the operation must know of one adapter besides its tensors.

    budgets: entries to keep per slice. selections: found by the first forward after a change of the
    parameters, then reused. scale: factor on the update. keep: whether tiles are kept for backward.
    guesses: (threshold, margin) per slice from earlier steps, to find the next threshold faster.
    bounds: the evaluator's, which also hold until the parameters change.
    """

    kernel: Kernel
    form: str
    budgets: list[int]
    scale: float = 1.0
    keep: bool = False
    selections: list[Selection] | None = None
    guesses: dict[int, tuple[float, float]] = field(default_factory=dict)
    kept_tiles: list[tuple[Span, Tile]] | None = None
    bounds: Bounds | None = None

    def is_empty(self, span: Span) -> bool:
        """Whether nothing survives there, so that there is nothing to compute."""
        return self.form != "none" and not any(self.budgets[span.slices])

    def find(self, s: int, merged: Tensor, scratch: Scratch) -> Selection:
        """Select in slice ``s``, starting from where its threshold was."""
        guess, margin = self.guesses.get(s, (None, 0.0))
        buffer = scratch.take("magnitude", *merged.shape)
        selection = select(merged, self.budgets[s], guess, margin, buffer)
        if isinstance(selection.threshold, float):
            moved = abs(selection.threshold - guess) / (guess or 1.0) if guess else 0.02
            self.guesses[s] = (selection.threshold, min(max(4 * moved, 0.002), 0.2))
        return selection


def compute_type(parameter: Tensor) -> torch.dtype:
    """Merged matrices are evaluated in double precision for double parameters, else in single."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _evaluator(update: Update, a: Tensor, b: Tensor, scalars: Tensor) -> Tiles:
    dtype = compute_type(a)
    scalars = scalars.view(a.shape[0], -1)
    a, b, scalars = (t.detach().to(dtype) for t in (a, b, scalars))
    evaluator = tiles(update.kernel, a, b, scalars, update.bounds)
    update.bounds = evaluator.bounds
    return evaluator


@torch.compiler.disable
def effective_weight(
    update: Update,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """W + S, shape (out, in), or S alone without a weight; not differentiable.

    In the evaluation precision (see ``compute_type``), so that a small update survives the sum.
    """
    evaluator = _evaluator(update, a, b, scalars)
    shape = a.shape[0], b.shape[2], a.shape[2]
    scratch = Scratch.like(a, compute_type(a))
    if out is None:
        out = a.new_empty(shape[0] * shape[1], shape[2], dtype=scratch.dtype)
    blocks = out.view(shape)
    kept = []
    for span in evaluator.spans():
        part = blocks[span.slices, :, span.columns]
        if update.keep:
            tile = evaluator.tile(span, FreshMemory(a.device, scratch.dtype))
            part.copy_(tile.merged)
            kept.append((span, tile))
        elif not update.is_empty(span):
            evaluator.tile(span, scratch, out=part)
    bases = [None] * shape[0] if weight is None else list(weight.view(shape).unbind())
    known, update.selections = update.selections, []
    for s, (block, base) in enumerate(zip(blocks.unbind(), bases, strict=True)):
        if update.budgets[s] == 0 and update.form != "none":
            block.zero_() if base is None else block.copy_(base)
            update.selections.append(NOTHING)
            continue
        if update.form != "none":
            update.selections.append(known[s] if known else update.find(s, block, scratch))
        _sparsify_and_add(update, s, block, base, scratch)
    if update.keep:
        update.kept_tiles = kept
    return out


def _sparsify_and_add(
    update: Update, s: int, block: Tensor, base: Tensor | None, scratch: Scratch
) -> None:
    """Turn a slice's merged matrix into base + scale · S, in place, some rows at a time."""
    rows, inputs = block.shape
    height = max(1, CPU_TILE // inputs) if block.device.type == "cpu" else rows
    for start in range(0, rows, height):
        span = slice(start, min(start + height, rows))
        part = block[span]
        amount = None
        if update.form != "none":
            assert update.selections is not None
            buffer = scratch.take("amount", *part.shape)
            region = Region(span, slice(0, inputs), inputs)
            selection = update.selections[s]
            amount, _ = factors(part, selection, update.form, buffer, region=region)
        _combine(part, amount, None if base is None else base[span], update.scale, part)


def _combine(
    merged: Tensor, amount: Tensor | None, base: Tensor | None, scale: float, out: Tensor
) -> None:
    """out = base + scale · amount · merged, where a missing base is 0 and a missing amount 1."""
    if amount is not None and base is not None and scale == 1:
        torch.addcmul(base, merged, amount, out=out)
        return
    torch.mul(merged, scale if amount is None else amount, out=out)
    if amount is not None and scale != 1:
        out.mul_(scale)
    if base is not None:
        out.add_(base)


def _contract(
    update: Update,
    dense: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    needs_effective: bool,
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """W + S again (if needed), and ∂L/∂(W + S) contracted into gradients of A, B and scalars."""
    evaluator = _evaluator(update, a, b, scalars)
    shape = a.shape[0], b.shape[2], a.shape[2]
    scratch = Scratch.like(a, compute_type(a))
    dense = dense.reshape(shape)
    effective = scratch.take("effective", *shape) if needs_effective else None
    base = None if weight is None else weight.view(shape)
    stored: Iterable[tuple[Span, Tile | None]] | None = update.kept_tiles
    for span, tile in stored or ((span, None) for span in evaluator.spans()):
        where = span.slices, slice(None), span.columns
        if update.is_empty(span):
            if effective is not None:
                part = effective[where]
                part.zero_() if base is None else part.copy_(base[where])
            continue
        if tile is None:
            tile = evaluator.tile(span, scratch)
        grad = scratch.take("grad", *tile.merged.shape)
        amount = _through_sparsify(update, span, tile.merged, dense[where], grad, shape[2])
        if effective is not None:
            part_base = None if base is None else base[where]
            _combine(tile.merged, amount, part_base, update.scale, effective[where])
        evaluator.backward(span, tile, grad)
    update.kept_tiles = None
    flat = None if effective is None else effective.view(-1, shape[2])
    return flat, evaluator.gradients()


def _through_sparsify(
    update: Update, span: Span, merged: Tensor, dense: Tensor, grad: Tensor, row_length: int
) -> Tensor | None:
    """Write ∂L/∂merged to ``grad``, from ∂L/∂S; return S / merged (None for 1)."""
    if update.form == "none":
        torch.mul(dense, update.scale, out=grad)
        return None
    assert update.selections is not None
    scratch = Scratch.like(grad, grad.dtype)
    amounts = scratch.take("amount", *grad.shape)
    slopes = scratch.take("slope", *grad.shape)
    region = Region(slice(0, merged.shape[1]), span.columns, row_length)
    for i, selection in enumerate(update.selections[span.slices]):
        _, slope = factors(merged[i], selection, update.form, amounts[i], slopes[i], region)
        assert slope is not None
        torch.mul(dense[i], slope, out=grad[i])
    if update.scale != 1:
        grad.mul_(update.scale)
    return amounts


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scalars: Tensor,
        update: Update,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scratch = Scratch.like(a, compute_type(a))
            out = scratch.take("effective", a.shape[0] * b.shape[2], a.shape[2])
            effective = effective_weight(update, weight, a, b, scalars, out).to(x.dtype)
            ctx.save_for_backward(x, weight, a, b, scalars)
            ctx.update = update
            return F.linear(x, effective, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, scalars = ctx.saved_tensors
        update: Update = ctx.update
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(x.device.type, enabled=False):
            flat = grad.reshape(-1, grad.shape[-1])
            buffer = Scratch.like(flat, flat.dtype).take("dense", flat.shape[-1], x.shape[-1])
            dense = torch.mm(flat.mT, x.reshape(-1, x.shape[-1]), out=buffer)
            grad_weight = dense.clone() if needs_weight else None
            effective, (grad_a, grad_b, grad_scalars) = _contract(
                update, dense, weight, a, b, scalars, needs_effective=needs_x
            )
            grad_x = None if effective is None else grad @ effective.to(grad.dtype)
            grad_bias = flat.sum(0) if needs_bias else None
        return (
            grad_x,
            grad_weight,
            grad_bias,
            grad_a.to(a.dtype),
            grad_b.to(b.dtype),
            grad_scalars.reshape_as(scalars).to(scalars.dtype),
            None,
        )


class _MergedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        scalars: Tensor,
        update: Update,
    ) -> Tensor:
        ctx.save_for_backward(weight, a, b, scalars)
        ctx.update = update
        with torch.autocast(a.device.type, enabled=False):
            effective = effective_weight(update, weight, a, b, scalars)
        return effective.to((a if weight is None else weight).dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, scalars = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            _, grads = _contract(ctx.update, grad, weight, a, b, scalars, needs_effective=False)
        return (
            grad if ctx.needs_input_grad[0] else None,
            grads[0].to(a.dtype),
            grads[1].to(b.dtype),
            grads[2].reshape_as(scalars).to(scalars.dtype),
            None,
        )


@torch.compiler.disable
def merged_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    update: Update,
) -> Tensor:
    """x (W + S)ᵀ + bias, or x Sᵀ without a weight, with gradients for x, A, B and the scalars.

    x: (..., in); weight: (out, in); a: (slices, P, in, r/P); b: (slices, P, out/slices, r/P);
    scalars: (slices · K,). Under autocast the product runs in its type, the merge does not.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return _MergedLinear.apply(x, weight, bias, a, b, scalars, update)


@torch.compiler.disable
def merged_weight(
    weight: Tensor | None, a: Tensor, b: Tensor, scalars: Tensor, update: Update
) -> Tensor:
    """W + S, or S without a weight, with gradients; for code that wants the matrix itself."""
    return _MergedWeight.apply(weight, a, b, scalars, update)
