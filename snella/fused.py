"""The elementwise part of a tile as one loop, by torch.compile: C++ on CPUs, Triton on GPUs.

The same arithmetic as ``snella.tiles`` and ``snella.sparsify.factors``, written as formulas.
Without a working compiler the caller falls back to those, with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from snella.sparsify import Selection
from snella.tiles import PiecewiseTiles, Scratch, Span, Tiles

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


def _tile_arguments(evaluator: PiecewiseTiles, span: Span, scratch: Scratch) -> list[Any]:
    where = span.slices
    scalars = {name: value[where] for name, value in evaluator.scalars.items()}
    return [
        evaluator.squared_distances(span, scratch),
        evaluator.bounds.floor[where],
        [coefficient[where] for coefficient in evaluator.coefficients],
        scalars.get("scale"),
        scalars.get("offset"),
        scalars.get("temperature"),
        evaluator.bounds.needs_shift,
    ]


def _evaluate(
    squares: Tensor,
    floor: Tensor,
    coefficients: list[Tensor],
    scale: Tensor | None,
    offset: Tensor | None,
    temperature: Tensor | None,
    shift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(distances, D, merged, exponential, 1 / its sum)."""
    distances = squares.clamp_min(floor).sqrt()
    linear = distances[:, 0] * coefficients[0]
    for p in range(1, len(coefficients)):
        linear = linear + distances[:, p] * coefficients[p]
    if scale is None or offset is None:
        return distances, linear, linear, None, None
    logits = linear if temperature is None else linear / temperature
    if shift:
        logits = logits - logits.amax(-2, keepdim=True)
    exponential = logits.exp()
    normaliser = exponential.sum(-2, keepdim=True).reciprocal()
    merged = linear + offset + exponential * (normaliser * scale)
    return distances, linear, merged, exponential, normaliser


def _factors(
    merged: Tensor, form: str, threshold: Tensor, cut: Tensor | None, subtracted: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``snella.sparsify.factors``; ``cut`` only for whole matrices."""
    magnitude = merged.abs()
    kept = magnitude > threshold
    if cut is not None:
        index = torch.arange(merged[0].numel(), device=merged.device).view(merged.shape[1:])
        kept = kept | ((magnitude == threshold) & (index < cut))
    amount = torch.where(kept, magnitude - subtracted if form == "paper" else magnitude, 0.0)
    slope = torch.where(kept, magnitude + amount, 0.0) if form == "paper" else amount
    return amount, slope


def _merge(out: Tensor, *arguments: Any) -> None:
    out.copy_(_evaluate(*arguments)[2])


def _finish(
    block: Tensor,
    base: Tensor | None,
    form: str,
    threshold: Tensor,
    cut: Tensor | None,
    subtracted: Tensor,
) -> None:
    sparse = block * _factors(block, form, threshold, cut, subtracted)[0]
    block.copy_(sparse if base is None else base + sparse)


def _differentiate(
    dense: Tensor,
    base: Tensor | None,
    out: Tensor | None,
    form: str,
    selection: tuple[Tensor, Tensor | None, Tensor] | None,
    squares: Tensor,
    *arguments: Any,
) -> list[Tensor]:
    """Write W + S to ``out`` and ∂L/∂D / d to ``squares``; return column sums for the scalars."""
    distances, linear, merged, exponential, normaliser = _evaluate(squares, *arguments)
    amount, slope = torch.ones_like(merged), torch.ones_like(merged)
    if selection is not None:
        amount, slope = _factors(merged, form, *selection)
    if out is not None:
        sparse = merged * amount
        out.copy_(sparse if base is None else base + sparse)
    grad = dense.to(merged.dtype) * slope
    sums = []
    if exponential is not None and normaliser is not None:
        _, _, scale, _, temperature, _ = arguments
        weighted = grad * exponential
        mean = weighted.sum(-2, keepdim=True) * normaliser
        logit = weighted - exponential * mean
        weight = normaliser * scale
        sums = [grad.sum(-2), mean[:, 0]]
        if temperature is not None:
            weight = weight / temperature
            moment = (logit * linear).sum(-2, keepdim=True)
            sums.append((moment * weight / -temperature)[:, 0])
        grad = grad + logit * weight
    squares.copy_(grad.unsqueeze(1) / distances)
    return sums


def merge_tile(evaluator: Tiles, span: Span, scratch: Scratch, out: Tensor) -> None:
    """Write the merged matrices over a span to ``out``."""
    assert isinstance(evaluator, PiecewiseTiles)
    _run(_merge, out, *_tile_arguments(evaluator, span, scratch))


def finish(block: Tensor, base: Tensor | None, form: str, selections: list[Selection]) -> None:
    """Turn merged matrices (slices, out, in) into base + S, in place."""
    _run(_finish, block, base, form, *_numbers(selections, block))


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
    selection = None if form == "none" else _numbers(selections[span.slices], tensors[0])
    arguments = _tile_arguments(evaluator, span, scratch)
    sums = _run(_differentiate, *tensors, form, selection, *arguments)
    for name, value in zip(("offset", "scale", "temperature"), sums, strict=False):
        evaluator.add_scalar(span, name, value.sum(1))
    evaluator.add_ratio(span, arguments[0])


def _numbers(selections: list[Selection], like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """(threshold, cut, subtracted) of several slices as (slices, 1, 1); no cut without ties."""
    first = selections[0]
    if isinstance(first.threshold, Tensor):
        fields = ("threshold", "cut", "subtracted")
        stacked = [torch.stack([getattr(s, f) for s in selections])[:, None, None] for f in fields]
        return stacked[0], stacked[1], stacked[2]
    pairs = torch.tensor([[s.threshold, s.subtracted] for s in selections], dtype=torch.float64)
    pairs = pairs.to(like.device, torch.float32 if like.dtype != torch.float64 else torch.float64)
    return pairs[:, :1, None], None, pairs[:, 1:, None]
