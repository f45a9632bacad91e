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

# From this many entries on, looking near an earlier threshold is faster than selecting at once.
GUESS_FROM = 2**17
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


NOTHING = Selection(math.inf, 0, math.inf)
"""Selects no entry."""


def check_form(form: str) -> None:
    """Raise the user's error for a sparsification form that does not exist."""
    if form not in FORMS:
        raise unknown("sparsification", form, FORMS)


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


def select(
    merged: Tensor,
    budget: int,
    guess: float | None = None,
    margin: float = 0.01,
    buffer: Tensor | None = None,
) -> Selection:
    """Choose the ``budget`` largest magnitudes of one merged matrix, without waiting for a device.

    merged: any shape, N entries; budget: 0 <= b <= N. Exact for any N. guess, margin: on the CPU,
    an earlier threshold and the relative distance within which the new one is looked for first;
    they change the time taken, never the result. buffer: memory to use, as large as ``merged``.
    """
    magnitude = torch.abs(merged.detach(), out=buffer).flatten()
    total = magnitude.numel()
    if not 0 <= budget <= total:
        raise UserError(f"budget must lie in [0, {total}] for this matrix, got {budget}.")
    if budget == total:
        return Selection(-1.0, 0, 0.0)
    if magnitude.device.type != "cpu":
        return _select_on_device(magnitude, budget)
    if magnitude.dtype not in (torch.float32, torch.float64):
        magnitude = magnitude.float()
    return _select_on_host(magnitude.numpy(), budget, guess, margin)


def _select_on_host(
    magnitude: np.ndarray, budget: int, guess: float | None, margin: float
) -> Selection:
    """NumPy's quickselect is vectorised; torch's kthvalue takes ten times as long."""
    dropped = magnitude.size - budget
    candidates, below = magnitude, 0
    if guess is not None and magnitude.size >= GUESS_FROM:
        above = magnitude > guess * (1 - margin)
        near = magnitude[above & (magnitude <= guess * (1 + margin))]
        outside = magnitude.size - int(np.count_nonzero(above))
        if outside < dropped < outside + near.size:
            candidates, below = near, outside
    ordered = np.partition(candidates, dropped - below - 1)
    threshold = ordered[dropped - below - 1]
    surplus = int(np.count_nonzero(ordered[dropped - below :] == threshold))
    if not surplus:
        return Selection(float(threshold), 0, float(threshold))
    cut = int(np.flatnonzero(magnitude == threshold)[surplus - 1]) + 1
    lower = magnitude[magnitude < threshold]
    return Selection(float(threshold), cut, float(lower.max()) if lower.size else 0.0)


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
    check_form(form)
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
