"""Optimizers by name: torch's own, and 8-bit Adam where bitsandbytes is installed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from snella.errors import UserError, unknown

OTHERS = ("Optimizer", "LBFGS", "SparseAdam")
"""Those that take no plain step: their base, one that calls a closure, one of sparse gradients."""
EIGHT_BIT = {"adam8bit": "Adam8bit", "adamw8bit": "AdamW8bit"}


def optimizer_names() -> dict[str, str]:
    """All names, lower case, with the class each stands for."""
    own = {
        name.lower(): name
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and name not in OTHERS
    }
    return {**own, **EIGHT_BIT}


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    lr: float,
    momentum: float = 0.9,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """The optimizer ``name`` on parameter ``groups``; ``momentum`` is used by SGD and RMSprop.

    Fused where torch offers it: one pass over all parameters, which on small models saves several
    per cent of a step; not with ``fused=False``, for a fused optimizer hides from its hooks which
    steps a gradient scaler left out. Raises :class:`~snella.errors.UserError` for an unknown name,
    or 8-bit without bitsandbytes.
    """
    names = optimizer_names()
    if name not in names:
        raise unknown("optimizer", name, names)
    if name in EIGHT_BIT:
        return _eight_bit(EIGHT_BIT[name], groups, lr)
    cls = getattr(torch.optim, names[name])
    known = inspect.signature(cls).parameters
    extra: dict[str, Any] = {"momentum": momentum} if "momentum" in known else {}
    if fused and "fused" in known and all(map(_fusible, (p for g in groups for p in g["params"]))):
        extra["fused"] = True
    built: torch.optim.Optimizer = cls(groups, lr=lr, **extra)
    return built


def _fusible(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")


def _eight_bit(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise UserError(
            f"Optimizer {name} needs bitsandbytes, which is not installed; install it or use "
            "`optimizer: adamw`."
        ) from error
    built: torch.optim.Optimizer = getattr(optim, name)(groups, lr=lr)
    return built
