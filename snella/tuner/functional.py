"""y = x (W + S)ᵀ + bias as one autograd operation that keeps x and the low-rank matrices only.

Forward merges, sparsifies and adds the frozen weight into one transient matrix. Backward evaluates the
same tiles again for ∂L/∂x, forms gᵀx once, and contracts it at once into the gradients of A, B and the
kernel's scalars.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from snella.kernels import Kernel
from snella.sparsify import Selection, factors, flat_index, select
from snella.tiles import Scratch, Tiles, tiles


@dataclass(eq=False)
class Update:
    """What the operation must know of one adapter besides its tensors.

    budgets: entries to keep per slice. selections: found by the first forward after a change of the
    parameters, then reused. scale: factor on the update. keep: whether tiles are kept for backward.
    guesses: (threshold, margin) per slice from earlier steps, to find the next threshold faster.
    """

    kernel: Kernel
    form: str
    budgets: list[int]
    scale: float = 1.0
    keep: bool = False
    selections: list[Selection] | None = None
    guesses: dict[int, tuple[float, float]] = field(default_factory=dict)
    kept_tiles: list[list[tuple[slice, dict[str, Any]]]] | None = None

    def find(self, s: int, merged: Tensor) -> Selection:
        """Select in slice ``s``, starting from where its threshold was."""
        guess, margin = self.guesses.get(s, (None, 0.0))
        selection = select(merged, self.budgets[s], guess, margin)
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
    return tiles(update.kernel, *(t.detach().to(dtype) for t in (a, b, scalars)))


def effective_weight(
    update: Update, weight: Tensor | None, a: Tensor, b: Tensor, scalars: Tensor
) -> Tensor:
    """W + S, shape (out, in), or S alone without a weight; not differentiable.

    In the evaluation precision (see ``compute_type``), so that a small update survives the sum.
    """
    evaluator = _evaluator(update, a, b, scalars)
    slices, rows, inputs = a.shape[0], b.shape[2], a.shape[2]
    result = a.new_empty(slices * rows, inputs, dtype=compute_type(a))
    scratch = Scratch(result, keep=update.keep)
    found, kept = [], []
    for s in range(slices):
        block = result[s * rows : (s + 1) * rows]
        base = None if weight is None else weight[s * rows : (s + 1) * rows]
        if update.budgets[s] == 0 and update.form != "none":
            block.zero_() if base is None else block.copy_(base)
            found.append(Selection(float("inf"), 0))
            kept.append([])
            continue
        tiles_of_slice = []
        for columns in evaluator.columns(s):
            tile = evaluator.tile(s, columns, scratch)
            block[:, columns] = tile["merged"]
            if update.keep:
                tiles_of_slice.append((columns, tile))
        kept.append(tiles_of_slice)
        if update.form != "none":
            known = update.selections
            found.append(known[s] if known else update.find(s, block))
            block.mul_(factors(block, found[s], update.form)[0])
        if update.scale != 1:
            block.mul_(update.scale)
        if base is not None:
            block.add_(base)
    update.selections = found
    if update.keep:
        update.kept_tiles = kept
    return result


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
            effective = effective_weight(update, weight, a, b, scalars).to(x.dtype)
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
            dense = flat.mT @ x.reshape(-1, x.shape[-1])
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


def _contract(
    update: Update,
    dense: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    needs_effective: bool,
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """W + S again (if needed), and ∂L/∂(W + S) contracted into gradients of A, B and the scalars."""
    evaluator = _evaluator(update, a, b, scalars)
    rows, inputs = b.shape[2], a.shape[2]
    dtype = compute_type(a)
    effective = dense.new_empty(dense.shape, dtype=dtype) if needs_effective else None
    scratch = Scratch(dense.new_empty(0, dtype=dtype))
    for s in range(a.shape[0]):
        span = slice(s * rows, (s + 1) * rows)
        base = None if weight is None else weight[span]
        block = None if effective is None else effective[span]
        if update.budgets[s] == 0 and update.form != "none":
            if block is not None:
                block.zero_() if base is None else block.copy_(base)
            continue
        stored = update.kept_tiles[s] if update.kept_tiles else None
        spans = [columns for columns, _ in stored] if stored else evaluator.columns(s)
        for i, columns in enumerate(spans):
            tile = stored[i][1] if stored else evaluator.tile(s, columns, scratch)
            merged = tile["merged"]
            grad = scratch.take("grad", rows, columns.stop - columns.start)
            grad.copy_(dense[span, columns])
            amount = _sparsified(update, s, merged, columns, inputs, grad)
            if block is not None:
                torch.mul(merged, amount, out=block[:, columns])
                if base is not None:
                    block[:, columns].add_(base[:, columns])
            evaluator.backward(s, columns, tile, grad)
    update.kept_tiles = None
    return effective, evaluator.gradients()


def _sparsified(
    update: Update, s: int, merged: Tensor, columns: slice, inputs: int, grad: Tensor
) -> Tensor | float:
    """Take ``grad`` (∂L/∂S) back to ∂L/∂merged in place; return S / merged."""
    if update.scale != 1:
        grad.mul_(update.scale)
    if update.form == "none":
        return update.scale
    assert update.selections is not None
    selection = update.selections[s]
    index = None
    if isinstance(selection.cut, Tensor) or selection.cut:
        index = flat_index(merged.shape[0], columns, inputs, merged.device)
    amount, factor = factors(merged, selection, update.form, index)
    grad.mul_(factor)
    return amount if update.scale == 1 else amount * update.scale


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
    scalars: (slices · K,). Under autocast the product runs in the autocast type, the merge does not.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return _MergedLinear.apply(x, weight, bias, a, b, scalars, update)


def merged_weight(
    weight: Tensor | None, a: Tensor, b: Tensor, scalars: Tensor, update: Update
) -> Tensor:
    """W + S, or S without a weight, with gradients; for code that wants the matrix itself."""
    return _MergedWeight.apply(weight, a, b, scalars, update)
