"""y = x (W + S)ᵀ + bias as one autograd operation that keeps x and the low-rank matrices only.

Eagerly an ``autograd.Function``, whose overhead is small. Under ``torch.compile`` and
``torch.export`` registered operators stand in for it, which the compiler need not look into.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from snella.backends.dispatch import contract, effective_weight, found_like
from snella.backends.scratch import Scratch
from snella.backends.update import Factors, Found, Update, from_spec
from snella.errors import UserError


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, tensors: Factors, update: Update
) -> tuple[Tensor, Found]:
    effective, found = effective_weight(update, weight, *tensors, x.dtype, transient=True)
    return F.linear(x, effective, None if bias is None else bias.to(x.dtype)), found


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    tensors: tuple[Tensor, Tensor, Tensor],
    found: Found,
    update: Update,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, W, bias, A, B and the scalars; needs: of the first three, which."""
    flat = grad.reshape(-1, grad.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        dense = torch.mm(flat.mT, rows)
    else:
        buffer = Scratch.like(flat, flat.dtype).take("dense", flat.shape[-1], x.shape[-1])
        dense = torch.mm(flat.mT, rows, out=buffer)
    grad_weight = dense.to(weight.dtype, copy=True) if needs[1] and weight is not None else None
    effective, grads = contract(update, found, dense, weight, *tensors, needs[0], grad.dtype)
    grad_x = None if effective is None else torch.mm(flat, effective).view_as(x)
    return grad_x, grad_weight, flat.sum(0) if needs[2] else None, *_like(grads, tensors)


def _like(gradients: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In the types of A, B and the scalars."""
    pairs = zip(gradients, tensors, strict=False)
    return tuple(g if g.dtype == t.dtype else g.to(t.dtype) for g, t in pairs)


def exactly(device: str) -> AbstractContextManager[Any]:
    """The precision of every operation is its operands'."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


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
        budgets: Tensor,
        update: Update,
    ) -> Tensor:
        y, found = _forward(x, weight, bias, (a, b, scalars, budgets), update)
        # Not the budgets: they may have changed by then, and what counts is what was found.
        ctx.save_for_backward(x, weight, a, b, scalars, found.selection, found.constants)
        ctx.update, ctx.tiles = update, found.tiles
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, scalars, selection, constants = ctx.saved_tensors
        factors, found = (a, b, scalars), Found(selection, constants, ctx.tiles)
        needs = ctx.needs_input_grad[:3]
        with exactly(x.device.type):
            grads = _backward(grad, x, weight, factors, found, ctx.update, needs)
        return *grads, None, None


class _MergedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        scalars: Tensor,
        budgets: Tensor,
        update: Update,
    ) -> Tensor:
        with exactly(a.device.type):
            dtype = (a if weight is None else weight).dtype
            effective, found = effective_weight(update, weight, a, b, scalars, budgets, dtype)
        ctx.save_for_backward(a, b, scalars, found.selection, found.constants)
        ctx.update, ctx.tiles = update, found.tiles
        return effective

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scalars, selection, constants = ctx.saved_tensors
        factors, found = (a, b, scalars), Found(selection, constants, ctx.tiles)
        with exactly(grad.device.type):
            _, grads = contract(ctx.update, found, grad, None, *factors, needs_effective=False)
        needed = grad if ctx.needs_input_grad[0] else None
        return needed, *_like(grads, factors), None, None


def merged_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    budgets: Tensor,
    update: Update,
) -> Tensor:
    """x (W + S)ᵀ + bias, or x Sᵀ without a weight, with gradients for x, A, B and the scalars.

    x: (..., in); weight: (out, in); a: (slices, P, in, r/P); b: (slices, P, out/slices, r/P);
    scalars: (slices · K,); budgets: (slices,), entries to keep. Under autocast the product runs in
    its type, the merge does not.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which autocast spares
        x = x.to(torch.get_autocast_dtype(device))
    tensors = x, weight, bias, a, b, scalars, budgets
    y: Tensor
    if not torch.compiler.is_compiling():
        _refuse_transforms()
        y = _MergedLinear.apply(*tensors, update)
    elif update.kernel.is_piecewise:
        y = _linear_operator(*tensors, update.spec)[0]
    else:
        y = _uncompiled(_MergedLinear, *tensors, update)
    return y


def merged_weight(
    weight: Tensor | None, a: Tensor, b: Tensor, scalars: Tensor, budgets: Tensor, update: Update
) -> Tensor:
    """W + S, or S without a weight, with gradients; for code that wants the matrix itself."""
    tensors = weight, a, b, scalars, budgets
    merged: Tensor
    if not torch.compiler.is_compiling():
        _refuse_transforms()
        merged = _MergedWeight.apply(*tensors, update)
    elif update.kernel.is_piecewise:
        merged = _weight_operator(*tensors, update.spec)[0]
    else:
        merged = _uncompiled(_MergedWeight, *tensors, update)
    return merged


def _refuse_transforms() -> None:
    """torch's own error names none of what its user has called."""
    if torch._C._are_functorch_transforms_active():
        raise UserError(
            "SNELLA's own derivatives cannot be transformed by torch.func (vmap, grad, per-sample "
            "gradients): call backward once per sample, or merge the adapter (merge_and_unload) if "
            "it does not train."
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(function: Any, *arguments: Any) -> Tensor:
    """Other kernels differentiate by autograd, which an operator cannot use: the graph breaks."""
    return function.apply(*arguments)  # type: ignore[no-any-return]


# The same two as operators. Their other results are what was found.


@torch.library.custom_op("snella::linear", mutates_args=())
def _linear_operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    budgets: Tensor,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with exactly(x.device.type):
        y, found = _forward(x, weight, bias, (a, b, scalars, budgets), from_spec(spec))
    return y, found.selection, found.constants


@_linear_operator.register_fake
def _(x, weight, bias, a, b, scalars, budgets, spec):  # type: ignore[no-untyped-def]
    found = found_like(from_spec(spec), a, b)
    y = x.new_empty(*x.shape[:-1], b.shape[0] * b.shape[2])
    return y, found.selection, found.constants


@torch.library.custom_op("snella::linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    selection: Tensor,
    constants: Tensor,
    needs: list[bool],
    spec: str,
) -> list[Tensor]:
    tensors, found = (a, b, scalars), Found(selection, constants)
    with exactly(x.device.type):
        grads = _backward(grad, x, weight, tensors, found, from_spec(spec), tuple(needs))
    return [g for g in grads if g is not None]


@_linear_backward.register_fake
def _(grad, x, weight, a, b, scalars, selection, constants, needs, spec):  # type: ignore[no-untyped-def]
    grads = [torch.empty_like(x)] if needs[0] else []
    grads += [torch.empty_like(weight)] if needs[1] and weight is not None else []
    grads += [grad.new_empty(grad.shape[-1])] if needs[2] else []
    return grads + [torch.empty_like(t) for t in (a, b, scalars)]


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, a, b, scalars, _, ctx.spec = inputs
    ctx.save_for_backward(x, weight, a, b, scalars, *output[1:])


def _differentiate_linear(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    needs[1] = needs[1] and ctx.saved_tensors[1] is not None
    found = iter(_linear_backward(grad, *ctx.saved_tensors, needs, ctx.spec))
    return *(next(found) if need else None for need in (*needs, True, True, True)), None, None


_linear_operator.register_autograd(_differentiate_linear, setup_context=_save_linear)


@torch.library.custom_op("snella::weight", mutates_args=())
def _weight_operator(
    weight: Tensor | None, a: Tensor, b: Tensor, scalars: Tensor, budgets: Tensor, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = (a if weight is None else weight).dtype
    update = from_spec(spec)
    effective, found = effective_weight(update, weight, a, b, scalars, budgets, dtype)
    return effective, found.selection, found.constants


@_weight_operator.register_fake
def _(weight, a, b, scalars, budgets, spec):  # type: ignore[no-untyped-def]
    found = found_like(from_spec(spec), a, b)
    like = a if weight is None else weight
    effective = like.new_empty(b.shape[0] * b.shape[2], a.shape[2])
    return effective, found.selection, found.constants


@torch.library.custom_op("snella::weight_backward", mutates_args=())
def _weight_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    selection: Tensor,
    constants: Tensor,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    found, tensors = Found(selection, constants), (a, b, scalars)
    _, grads = contract(from_spec(spec), found, grad, None, *tensors, needs_effective=False)
    grad_a, grad_b, grad_scalars = _like(grads, tensors)
    return grad_a, grad_b, grad_scalars


@_weight_backward.register_fake
def _(grad, a, b, scalars, selection, constants, spec):  # type: ignore[no-untyped-def]
    return torch.empty_like(a), torch.empty_like(b), torch.empty_like(scalars)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, a, b, scalars, _, ctx.spec = inputs
    ctx.save_for_backward(a, b, scalars, *output[1:])


def _differentiate_weight(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = _weight_backward(grad, *ctx.saved_tensors, ctx.spec)
    return grad if ctx.needs_input_grad[0] else None, *grads, None, None


_weight_operator.register_autograd(_differentiate_weight, setup_context=_save_weight)
