"""One optimizer step: the only place where a model is trained.

The trainer, ``snella check``, pre-training and the benchmarks all step through here, so that what
is certified and measured is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from snella.methods.base import Batch, LossFn, Method, wrong_result


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    loss: LossFn,
    *,
    method: Method | None = None,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    clip_grad: float | None = None,
    after_backward: Callable[[], object] = lambda: None,
) -> Tensor:
    """Take one step on the mean loss of ``batches`` (more than one accumulate gradients).

    Args:
        loss: (model, batch) -> a scalar, the mean over the batch.
        method: its ``auxiliary_loss`` is added, its ``on_step_end`` called at the end.
        precision: makes the context of the forward pass, e.g. autocast.
        scaler: for fp16; a step whose gradients overflow is skipped, as torch does.
        clip_grad: largest norm of all gradients together.
        after_backward: called while the step's gradients are alive and unclipped.

    Returns:
        The mean of the task's losses without the auxiliary ones, a detached scalar.
    """
    optimizer.zero_grad(set_to_none=True)
    seen: list[Tensor] = []
    for batch in batches:
        with precision():
            value = loss(model, batch)
            extra = None if method is None else _auxiliary(method, model, batch, loss)
        objective = value if extra is None else value + extra
        if len(batches) > 1:
            objective = objective / len(batches)
        (objective if scaler is None else scaler.scale(objective)).backward()
        seen.append(value.detach())
    if scaler is not None:
        scaler.unscale_(optimizer)
    after_backward()
    if clip_grad:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip_grad)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if method is not None:
        method.on_step_end(model)
    return seen[0] if len(seen) == 1 else torch.stack(seen).mean()


def _auxiliary(method: Method, model: nn.Module, batch: Batch, loss: LossFn) -> Tensor | None:
    extra = method.auxiliary_loss(model, batch, loss)
    if extra is not None and not (isinstance(extra, Tensor) and extra.numel() == 1):
        raise wrong_result(method, "auxiliary_loss", "it must return a scalar tensor or None")
    return extra
