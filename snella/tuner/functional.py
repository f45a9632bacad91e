"""y = x (W + S)ᵀ + bias as one autograd operation that keeps x and the low-rank matrices only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from snella.backends.scratch import Scratch
from snella.backends.update import Update, contract, effective_weight


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scalars: Tensor,
        update: Update,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            keep = update.keep and any(ctx.needs_input_grad)
            effective = effective_weight(
                update, weight, a, b, scalars, x.dtype, transient=True, keep=keep
            )
            ctx.save_for_backward(x, weight, a, b, scalars)
            ctx.update = update
            return F.linear(x, effective, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, scalars = ctx.saved_tensors
        update: Update = ctx.update
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(x.device.type, enabled=False):
            flat = grad.reshape(-1, grad.shape[-1])
            buffer = Scratch.like(flat, flat.dtype).take("dense", flat.shape[-1], x.shape[-1])
            dense = torch.mm(flat.mT, x.reshape(-1, x.shape[-1]), out=buffer)
            grad_weight = dense.clone() if needs_weight else None
            effective, (grad_a, grad_b, grad_scalars) = contract(
                update, dense, weight, a, b, scalars, needs_x, grad.dtype
            )
            grad_x = None if effective is None else grad @ effective
            grad_bias = flat.sum(0) if needs_bias else None
        return (
            grad_x,
            grad_weight,
            grad_bias,
            grad_a.to(a.dtype),
            grad_b.to(b.dtype),
            grad_scalars.reshape_as(scalars).to(scalars.dtype),
            None,
        )


class _MergedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        scalars: Tensor,
        update: Update,
    ) -> Tensor:
        ctx.save_for_backward(weight, a, b, scalars)
        ctx.update = update
        with torch.autocast(a.device.type, enabled=False):
            dtype = (a if weight is None else weight).dtype
            return effective_weight(update, weight, a, b, scalars, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, scalars = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            _, grads = contract(ctx.update, grad, weight, a, b, scalars, needs_effective=False)
        return (
            grad if ctx.needs_input_grad[0] else None,
            grads[0].to(a.dtype),
            grads[1].to(b.dtype),
            grads[2].reshape_as(scalars).to(scalars.dtype),
            None,
        )


@torch.compiler.disable
def merged_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    update: Update,
) -> Tensor:
    """x (W + S)ᵀ + bias, or x Sᵀ without a weight, with gradients for x, A, B and the scalars.

    x: (..., in); weight: (out, in); a: (slices, P, in, r/P); b: (slices, P, out/slices, r/P);
    scalars: (slices · K,). Under autocast the product runs in its type, the merge does not.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return _MergedLinear.apply(x, weight, bias, a, b, scalars, update)


@torch.compiler.disable
def merged_weight(
    weight: Tensor | None, a: Tensor, b: Tensor, scalars: Tensor, update: Update
) -> Tensor:
    """W + S, or S without a weight, with gradients; for code that wants the matrix itself."""
    return _MergedWeight.apply(weight, a, b, scalars, update)
