"""Gradients on training batches before training, for methods that choose what to train by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from snella.errors import UserError


def first_images(
    batches: Iterable[dict[str, Tensor]], images: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """The first ``images`` samples of ``batches``, in batches of ``batch_size``, the last less.

    The size does not follow that of ``batches``, which are cut and joined.
    """
    held: dict[str, Tensor] = {}
    left = images
    for batch in batches:
        part = {key: value[:left] for key, value in batch.items()}
        left -= _size(part)
        held = {key: torch.cat([held[key], v]) if held else v for key, v in part.items()}
        while _size(held) >= batch_size:
            yield {key: value[:batch_size] for key, value in held.items()}
            held = {key: value[batch_size:] for key, value in held.items()}
        if left == 0:
            break
    if held and _size(held):
        yield held


def _size(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def batch_gradients(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[dict[str, Tensor]],
    loss_fn: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    training: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """The gradient of each batch's loss with respect to the parameters ``names``, by name.

    Runs the model in training or evaluation mode; which parameters require gradients and the
    mode of every module are put back at the end.
    Raises :class:`~snella.errors.UserError` if no gradient arrives at all.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    required = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    live = False
    try:
        model.requires_grad_(False).train(training)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for batch in batches:
            loss = loss_fn(model, batch)
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            live = live or any(bool(gradient.any()) for gradient in gradients)
            yield dict(zip(parameters, gradients, strict=True))
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
    if not live:
        raise UserError(
            "Calibration saw no gradient: it needs training batches, and a task head whose "
            "weights are not all zero."
        )
