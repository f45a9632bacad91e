"""Who computes a layer's update: Triton kernels, compiled loops, or torch operations."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from snella.backends import cpu, gpu, plain
from snella.backends.update import Found, Gradients, Update, compute_type


def backend(update: Update, a: Tensor) -> ModuleType:
    """The module that computes this update for such parameters."""
    for candidate in (gpu, cpu):
        if candidate.usable(update, a):
            return candidate
    return plain


def found_like(update: Update, a: Tensor, b: Tensor) -> Found:
    """Uninitialised memory of the shapes that ``effective_weight`` returns."""
    return backend(update, a).found_like(update, a, b)  # type: ignore[no-any-return]


def effective_weight(
    update: Update,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    budgets: Tensor,
    dtype: torch.dtype | None = None,
    transient: bool = False,
) -> tuple[Tensor, Found]:
    """W + S, shape (out, in), or S alone without a weight; not differentiable. And what was found.

    Shapes as in ``equations.kernels.merge``, with scalars (slices · K) and budgets (slices), the
    integers of entries to keep. In the evaluation precision (see ``compute_type``), so that a small
    update survives the sum; or in ``dtype``, rounded once. transient: it may lie in memory that the
    next call uses again.
    """
    tensors = weight, a, b, scalars, budgets, dtype or compute_type(a), transient
    chosen = backend(update, a)
    if chosen is gpu:
        try:
            return gpu.effective_weight(update, *tensors)
        except gpu.Broken:
            chosen = backend(update, a)
    # Under autocast a product of torch's would be rounded.
    with torch.autocast(a.device.type, enabled=False):
        return chosen.effective_weight(update, *tensors)  # type: ignore[no-any-return]


def contract(
    update: Update,
    found: Found,
    dense: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    needs_effective: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Gradients]:
    """W + S again (if needed), and ∂L/∂(W + S) contracted into gradients of A, B and scalars.

    found: by the ``effective_weight`` of the same parameters. W + S is transient, in ``dtype``.
    """
    rest = dense, weight, a, b, scalars, needs_effective, dtype or compute_type(a)
    if found.selection.dtype != gpu.SELECTION_TYPE:
        compute = cpu.contract if found.constants.numel() else plain.contract
        return compute(update, found, *rest)
    try:
        return gpu.contract(update, found, *rest)
    except gpu.Broken:  # since the forward; its thresholds are of the kernels' rounding
        tensors = weight, a, b, scalars
        _, again = effective_weight(update, *tensors, gpu.budgets_of(found))
        return contract(update, again, dense, *tensors, needs_effective, dtype)
