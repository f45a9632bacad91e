"""The elementwise part of a tile as one loop, by torch.compile: C++ on CPUs, Triton on GPUs.

The same arithmetic as ``snella.tiles`` and ``snella.sparsify.factors``, written as formulas.
Without a working compiler the caller falls back to those, with one warning.
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
from snella.tiles import PiecewiseTiles, Span, Tiles

_broken: list[str] = []


def usable(evaluator: Tiles, span: Span | None, selections: list[Selection] | None) -> bool:
    """Whether a tile can be fused: piecewise kernels, and no ties on the CPU, which are rare."""
    if _broken or not isinstance(evaluator, PiecewiseTiles):
        return False
    if span is None or selections is None or evaluator.a.device.type != "cpu":
        return True
    return not any(selection.has_ties for selection in selections[span.slices])


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
    mixed: bool
    temperature: bool
    shift: bool
    form: str

    @staticmethod
    def of(evaluator: PiecewiseTiles, form: str = "none") -> _Recipe:
        kernel = evaluator.kernel
        mixed = kernel.name == "mix-k"
        temperature = mixed and kernel.temperature
        return _Recipe(kernel.pieces, mixed, temperature, evaluator.bounds.needs_shift, form)


def _kernel_numbers(evaluator: PiecewiseTiles, span: Span) -> Tensor:
    """Floors, coefficients, scale, offset and temperature of every slice, as (columns, slices)."""
    columns = [*evaluator.bounds.floor.unbind(1), *evaluator.coefficients]
    names = ("scale", "offset", "temperature")
    columns += [evaluator.scalars[name] for name in names if name in evaluator.scalars]
    return torch.stack([column[span.slices].flatten() for column in columns])


def _selection_numbers(selections: list[Selection], like: Tensor) -> Tensor:
    """Threshold and subtracted magnitude of every slice, as (2, slices), and on devices the cut."""
    if isinstance(selections[0].threshold, Tensor):
        fields = ("threshold", "subtracted", "cut")
        return torch.stack(
            [torch.stack([getattr(s, f) for s in selections]).double() for f in fields]
        )
    rows = [[s.threshold for s in selections], [s.subtracted for s in selections]]
    return torch.tensor(rows, dtype=torch.float64)


def _origin(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that starts at offset 0: offsets would each be compiled for."""
    if tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16:
        return tensor
    return torch.from_numpy(tensor.detach().numpy())


def _evaluate(
    recipe: _Recipe, squares: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(distances, D, merged, exponential, column weight per unit of scale)."""
    columns = list(numbers[..., None, None].unbind(0))
    pieces = recipe.pieces
    floor = torch.stack(columns[:pieces], 1)
    distances = squares.clamp_min(floor).sqrt()
    linear = distances[:, 0] * columns[pieces]
    for p in range(1, pieces):
        linear = linear + distances[:, p] * columns[pieces + p]
    if not recipe.mixed:
        return distances, linear, linear, None, None
    scale, offset = columns[2 * pieces : 2 * pieces + 2]
    logits = linear / columns[-1] if recipe.temperature else linear
    if recipe.shift:
        logits = logits - logits.amax(-2, keepdim=True)
    exponential = logits.exp()
    normaliser = exponential.sum(-2, keepdim=True).reciprocal()
    merged = linear + offset + exponential * (normaliser * scale)
    return distances, linear, merged, exponential, normaliser


def _factors(form: str, merged: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """As ``snella.sparsify.factors``; the cut of ties only for whole matrices."""
    threshold, subtracted = numbers[:2, :, None, None].to(merged.dtype).unbind(0)
    magnitude = merged.abs()
    kept = magnitude > threshold
    if len(numbers) == 3:
        index = torch.arange(merged[0].numel(), device=merged.device).view(merged.shape[1:])
        kept = kept | ((magnitude == threshold) & (index < numbers[2, :, None, None]))
    amount = torch.where(kept, magnitude - subtracted if form == "paper" else magnitude, 0.0)
    slope = torch.where(kept, magnitude + amount, 0.0) if form == "paper" else amount
    return amount, slope


def _merge(recipe: _Recipe, out: Tensor, squares: Tensor, numbers: Tensor) -> None:
    out.copy_(_evaluate(recipe, squares, numbers)[2])


def _finish(form: str, block: Tensor, base: Tensor | None, numbers: Tensor) -> None:
    sparse = block * _factors(form, block, numbers)[0]
    block.copy_(sparse if base is None else base + sparse)


def _differentiate(
    recipe: _Recipe,
    dense: Tensor,
    base: Tensor | None,
    out: Tensor | None,
    selection: Tensor | None,
    squares: Tensor,
    numbers: Tensor,
) -> list[Tensor]:
    """Write W + S to ``out`` and ∂L/∂D / d to ``squares``; return column sums for the scalars."""
    distances, linear, merged, exponential, normaliser = _evaluate(recipe, squares, numbers)
    amount, slope = torch.ones_like(merged), torch.ones_like(merged)
    if selection is not None:
        amount, slope = _factors(recipe.form, merged, selection)
    if out is not None:
        sparse = merged * amount
        out.copy_(sparse if base is None else base + sparse)
    grad = dense.to(merged.dtype) * slope
    sums = []
    if exponential is not None and normaliser is not None:
        weighted = grad * exponential
        mean = weighted.sum(-2, keepdim=True) * normaliser
        logit = weighted - exponential * mean
        weight = normaliser * numbers[2 * recipe.pieces, :, None, None]
        sums = [grad.sum(-2), mean[:, 0]]
        if recipe.temperature:
            weight = weight / numbers[-1, :, None, None]
            moment = (logit * linear).sum(-2, keepdim=True)
            sums.append((moment * weight / -numbers[-1, :, None, None])[:, 0])
        grad = grad + logit * weight
    squares.copy_(grad.unsqueeze(1) / distances)
    return sums


def merge_tile(evaluator: Tiles, span: Span, scratch: Scratch, out: Tensor) -> None:
    """Write the merged matrices over a span to ``out``."""
    assert isinstance(evaluator, PiecewiseTiles)
    squares, numbers = evaluator.squared_distances(span, scratch), _kernel_numbers(evaluator, span)
    _run(_merge, _Recipe.of(evaluator), _origin(out), squares, numbers)


def finish(block: Tensor, base: Tensor | None, form: str, selections: list[Selection]) -> None:
    """Turn merged matrices (slices, out, in) into base + S, in place."""
    _run(_finish, form, block, base, _selection_numbers(selections, block))


def differentiate_tile(
    evaluator: Tiles,
    span: Span,
    scratch: Scratch,
    form: str,
    selections: list[Selection],
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:
    """Add a tile's share to the evaluator's gradients.

    tensors: ∂L/∂S, the frozen weight if it is to be added, and where W + S is to be written.
    """
    assert isinstance(evaluator, PiecewiseTiles)
    selection = None
    if form != "none":
        selection = _selection_numbers(selections[span.slices], tensors[0])
    squares, numbers = evaluator.squared_distances(span, scratch), _kernel_numbers(evaluator, span)
    places = [None if tensor is None else _origin(tensor) for tensor in tensors]
    sums = _run(_differentiate, _Recipe.of(evaluator, form), *places, selection, squares, numbers)
    for name, value in zip(("offset", "scale", "temperature"), sums, strict=False):
        evaluator.add_scalar(span, name, value.sum(1))
    evaluator.add_ratio(span, squares)
