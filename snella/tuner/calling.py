"""Calls of a module with other tensors in the place of its parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(
    module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``module(*args, **kwargs)`` with these tensors; its hooks and its own forward act.

    FSDP keeps parameters as plain attributes during a forward, where ``functional_call`` would put
    the tensors without effect.
    """
    views = {name: module.__dict__[name] for name in tensors if name in module.__dict__}
    if not views:
        return functional_call(module, tensors, args, kwargs)
    module.__dict__.update({name: tensors[name] for name in views})
    try:
        rest = {name: tensor for name, tensor in tensors.items() if name not in views}
        return functional_call(module, rest, args, kwargs)
    finally:
        module.__dict__.update(views)
