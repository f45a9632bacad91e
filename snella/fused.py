"""The elementwise part of a layer as compiled loops (torch.compile): C++ on CPUs, Triton on GPUs.

The same function as ``snella.tiles`` and ``snella.sparsify.factors``, for whole matrices. Distances
are evaluated wherever they are needed, since arithmetic is cheaper than memory; only ∂L/∂D / d is
written, to be contracted with A and B by matrix products. Column sums are left to ``torch.sum``,
which walks along the rows; a compiled one would walk down the columns.
Without a working compiler the caller falls back to the tiles, with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from snella.scratch import Scratch
from snella.sparsify import Selection
from snella.tiles import PiecewiseTiles, Softmax, Span, Tiles

_broken: list[str] = []


def usable(evaluator: Tiles) -> bool:
    """Whether there are loops for this kernel (the piecewise ones), and a compiler."""
    return not _broken and isinstance(evaluator, PiecewiseTiles)


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the compiled function; ``CompilerMissing`` if it cannot be compiled here."""
    try:
        return _compiled(function)(*arguments)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        _broken.append(reason)
        warnings.warn(
            f"SNELLA runs without compilation: torch.compile failed here ({reason}).", stacklevel=2
        )
        raise CompilerMissing(reason) from error


class CompilerMissing(Exception):
    """torch.compile does not work on this machine; the message says what it said."""


@lru_cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


@dataclass(frozen=True)
class _Recipe:
    """What does not vary from call to call, and so becomes part of the compiled code."""

    pieces: int
    coordinates: int
    mixed: bool
    temperature: bool
    shift: bool
    form: str

    @staticmethod
    def of(evaluator: PiecewiseTiles, form: str = "none") -> _Recipe:
        kernel = evaluator.kernel
        mixed = kernel.name == "mix-k"
        temperature = mixed and kernel.temperature
        shift = evaluator.constants.needs_shift
        return _Recipe(kernel.pieces, kernel.coordinates, mixed, temperature, shift, form)


def _kernel_numbers(evaluator: PiecewiseTiles) -> Tensor:
    """Floors, coefficients, scale, offset and temperature of every slice, as (columns, slices)."""
    columns = [*evaluator.constants.floor.unbind(1), *evaluator.coefficients]
    names = ("scale", "offset", "temperature")
    columns += [evaluator.scalars[name] for name in names if name in evaluator.scalars]
    return torch.stack([column.flatten() for column in columns])


def _selection_numbers(selections: list[Selection], row_length: int) -> Tensor:
    """Threshold, subtracted magnitude, and row and column of the cut, as (4, slices)."""
    rows: list[list[Any]] = [
        [selection.threshold for selection in selections],
        [selection.subtracted for selection in selections],
        [selection.cut // row_length for selection in selections],
        [selection.cut % row_length for selection in selections],
    ]
    if isinstance(selections[0].threshold, Tensor):
        return torch.stack([torch.stack(row).double() for row in rows])
    return torch.tensor(rows, dtype=torch.float64)


def _linear(recipe: _Recipe, a: Tensor, b: Tensor, numbers: Tensor) -> tuple[list[Tensor], Tensor]:
    """(d_p for every piece, D) over (slices, out, in), from (slices, P, r/P, features)."""
    distances, total = [], None
    for p in range(recipe.pieces):
        squares = None
        for k in range(recipe.coordinates):
            square = (b[:, p, k, :, None] - a[:, p, k, None, :]).square()
            squares = square if squares is None else squares + square
        assert squares is not None
        distance = squares.clamp_min(numbers[p, :, None, None]).sqrt()
        share = distance * numbers[recipe.pieces + p, :, None, None]
        total = share if total is None else total + share
        distances.append(distance)
    assert total is not None
    return distances, total


def _factors(form: str, merged: Tensor, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``snella.sparsify.factors``, for whole matrices."""
    if numbers is None:
        return torch.ones_like(merged), torch.ones_like(merged)
    numbers = numbers[:, :, None, None].to(merged.dtype)
    threshold, subtracted, cut_row, cut_column = numbers.unbind(0)
    magnitude = merged.abs()
    # Compared as numbers of the same type: conversions between types would cost more than all else.
    row, column = (torch.arange(n, device=merged.device).to(merged.dtype) for n in merged.shape[1:])
    early = (row.unsqueeze(1) < cut_row) | ((row.unsqueeze(1) == cut_row) & (column < cut_column))
    kept = (magnitude > threshold) | ((magnitude == threshold) & early)
    amount = torch.where(kept, magnitude - subtracted if form == "paper" else magnitude, 0.0)
    slope = torch.where(kept, magnitude + amount, 0.0) if form == "paper" else amount
    return amount, slope


def _exponential(recipe: _Recipe, linear: Tensor, numbers: Tensor, shift: Tensor | None) -> Tensor:
    logits = linear / numbers[-1, :, None, None] if recipe.temperature else linear
    return (logits if shift is None else logits - shift.unsqueeze(1)).exp()


def _shift(recipe: _Recipe, a: Tensor, b: Tensor, numbers: Tensor) -> Tensor:
    """The largest logit of every column."""
    linear = _linear(recipe, a, b, numbers)[1]
    return (linear / numbers[-1, :, None, None] if recipe.temperature else linear).amax(-2)


def _start_merge(
    recipe: _Recipe,
    out: Tensor,
    exponential: Tensor | None,
    a: Tensor,
    b: Tensor,
    numbers: Tensor,
    shift: Tensor | None,
) -> None:
    """Write D to ``out``, and exp of the logits."""
    linear = _linear(recipe, a, b, numbers)[1]
    out.copy_(linear)
    if exponential is not None:
        exponential.copy_(_exponential(recipe, linear, numbers, shift))


def _merged(
    recipe: _Recipe, linear: Tensor, exponential: Tensor, numbers: Tensor, normaliser: Tensor
) -> Tensor:
    """D + α softmax + β, with the same rounding wherever it is evaluated."""
    scale, offset = numbers[2 * recipe.pieces : 2 * recipe.pieces + 2, :, None, None].unbind(0)
    return linear + offset + exponential * (normaliser.unsqueeze(1) * scale)


def _end_merge(
    recipe: _Recipe, out: Tensor, exponential: Tensor, numbers: Tensor, normaliser: Tensor
) -> None:
    """Add the softmax and the offset to D."""
    out.copy_(_merged(recipe, out, exponential, numbers, normaliser))


def _finish(form: str, block: Tensor, base: Tensor | None, selection: Tensor | None) -> None:
    sparse = block * _factors(form, block, selection)[0]
    block.copy_(sparse if base is None else base + sparse)


def _evaluate(
    recipe: _Recipe, a: Tensor, b: Tensor, numbers: Tensor, softmax: Softmax | None
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """(distances, D, exp of the logits, merged); the third has no use without a softmax."""
    distances, linear = _linear(recipe, a, b, numbers)
    if softmax is None:
        return distances, linear, linear, linear
    exponential = _exponential(recipe, linear, numbers, softmax[0])
    merged = _merged(recipe, linear, exponential, numbers, softmax[1])
    return distances, linear, exponential, merged


def _start_backward(
    recipe: _Recipe,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    weighted: Tensor | None,
    a: Tensor,
    b: Tensor,
    numbers: Tensor,
    softmax: Softmax | None,
    selection: Tensor | None,
) -> None:
    """Write W + S, and ∂L/∂merged times exp of the logits."""
    dense, base, out = tensors
    _, _, exponential, merged = _evaluate(recipe, a, b, numbers, softmax)
    amount, slope = _factors(recipe.form, merged, selection)
    if out is not None:
        sparse = merged * amount
        out.copy_(sparse if base is None else base + sparse)
    if weighted is not None:
        weighted.copy_(dense.to(merged.dtype) * slope * exponential)


def _end_backward(
    recipe: _Recipe,
    dense: Tensor,
    ratios: list[Tensor],
    mean: Tensor | None,
    a: Tensor,
    b: Tensor,
    numbers: Tensor,
    softmax: Softmax | None,
    selection: Tensor | None,
) -> list[Tensor]:
    """Write ∂L/∂D / d; return the gradients of the offset and, per column, of the temperature."""
    distances, linear, exponential, merged = _evaluate(recipe, a, b, numbers, softmax)
    grad = dense.to(merged.dtype) * _factors(recipe.form, merged, selection)[1]
    sums = []
    if softmax is not None and mean is not None:
        sums.append(grad.sum((1, 2)))
        weight = softmax[1] * numbers[2 * recipe.pieces, :, None]
        logit = (grad - mean.unsqueeze(1)) * exponential
        if recipe.temperature:
            weight = weight / numbers[-1, :, None]
            sums.append((logit * linear).sum(-2) * weight / -numbers[-1, :, None])
        grad = grad + logit * weight.unsqueeze(1)
    for ratio, distance in zip(ratios, distances, strict=True):
        ratio.copy_(grad / distance)
    return sums


def merge(evaluator: PiecewiseTiles, out: Tensor, scratch: Scratch) -> None:
    """Write the merged matrices to ``out``, (slices, out, in)."""
    recipe, numbers = _Recipe.of(evaluator), _kernel_numbers(evaluator)
    factors = evaluator.rows_a, evaluator.rows_b, numbers
    if not recipe.mixed:
        _run(_start_merge, recipe, out, None, *factors, None)
        return
    shift = _run(_shift, recipe, *factors) if recipe.shift else None
    exponential = scratch.take("exponential", *out.shape)
    _run(_start_merge, recipe, out, exponential, *factors, shift)
    normaliser = exponential.sum(-2).reciprocal_()
    _run(_end_merge, recipe, out, exponential, numbers, normaliser)
    evaluator.constants.softmax = shift, normaliser


def finish(
    blocks: Tensor, base: Tensor | None, form: str, selections: list[Selection] | None
) -> None:
    """Turn merged matrices (slices, out, in) into base + S, in place."""
    selection = None if selections is None else _selection_numbers(selections, blocks.shape[2])
    _run(_finish, form, blocks, base, selection)


def contract(
    evaluator: PiecewiseTiles,
    form: str,
    selections: list[Selection] | None,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    scratch: Scratch,
) -> None:
    """Add the layer's share to the evaluator's gradients.

    tensors: ∂L/∂S, the frozen weight if it is to be added, and where W + S is to be written; each
    (slices, out, in).
    """
    dense = tensors[0]
    slices, _, inputs = shape = dense.shape
    recipe, numbers = _Recipe.of(evaluator, form), _kernel_numbers(evaluator)
    selection = None if selections is None else _selection_numbers(selections, inputs)
    softmax, weighted, mean = evaluator.constants.softmax, None, None
    function = evaluator.rows_a, evaluator.rows_b, numbers, softmax, selection
    if softmax is not None:
        weighted = scratch.take("weighted", *shape)
    if softmax is not None or tensors[2] is not None:
        _run(_start_backward, recipe, tensors, weighted, *function)
    if softmax is not None and weighted is not None:
        mean = weighted.sum(-2) * softmax[1]
    ratios = [scratch.take(f"ratio {p}", *shape) for p in range(recipe.pieces)]
    sums = _run(_end_backward, recipe, dense, ratios, mean, *function)
    span = Span(slice(0, slices), slice(0, inputs), inputs)
    for p, ratio in enumerate(ratios):
        evaluator.add_ratio(span, ratio.unsqueeze(1), slice(p, p + 1))
    if mean is not None:
        evaluator.add_scalar(span, "offset", sums[0])
        evaluator.add_scalar(span, "scale", mean.sum(1))
    if recipe.temperature:
        evaluator.add_scalar(span, "temperature", sums[1].sum(1))
