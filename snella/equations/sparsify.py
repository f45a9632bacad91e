"""Weight-level competition: of a merged matrix, exactly b entries survive (paper Sec. 3.3, Eq. 13).

The b entries of largest magnitude are kept; equal magnitudes are ordered by flat index, so the
choice is deterministic. With t the largest magnitude below all kept ones, the kept entries become

    paper      W · (|W| − t)     Eq. 13; the paper takes t = b-th largest, which would keep b − 1
    released   W · |W|           released code; the factor |W| counts as a constant in the gradient
    none       W                 the dense update of KLoRA

The threshold counts as a constant in every gradient, as in the released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snella.errors import UserError, unknown

FORMS = ("paper", "released", "none")
BUDGET_RULES = ("exact", "quantile")


@dataclass(frozen=True)
class Selection:
    """Which entries survive: magnitude above ``threshold``, or equal to it at flat index < ``cut``.

    threshold: the largest dropped magnitude; −1 when nothing is dropped.
    cut: 0 unless entries tie at the threshold.
    subtracted: t of the paper's form; the threshold, or the next magnitude below in case of a tie.
    Numbers on the CPU, scalar tensors elsewhere, so that no device has to be waited for.
    """

    threshold: Tensor | float
    cut: Tensor | int
    subtracted: Tensor | float

    @property
    def has_ties(self) -> bool:
        """Whether ``cut`` may matter; a device is not asked."""
        return isinstance(self.cut, Tensor) or self.cut > 0


@dataclass(frozen=True)
class Region:
    """Where a tile lies in the matrix that was selected from."""

    rows: slice
    columns: slice
    row_length: int

    def flat_index(self, device: torch.device) -> Tensor:
        """Flat index of every entry of the tile."""
        row = torch.arange(self.rows.start, self.rows.stop, device=device) * self.row_length
        return row.unsqueeze(1) + torch.arange(self.columns.start, self.columns.stop, device=device)


def select_all_or_nothing(everything: bool, like: Tensor) -> Selection:
    """The selection of every entry, or of none, in the form that suits the device of ``like``."""
    threshold, subtracted = (-1.0, 0.0) if everything else (math.inf, math.inf)
    if like.device.type == "cpu":
        return Selection(threshold, 0, subtracted)
    cut = like.new_zeros((), dtype=torch.long)
    return Selection(like.new_full((), threshold), cut, like.new_full((), subtracted))


def budget_from_sparsity(sparsity: float, total: int, rule: str = "exact") -> int:
    """Number of entries to keep, of ``total``, at a sparsity in [0, 1].

    exact: (1 − sparsity) · total, rounded. quantile: what the released code keeps by comparing with
    the interpolated quantile, total − 1 − ⌊sparsity · (total − 1)⌋; never the smallest entry.
    """
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity must lie in [0, 1], got {sparsity}.")
    if rule not in BUDGET_RULES:
        raise unknown("budget rule", rule, BUDGET_RULES)
    if rule == "exact":
        return round((1 - sparsity) * total)
    return total - 1 - math.floor(sparsity * (total - 1))


def select(merged: Tensor, budget: int, buffer: Tensor | None = None) -> Selection:
    """Choose the ``budget`` largest magnitudes of one merged matrix, without waiting for a device.

    merged: any shape, N entries; budget: 0 <= b <= N. Exact for any N. buffer: memory of the shape
    and type of ``merged`` that may be overwritten, to save an allocation.
    """
    total = merged.numel()
    if not 0 <= budget <= total:
        raise UserError(f"budget must lie in [0, {total}] for this matrix, got {budget}.")
    if budget == total:
        return select_all_or_nothing(True, merged)
    magnitude = torch.abs(merged.detach(), out=buffer).flatten()
    if magnitude.device.type != "cpu":
        return _select_on_device(magnitude, budget)
    values = merged.detach().flatten()
    if values.dtype not in (torch.float32, torch.float64):
        values, magnitude = values.float(), magnitude.float()
    return _select_on_host(values.numpy(), magnitude.numpy(), budget)


def _select_on_host(merged: np.ndarray, magnitude: np.ndarray, budget: int) -> Selection:
    """By NumPy's vectorised quickselect, in place; torch's kthvalue takes ten times as long."""
    dropped = magnitude.size - budget
    magnitude.partition(dropped - 1)
    threshold = float(magnitude[dropped - 1])
    kept = magnitude[dropped:]
    if not budget or kept.min() > threshold:
        return Selection(threshold, 0, threshold)
    surplus = int(np.count_nonzero(kept == threshold))
    if not surplus:  # NaN, which NumPy orders last: it passes on to the update and the loss
        return Selection(threshold, 0, threshold)
    cut = int(np.flatnonzero(np.abs(merged) == threshold)[surplus - 1]) + 1
    lower = magnitude[:dropped][magnitude[:dropped] < threshold]
    return Selection(threshold, cut, float(lower.max()) if lower.size else 0.0)


def _select_on_device(magnitude: Tensor, budget: int) -> Selection:
    """The shorter of the two ends by top-k, and the tie's cut by counting; nothing is read back."""
    dropped = magnitude.numel() - budget
    if budget == 0:
        threshold = magnitude.amax()
    elif dropped <= budget:
        threshold = magnitude.topk(dropped, largest=False, sorted=False).values.amax()
    else:
        threshold = magnitude.topk(budget + 1, sorted=False).values.amin()
    rank = (magnitude == threshold).cumsum(0)
    surplus = budget - (magnitude > threshold).sum()
    cut = torch.where(surplus > 0, (rank < surplus).sum() + 1, 0)
    lower = torch.where(magnitude < threshold, magnitude, 0.0).amax()
    return Selection(threshold, cut, torch.where(surplus > 0, lower, threshold))


def keep_mask(merged: Tensor, selection: Selection, region: Region | None = None) -> Tensor:
    """Boolean mask of the surviving entries, same shape as ``merged``.

    region: where ``merged`` lies, if it is only a tile of the matrix selected from.
    """
    magnitude = merged.detach().abs()
    if region is None:
        index = torch.arange(magnitude.numel(), device=magnitude.device).view_as(magnitude)
    else:
        index = region.flat_index(magnitude.device)
    tied = (magnitude == selection.threshold) & (index < selection.cut)
    return (magnitude > selection.threshold) | tied


def sparsify(merged: Tensor, budget: int, form: str = "paper") -> Tensor:
    """Sparse update with exactly ``budget`` kept entries, differentiable by autograd.

    merged: one matrix. The readable definition, and the oracle of the tests; see also ``factors``.
    """
    if form not in FORMS:
        raise unknown("sparsification", form, FORMS)
    if form == "none":
        return merged
    selection = select(merged, budget)
    kept = merged * keep_mask(merged, selection)
    if form == "released":
        return kept * merged.detach().abs()
    return kept * (merged.abs() - selection.subtracted)


def factors(
    merged: Tensor,
    selection: Selection,
    form: str,
    amount: Tensor,
    slope: Tensor | None = None,
    region: Region | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(S / merged, ∂S/∂merged) entry by entry, written to the buffers ``amount`` and ``slope``.

    paper: (|W| − t, 2|W| − t) on kept entries, the second only if there is a buffer for it;
    released: (|W|, |W|), both in ``amount``. 0 on dropped entries. region: see ``keep_mask``.
    """
    soft = form == "paper"
    magnitude = torch.abs(merged, out=slope if soft and slope is not None else amount)
    mask = keep_mask(merged, selection, region) if selection.has_ties else None
    if soft:
        torch.sub(magnitude, selection.subtracted, out=amount)
        amount = amount.clamp_min_(0) if mask is None else amount.mul_(mask)
        if slope is None:
            return amount, None
    if mask is None:
        kept = torch.threshold_(magnitude, float(selection.threshold), 0.0)
    else:
        kept = magnitude.mul_(mask)
    return (amount, kept.add_(amount)) if soft else (kept, kept)
