"""Weight-level competition: of a merged matrix, exactly b entries survive (paper Sec. 3.3, Eq. 13).

The b entries of largest magnitude are kept; equal magnitudes are ordered by flat index, so the choice
is deterministic. With t the largest magnitude that is dropped, the kept entries become

    paper      W · (|W| − t)     Eq. 13; the paper takes t = b-th largest, which would keep b − 1
    released   W · |W|           released code; the factor |W| counts as a constant in the gradient
    none       W                 the dense update of KLoRA

The threshold counts as a constant in every gradient, as in the released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from snella.errors import UserError, unknown

FORMS = ("paper", "released", "none")
BUDGET_RULES = ("exact", "quantile")


@dataclass(frozen=True)
class Selection:
    """Which entries survive: magnitude above ``threshold``, or equal to it at flat index < ``cut``.

    threshold: the largest dropped magnitude; −1 when nothing is dropped. A scalar tensor or float.
    cut: 0 unless entries tie at the threshold. A scalar tensor or int.
    """

    threshold: Tensor | float
    cut: Tensor | int


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


def select(merged: Tensor, budget: int) -> Selection:
    """Choose the ``budget`` largest magnitudes of one merged matrix, without a device synchronisation.

    merged: any shape, N entries; budget: 0 <= b <= N. Exact for any N.
    """
    magnitude = merged.detach().abs().flatten()
    total = magnitude.numel()
    if not 0 <= budget <= total:
        raise UserError(f"budget must lie in [0, {total}] for this matrix, got {budget}.")
    if budget == total:
        return Selection(-1.0, 0)
    threshold = magnitude.kthvalue(total - budget).values
    ties = (magnitude == threshold).cumsum(0)
    surplus = budget - (magnitude > threshold).sum()
    cut = torch.where(surplus > 0, (ties < surplus).sum() + 1, 0)
    return Selection(threshold, cut)


def keep_mask(merged: Tensor, selection: Selection) -> Tensor:
    """Boolean mask of the surviving entries, same shape as ``merged``."""
    magnitude = merged.detach().abs()
    index = torch.arange(magnitude.numel(), device=magnitude.device).view_as(magnitude)
    tied = (magnitude == selection.threshold) & (index < selection.cut)
    return (magnitude > selection.threshold) | tied


def sparsify(merged: Tensor, budget: int, form: str = "paper") -> Tensor:
    """Sparse update with exactly ``budget`` kept entries, differentiable by autograd.

    In the paper's form an entry that ties with the threshold is kept with the value 0.
    """
    check_form(form)
    if form == "none":
        return merged
    selection = select(merged, budget)
    return apply(merged, selection, form)


def apply(merged: Tensor, selection: Selection, form: str) -> Tensor:
    """Sparsify with a selection made earlier (see ``select``); differentiable by autograd."""
    kept = merged * keep_mask(merged, selection)
    if form == "released":
        return kept * merged.detach().abs()
    return kept * (merged.abs() - soft_amount(selection))


def derivative(merged: Tensor, selection: Selection, form: str) -> Tensor:
    """∂(sparsified)/∂merged, entry by entry: (2|W| − t) or |W| on kept entries, 0 elsewhere."""
    if form == "none":
        return torch.ones_like(merged)
    magnitude = merged.detach().abs()
    factor = magnitude if form == "released" else 2 * magnitude - soft_amount(selection)
    return factor * keep_mask(merged, selection)


def soft_amount(selection: Selection) -> Tensor | float:
    """The t of |W| − t: the threshold, and 0 when nothing is dropped."""
    threshold = selection.threshold
    return threshold.clamp_min(0) if isinstance(threshold, Tensor) else max(threshold, 0.0)
