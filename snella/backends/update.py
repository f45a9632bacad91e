"""The update of one layer as a whole: W + S from A, B and scalars, and the way back to them.

Forward merges, sparsifies and adds the frozen weight into one transient matrix. Backward evaluates
the same tiles again for ∂L/∂x, and contracts the dense gradient of the layer, gᵀx, at once into the
gradients of A, B and the kernel's scalars.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snella.backends import cpu, gpu
from snella.backends.scratch import FreshMemory, Scratch
from snella.backends.tiles import CPU_TILE, Span, Tile, Tiles, tiles
from snella.equations.kernels import Kernel
from snella.equations.sparsify import Region, Selection, factors, select, select_all_or_nothing


@dataclass(eq=False)
class Update:
    """What the operation must know of one adapter besides its tensors.

    budgets: entries to keep per slice. selections: found by the first forward after a change of the
    parameters, then reused. scale: factor on the update. keep: whether tiles are kept for backward.
    compile: whether the elementwise part runs as compiled loops; None where they are known to pay.
    constants: the evaluator's or the loops', which also hold until the parameters change.
    """

    kernel: Kernel
    form: str
    budgets: list[int]
    scale: float = 1.0
    keep: bool = False
    compile: bool | None = None
    selections: list[Selection] | None = None
    kept_tiles: list[tuple[Span, Tile]] | None = None
    constants: Any = None

    def find(self, s: int, merged: Tensor, scratch: Scratch) -> Selection:
        """Select in slice ``s``."""
        if not self.budgets[s]:
            return select_all_or_nothing(False, merged)
        return select(merged, self.budgets[s], scratch.take("magnitude", *merged.shape))

    def is_empty(self, span: Span) -> bool:
        """Whether nothing survives there, so that there is nothing to compute."""
        return self.form != "none" and not any(self.budgets[span.slices])


def _on_cpu(update: Update, a: Tensor) -> bool:
    """Whether the compiled loops serve here."""
    return update.compile is not False and not update.keep and cpu.usable(update, a)


def _on_gpu(update: Update, a: Tensor) -> bool:
    """Whether the Triton kernels serve here: only if asked for, until a GPU has measured them."""
    return bool(update.compile) and not update.keep and gpu.usable(update, a)


def compute_type(parameter: Tensor) -> torch.dtype:
    """Merged matrices are evaluated in double precision for double parameters, else in single."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _evaluator(update: Update, a: Tensor, b: Tensor, scalars: Tensor) -> Tiles:
    dtype = compute_type(a)
    scalars = scalars.view(a.shape[0], -1)
    a, b, scalars = (t.detach().to(dtype) for t in (a, b, scalars))
    evaluator = tiles(update.kernel, a, b, scalars, update.constants)
    update.constants = evaluator.constants
    return evaluator


def effective_weight(
    update: Update,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    dtype: torch.dtype | None = None,
    transient: bool = False,
    keep: bool = False,
) -> Tensor:
    """W + S, shape (out, in), or S alone without a weight; not differentiable.

    In the evaluation precision (see ``compute_type``), so that a small update survives the sum; or
    in ``dtype``, rounded once. transient: it may lie in memory that the next call uses again.
    keep: leave the tiles in ``update.kept_tiles`` for ``contract``.
    """
    exact = compute_type(a)
    if _on_gpu(update, a):
        try:
            return gpu.effective_weight(update, weight, a, b, scalars, dtype or exact)
        except gpu.Broken:
            update.constants = update.selections = None
    shape = a.shape[0], b.shape[2], a.shape[2]
    scratch = Scratch.like(a, exact)
    memory = scratch if transient else FreshMemory(a.device, exact)
    out = memory.take("effective", shape[0] * shape[1], shape[2])
    if _on_cpu(update, a):
        cpu.effective_weight(update, weight, a, b, scalars, out)
        return out.to(dtype or exact)
    evaluator = _evaluator(update, a, b, scalars)
    blocks = out.view(shape)
    if keep:
        update.kept_tiles = _merge_and_keep(evaluator, blocks)
    else:
        _merge(update, evaluator, blocks, scratch)
    if update.form != "none" and update.selections is None:
        update.selections = [
            update.find(s, block, scratch) for s, block in enumerate(blocks.unbind())
        ]
    _finish(update, blocks, None if weight is None else weight.reshape(shape), scratch)
    return out.to(dtype or exact)


def _merge(update: Update, evaluator: Tiles, out: Tensor, scratch: Scratch) -> None:
    """Write the merged matrices (slices, out, in), except for slices of which nothing survives."""
    for span in evaluator.spans():
        part = out[span.slices, :, span.columns]
        if update.is_empty(span):
            part.zero_()
        else:
            evaluator.tile(span, scratch, out=part)


def _merge_and_keep(evaluator: Tiles, out: Tensor) -> list[tuple[Span, Tile]]:
    """Write the merged matrices, and return the tiles they are made of."""
    kept = []
    for span in evaluator.spans():
        tile = evaluator.tile(span, FreshMemory(out.device, out.dtype))
        out[span.slices, :, span.columns] = tile.merged
        kept.append((span, tile))
    return kept


def _finish(update: Update, blocks: Tensor, base: Tensor | None, scratch: Scratch) -> None:
    """Turn merged matrices (slices, out, in) into base + scale · S, in place."""
    for s, block in enumerate(blocks.unbind()):
        part = None if base is None else base[s]
        if update.form == "none" or update.budgets[s]:
            _sparsify_and_add(update, s, block, part, scratch)
        elif part is None:
            block.zero_()
        else:
            block.copy_(part)


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


def contract(
    update: Update,
    dense: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    needs_effective: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """W + S again (if needed), and ∂L/∂(W + S) contracted into gradients of A, B and scalars.

    W + S is transient, and in ``dtype``; see ``effective_weight``.
    """
    exact = compute_type(a)
    if _on_gpu(update, a):
        try:
            tensors = weight, a, b, scalars
            return gpu.contract(update, dense, *tensors, needs_effective, dtype or exact)
        except gpu.Broken:
            update.constants = update.selections = None
            effective_weight(update, weight, a, b, scalars)  # thresholds of the tiles' rounding
    shape = a.shape[0], b.shape[2], a.shape[2]
    scratch = Scratch.like(a, exact)
    effective = scratch.take("effective", *shape) if needs_effective else None
    if _on_cpu(update, a):
        grads = cpu.contract(update, dense, weight, a, b, scalars, effective)
    else:
        base = None if weight is None else weight.reshape(shape)
        grads = _contract(update, (a, b, scalars), (dense.reshape(shape), base, effective), scratch)
    if effective is None:
        return None, grads
    return effective.view(-1, shape[2]).to(dtype or exact), grads


def _contract(
    update: Update,
    factors: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, B and the scalars tile by tile; writes W + S.

    tensors: ∂L/∂S, the frozen weight if it is to be added, and where W + S is to be written.
    """
    evaluator = _evaluator(update, *factors)
    stored: Iterable[tuple[Span, Tile | None]] | None = update.kept_tiles
    for span, tile in stored or ((span, None) for span in evaluator.spans()):
        dense, base, out = (None if t is None else t[span.slices, :, span.columns] for t in tensors)
        assert dense is not None
        if not update.is_empty(span):
            _differentiate(update, evaluator, span, tile, (dense, base, out), scratch)
        elif out is not None:
            out.zero_() if base is None else out.copy_(base)
    update.kept_tiles = None
    return evaluator.gradients()


def _differentiate(
    update: Update,
    evaluator: Tiles,
    span: Span,
    tile: Tile | None,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    scratch: Scratch,
) -> None:
    """One tile's share; see ``_contract``."""
    dense, base, out = tensors
    tile = tile or evaluator.tile(span, scratch)
    grad, amount = _through_sparsify(update, span, tile.merged, dense, scratch)
    if out is not None:
        _combine(tile.merged, amount, base, update.scale, out)
    evaluator.backward(span, tile, grad)


def _through_sparsify(
    update: Update, span: Span, merged: Tensor, dense: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """(∂L/∂merged, S / merged) of a tile from ∂L/∂S; the second is None where it is 1."""
    grad = scratch.take("grad", *merged.shape)
    if update.form == "none":
        return torch.mul(dense, update.scale, out=grad), None
    assert update.selections is not None
    amounts = scratch.take("amount", *merged.shape)
    region = Region(slice(0, merged.shape[1]), span.columns, span.row_length)
    for i, selection in enumerate(update.selections[span.slices]):
        _, slope = factors(merged[i], selection, update.form, amounts[i], grad[i], region)
        assert slope is not None
        torch.mul(dense[i], slope, out=grad[i])
    if update.scale != 1:
        grad.mul_(update.scale)
    return grad, amounts
