"""A LoRA adapter as the starting point of SNELLA: factors whose sparse update comes near BA.

With x·y ≈ (‖x + y‖ − ‖x − y‖) · R / 2 for points whose distance from each other is about R (one
coordinate of every piece keeps them apart), a pair of pieces is a bilinear form, and so any matrix
of rank r/P − 1. The paper's sparsification squares, so the matrix to meet is the signed square root
of BA, which has high rank; gradient steps on the factors then lower the error that the cut leaves.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from snella.equations.kernels import Kernel, merge
from snella.equations.sparsify import sparsify
from snella.errors import UserError
from snella.tuner.config import SnellaConfig
from snella.tuner.layer import SnellaLayer

# Relative error of the bilinear form that the choice of R allows before the gradient steps.
_CURVATURE = 0.02


@dataclass
class LoraImport:
    """A model with the SNELLA adapter, and how far its update is from that of LoRA.

    errors: ‖S − BA‖ / ‖BA‖ (Frobenius) of every adapted layer; error: the same over all layers.
    """

    model: PeftModel
    errors: dict[str, float]
    error: float


def convert_from_lora(
    model: nn.Module,
    config: SnellaConfig | None = None,
    adapter_name: str = "default",
    steps: int = 200,
) -> LoraImport:
    """Replace the LoRA adapter of ``model`` by a SNELLA adapter that starts near it.

    model: a ``PeftModel``, or a model of transformers or diffusers, with the LoRA loaded (by
    whichever loader reads its format), not merged; its LoRA layers are taken out. config: of the
    new adapter, whose targets are LoRA's layers; None: rank eight times LoRA's, at most 64. steps:
    gradient steps per layer. Raises ``UserError`` if there is no such LoRA adapter, or for a kernel
    that has no start near it.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    updates = {
        name: _delta(layer, adapter_name)
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A
    }
    if not updates:
        raise UserError(f"The model has no LoRA adapter called {adapter_name!r} on linear layers.")
    others = [n for n, m in base.named_modules() if isinstance(m, LoraLayer) and n not in updates]
    if others:
        raise UserError(
            f"LoRA on {others[0]!r} cannot be converted: it is no linear or convolutional layer, "
            "or of another adapter. Delete that adapter first (delete_adapter)."
        )
    ranks = [m.r[adapter_name] for m in base.modules() if isinstance(m, LoraLayer)]
    config = copy.copy(config) if config else SnellaConfig(rank=min(64, 8 * max(ranks)))
    if config.kernel not in ("mix-k", "piecewise-linear", "linear") or config.pieces == 1:
        raise UserError(
            f"Kernel {config.kernel!r} with {config.pieces} piece(s) has no start near a LoRA "
            "adapter: choose mix-k or piecewise-linear with two pieces or more, or linear."
        )
    for name, layer in list(base.named_modules()):
        if isinstance(layer, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config
    config.target_modules, config.init_weights = set(updates), False
    adapted = get_peft_model(base, config)
    layers = dict(adapted.get_base_model().named_modules())
    errors, lost, total = {}, 0.0, 0.0
    for name, delta in updates.items():
        layer = layers[name]
        assert isinstance(layer, SnellaLayer)
        _fit(layer, delta, steps)
        difference = float((layer.get_delta_weight("default") - delta).double().square().sum())
        size = float(delta.double().square().sum())
        errors[name] = (difference / size) ** 0.5 if size else 0.0
        lost, total = lost + difference, total + size
    return LoraImport(adapted, errors, (lost / total) ** 0.5 if total else 0.0)


def _delta(layer: Any, adapter_name: str) -> Tensor:
    """BA of one LoRA layer, as a matrix."""
    delta: Tensor = layer.get_delta_weight(adapter_name).detach()
    return delta.flatten(1)


def _fit(layer: SnellaLayer, delta: Tensor, steps: int) -> None:
    """Set A, B and the scalars of one layer so that its update is near ``delta``, (out, in)."""
    kernel, config = layer.kernels["default"], layer.settings["default"]
    a, b = layer.snella_A["default"], layer.snella_B["default"]
    scalars = layer.snella_scalars["default"] if kernel.scalars else a.new_zeros(0)
    target = delta.to(a.dtype).reshape(layer.slices, -1, delta.shape[1])
    budgets = layer.snella_budget["default"].tolist()
    with torch.no_grad():
        _bilinear(kernel, a, b, scalars.view(layer.slices, -1), _before(target, config.sparsify))
    if not target.any():
        return
    own = [t for t in (a, b, scalars) if t.numel()]
    # Copies: an optimizer's steps on the adapter's own tensors would count as its training.
    a, b, scalars = (t.detach().clone().requires_grad_() for t in (a, b, scalars))
    trained = [t for t in (a, b, scalars) if t.numel()]
    rates = [0.001 * float(t.detach().abs().mean()) for t in trained]
    groups = [{"params": [t], "lr": rate} for t, rate in zip(trained, rates, strict=True)]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    best, kept = torch.inf, [t.detach().clone() for t in trained]
    for step in range(steps + 1):
        with torch.enable_grad():
            merged = merge(kernel, a, b, scalars.view(layer.slices, -1))
            parts = [
                sparsify(m, n, str(config.sparsify)) for m, n in zip(merged, budgets, strict=True)
            ]
            loss = (torch.stack(parts) - target).square().sum() / target.square().sum()
            gradients = torch.autograd.grad(loss, trained)
        if float(loss.detach()) < best:
            best, kept = float(loss.detach()), [t.detach().clone() for t in trained]
        if step < steps:
            for tensor, gradient in zip(trained, gradients, strict=True):
                tensor.grad = gradient
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        for tensor, value in zip(own, kept, strict=True):
            tensor.copy_(value)


def _before(update: Tensor, form: str | None) -> Tensor:
    """The dense matrix of which nothing is dropped and whose sparse form is ``update``."""
    return update if form == "none" else update.sign() * update.abs().sqrt()


def _bilinear(kernel: Kernel, a: Tensor, b: Tensor, scalars: Tensor, target: Tensor) -> None:
    """Start from the best approximation of ``target``, (slices, out, in), that A and B can hold.

    An odd piece out, and pieces of one coordinate, keep their random start.
    """
    pairs, width = kernel.pieces // 2, kernel.coordinates - 1
    if kernel.name == "linear":
        pairs, width = 1, kernel.rank
    elif width == 0:
        return
    u, s, v = torch.linalg.svd(target.double(), full_matrices=False)
    rank = min(pairs * width, s.shape[1])
    root = s[:, None, :rank].sqrt()
    left, right = u[:, :, :rank] * root, v[:, :rank].mT * root  # (slices, out | in, rank)
    a.zero_()
    b.zero_()
    if kernel.name == "linear":
        a[:, 0, :, :rank], b[:, 0, :, :rank] = right.to(a.dtype), left.to(b.dtype)
        return
    reach = float((left.norm(dim=-1).amax() + right.norm(dim=-1).amax()).square()) or 1.0
    coefficients = [k for k in kernel.scalars if k.startswith("coefficient")]
    for pair in range(pairs):
        part = slice(pair * width, min((pair + 1) * width, rank))
        size = part.stop - part.start
        # c (‖x − y‖ − ‖x + y‖) ≈ −2 c x·y / R; learnable c leaves A and B of order 1.
        c = max(0.1, reach / (2 * _CURVATURE)) if coefficients else 0.1
        distance = 1.0 if coefficients else reach / (2 * _CURVATURE * c)
        scale = (distance / (2 * c)) ** 0.5
        for piece, sign in ((2 * pair, -1.0), (2 * pair + 1, 1.0)):
            a[:, piece, :, :size] = (scale * right[:, :, part]).to(a.dtype)
            b[:, piece, :, :size] = (sign * scale * left[:, :, part]).to(b.dtype)
            a[:, piece, :, -1] = distance
            if coefficients:
                scalars[:, kernel.scalar_index[f"coefficient_{piece}"]] = c if sign < 0 else -c
    if kernel.name == "mix-k":
        scalars[:, kernel.scalar_index["scale"]] = 0.0
