"""The update of one layer by torch operations, tile by tile: any kernel, device and precision.

The fallback of the compiled backends, and their oracle. Forward merges, sparsifies and adds the
frozen weight into one matrix. Backward evaluates the same tiles again for ∂L/∂x, and contracts
∂L/∂(W + S) at once into the gradients of A, B and the kernel's scalars.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from snella.backends.scratch import FreshMemory, Scratch
from snella.backends.tiles import CPU_TILE, Span, Tile, Tiles, tiles
from snella.backends.update import Found, Gradients, Update, compute_type, new_tensor
from snella.equations.sparsify import Region, Selection, factors, select, select_all_or_nothing

SELECTION_TYPE = torch.float64
KeptTiles = list[tuple[Span, Tile]]


def usable(update: Update, a: Tensor) -> bool:
    """Always."""
    return True


def found_like(update: Update, a: Tensor, b: Tensor) -> Found:
    """Uninitialised memory for what ``effective_weight`` finds."""
    return Found(new_tensor(a, 3, a.shape[0], dtype=SELECTION_TYPE), new_tensor(a, 0))


@dataclass(frozen=True)
class _Job:
    """One call: the update, its selections by slice, and memory."""

    update: Update
    selections: list[Selection | None]
    scratch: Scratch

    def is_empty(self, span: Span) -> bool:
        """Whether nothing survives there, so that there is nothing to compute."""
        return self.update.form != "none" and not any(self.selections[span.slices])


def _evaluator(update: Update, a: Tensor, b: Tensor, scalars: Tensor) -> Tiles:
    dtype = compute_type(a)
    scalars = scalars.view(a.shape[0], -1)
    a, b, scalars = (t.detach().to(dtype) for t in (a, b, scalars))
    return tiles(update.kernel, a, b, scalars)


def effective_weight(
    update: Update,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    budgets: Tensor,
    dtype: torch.dtype,
    transient: bool = False,
) -> tuple[Tensor, Found]:
    """See ``backends.dispatch.effective_weight``."""
    shape = a.shape[0], b.shape[2], a.shape[2]
    scratch = Scratch.like(a, compute_type(a))
    memory = scratch if transient else FreshMemory(a.device, scratch.dtype)
    out = memory.take("effective", shape[0] * shape[1], shape[2])
    evaluator, blocks = _evaluator(update, a, b, scalars), out.view(shape)
    # Numbers on the host: this backend may wait for its device.
    counts = [int(count) for count in budgets.tolist()]
    kept: KeptTiles | None = None
    if update.keep:
        kept = _merge_and_keep(evaluator, blocks)
    else:
        _merge(update, evaluator, blocks, counts, scratch)
    selections = _select(update, blocks, counts, scratch)
    _finish(
        _Job(update, selections, scratch), blocks, None if weight is None else weight.reshape(shape)
    )
    found = Found(_as_tensor(selections, found_like(update, a, b).selection), out.new_empty(0))
    return out.to(dtype), found if kept is None else replace(found, tiles=kept)


def _merge(
    update: Update, evaluator: Tiles, out: Tensor, counts: list[int], scratch: Scratch
) -> None:
    """Write the merged matrices (slices, out, in), except for slices of which nothing survives."""
    for span in evaluator.spans():
        part = out[span.slices, :, span.columns]
        if update.form != "none" and not any(counts[span.slices]):
            part.zero_()
        else:
            evaluator.tile(span, scratch, out=part)


def _merge_and_keep(evaluator: Tiles, out: Tensor) -> KeptTiles:
    """Write the merged matrices, and return the tiles they are made of."""
    kept = []
    for span in evaluator.spans():
        tile = evaluator.tile(span, FreshMemory(out.device, out.dtype))
        out[span.slices, :, span.columns] = tile.merged
        kept.append((span, tile))
    return kept


def _select(
    update: Update, blocks: Tensor, counts: list[int], scratch: Scratch
) -> list[Selection | None]:
    """Of every slice; None where nothing is kept."""
    if update.form == "none":
        return [select_all_or_nothing(True, block) for block in blocks.unbind()]
    return [
        select(block, count, scratch.take("magnitude", *block.shape)) if count else None
        for block, count in zip(blocks.unbind(), counts, strict=True)
    ]


def _as_tensor(selections: list[Selection | None], out: Tensor) -> Tensor:
    """(3, slices), as in ``Found``."""
    nothing = Selection(torch.inf, -1, torch.inf)
    for column, found in zip(out.unbind(1), selections, strict=True):
        found = found or nothing
        for place, value in zip(
            column.unbind(), (found.threshold, found.subtracted, found.cut), strict=True
        ):
            place.copy_(value) if isinstance(value, Tensor) else place.fill_(value)
    return out


def selections_of(selection: Tensor) -> list[Selection | None]:
    """The inverse of ``_as_tensor``, as numbers on the host."""
    return [
        None if cut < 0 else Selection(threshold, int(cut), subtracted)
        for threshold, subtracted, cut in selection.T.tolist()
    ]


def _finish(job: _Job, blocks: Tensor, base: Tensor | None) -> None:
    """Turn merged matrices (slices, out, in) into base + scale · S, in place."""
    for s, (block, selection) in enumerate(zip(blocks.unbind(), job.selections, strict=True)):
        part = None if base is None else base[s]
        if selection is not None:
            _sparsify_and_add(job, selection, block, part)
        elif part is None:
            block.zero_()
        else:
            block.copy_(part)


def _sparsify_and_add(job: _Job, selection: Selection, block: Tensor, base: Tensor | None) -> None:
    """Turn a slice's merged matrix into base + scale · S, in place, some rows at a time."""
    rows, inputs = block.shape
    height = max(1, CPU_TILE // inputs) if block.device.type == "cpu" else rows
    for start in range(0, rows, height):
        span = slice(start, min(start + height, rows))
        part = block[span]
        amount = None
        if job.update.form != "none":
            buffer = job.scratch.take("amount", *part.shape)
            region = Region(span, slice(0, inputs), inputs)
            amount, _ = factors(part, selection, job.update.form, buffer, region=region)
        _combine(part, amount, None if base is None else base[span], job.update.scale, part)


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
    found: Found,
    dense: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    needs_effective: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Gradients]:
    """See ``backends.dispatch.contract``."""
    shape = a.shape[0], b.shape[2], a.shape[2]
    scratch = Scratch.like(a, compute_type(a))
    effective = scratch.take("effective", *shape) if needs_effective else None
    base = None if weight is None else weight.reshape(shape)
    evaluator = _evaluator(update, a, b, scalars)
    job = _Job(update, selections_of(found.selection), scratch)
    stored: Iterable[tuple[Span, Tile | None]] | None = found.tiles
    tensors = dense.reshape(shape), base, effective
    for span, tile in stored or ((span, None) for span in evaluator.spans()):
        parts = tuple(None if t is None else t[span.slices, :, span.columns] for t in tensors)
        if not job.is_empty(span):
            _differentiate(job, evaluator, span, tile, *parts)
        elif (out := parts[2]) is not None:
            out.zero_() if parts[1] is None else out.copy_(parts[1])
    if stored is not None:
        found.tiles.clear()  # their memory is used up
    grad_a, grad_b, grad_scalars = evaluator.gradients()
    gradients = grad_a, grad_b, grad_scalars.reshape_as(scalars)
    if effective is None:
        return None, gradients
    return effective.view(-1, shape[2]).to(dtype), gradients


def _differentiate(
    job: _Job,
    evaluator: Tiles,
    span: Span,
    tile: Tile | None,
    dense: Tensor | None,
    base: Tensor | None,
    out: Tensor | None,
) -> None:
    """One tile's share of the gradients, and W + S into ``out``; dense: its part of ∂L/∂S."""
    assert dense is not None
    tile = tile or evaluator.tile(span, job.scratch)
    grad, amount = _through_sparsify(job, span, tile.merged, dense)
    if out is not None:
        _combine(tile.merged, amount, base, job.update.scale, out)
    evaluator.backward(span, tile, grad)


def _through_sparsify(
    job: _Job, span: Span, merged: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(∂L/∂merged, S / merged) of a tile from ∂L/∂S; the second is None where it is 1."""
    update = job.update
    grad = job.scratch.take("grad", *merged.shape)
    if update.form == "none":
        return torch.mul(dense, update.scale, out=grad), None
    amounts = job.scratch.take("amount", *merged.shape)
    region = Region(slice(0, merged.shape[1]), span.columns, span.row_length)
    for i, selection in enumerate(job.selections[span.slices]):
        if selection is None:
            grad[i].zero_()
            amounts[i].zero_()
            continue
        _, slope = factors(merged[i], selection, update.form, amounts[i], grad[i], region)
        assert slope is not None
        torch.mul(dense[i], slope, out=grad[i])
    if update.scale != 1:
        grad.mul_(update.scale)
    return grad, amounts
