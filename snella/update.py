"""The update of one layer as a whole: W + S from A, B and scalars, and the way back to them.

Forward merges, sparsifies and adds the frozen weight into one transient matrix. Backward evaluates
the same tiles again for ∂L/∂x, and contracts the dense gradient of the layer, gᵀx, at once into the
gradients of A, B and the kernel's scalars.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from snella import fused
from snella.kernels import Kernel
from snella.scratch import FreshMemory, Scratch
from snella.sparsify import Region, Selection, factors, select, select_all_or_nothing
from snella.tiles import CPU_TILE, Bounds, Span, Tile, Tiles, tiles


@dataclass(eq=False)
class Update:
    """What the operation must know of one adapter besides its tensors.

    budgets: entries to keep per slice. selections: found by the first forward after a change of the
    parameters, then reused. scale: factor on the update. keep: whether tiles are kept for backward.
    compile: whether the elementwise part of a tile is one compiled loop.
    bounds: the evaluator's, which also hold until the parameters change.
    """

    kernel: Kernel
    form: str
    budgets: list[int]
    scale: float = 1.0
    keep: bool = False
    compile: bool = False
    selections: list[Selection] | None = None
    kept_tiles: list[tuple[Span, Tile]] | None = None
    bounds: Bounds | None = None

    def find(self, s: int, merged: Tensor, scratch: Scratch) -> Selection:
        """Select in slice ``s``."""
        if not self.budgets[s]:
            return select_all_or_nothing(False, merged)
        return select(merged, self.budgets[s], scratch.take("magnitude", *merged.shape))

    def fuses(self, evaluator: Tiles, span: Span | None = None) -> bool:
        """Whether the compiled loop serves here."""
        if not self.compile or self.keep or self.scale != 1:
            return False
        return fused.usable(evaluator, span, self.selections)

    def is_empty(self, span: Span) -> bool:
        """Whether nothing survives there, so that there is nothing to compute."""
        return self.form != "none" and not any(self.budgets[span.slices])


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


def effective_weight(
    update: Update,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    out: Tensor | None = None,
    keep: bool = False,
) -> Tensor:
    """W + S, shape (out, in), or S alone without a weight; not differentiable.

    In the evaluation precision (see ``compute_type``), so that a small update survives the sum.
    out: memory for it. keep: leave the tiles in ``update.kept_tiles`` for ``contract``.
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
        if keep:
            tile = evaluator.tile(span, FreshMemory(a.device, scratch.dtype))
            part.copy_(tile.merged)
            kept.append((span, tile))
        elif not update.is_empty(span):
            _merge(update, evaluator, span, scratch, part)
    if update.form != "none" and update.selections is None:
        update.selections = [
            update.find(s, block, scratch) for s, block in enumerate(blocks.unbind())
        ]
    _finish(update, evaluator, blocks, None if weight is None else weight.reshape(shape), scratch)
    if keep:
        update.kept_tiles = kept
    return out


def _merge(update: Update, evaluator: Tiles, span: Span, scratch: Scratch, out: Tensor) -> None:
    """Write merged matrices to ``out``."""
    if update.fuses(evaluator):
        with suppress(fused.CompilerMissing):
            fused.merge_tile(evaluator, span, scratch, out)
            return
    evaluator.tile(span, scratch, out=out)


def _finish(
    update: Update, evaluator: Tiles, blocks: Tensor, base: Tensor | None, scratch: Scratch
) -> None:
    """Turn merged matrices (slices, out, in) into base + scale · S, in place."""
    inputs = blocks.shape[2]
    everywhere = Span(slice(0, len(blocks)), slice(0, inputs), inputs)
    empty = [update.form != "none" and budget == 0 for budget in update.budgets]
    for block, is_empty in zip(blocks.unbind(), empty, strict=True):
        if is_empty:  # nothing was written there
            block.zero_()
    if update.form != "none" and update.fuses(evaluator, everywhere):
        with suppress(fused.CompilerMissing):
            fused.finish(blocks, base, update.form, update.selections or [])
            return
    for s, block in enumerate(blocks.unbind()):
        part = None if base is None else base[s]
        if empty[s]:
            if part is not None:
                block.copy_(part)
        else:
            _sparsify_and_add(update, s, block, part, scratch)


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
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """W + S again (if needed), and ∂L/∂(W + S) contracted into gradients of A, B and scalars."""
    evaluator = _evaluator(update, a, b, scalars)
    shape = a.shape[0], b.shape[2], a.shape[2]
    scratch = Scratch.like(a, compute_type(a))
    dense = dense.reshape(shape)
    effective = scratch.take("effective", *shape) if needs_effective else None
    base = None if weight is None else weight.reshape(shape)
    stored: Iterable[tuple[Span, Tile | None]] | None = update.kept_tiles
    for span, tile in stored or ((span, None) for span in evaluator.spans()):
        where = span.slices, slice(None), span.columns
        out = None if effective is None else effective[where]
        part = None if base is None else base[where]
        if not update.is_empty(span):
            _differentiate(update, evaluator, span, tile, (dense[where], part, out), scratch)
        elif out is not None:
            out.zero_() if part is None else out.copy_(part)
    update.kept_tiles = None
    flat = None if effective is None else effective.view(-1, shape[2])
    return flat, evaluator.gradients()


def _differentiate(
    update: Update,
    evaluator: Tiles,
    span: Span,
    tile: Tile | None,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    scratch: Scratch,
) -> None:
    """One tile's share of the gradients, and of W + S if ``out`` is given.

    tensors: ∂L/∂S, the frozen weight if it is to be added, out.
    """
    if tile is None and update.fuses(evaluator, span):
        with suppress(fused.CompilerMissing):
            selections = update.selections or []
            fused.differentiate_tile(evaluator, span, scratch, update.form, selections, tensors)
            return
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
