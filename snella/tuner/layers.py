"""Which adapter layer a module gets: linear, convolution, embedding, attention, or a refusal."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import nn
from torch.nn.parameter import is_lazy

from snella.errors import UserError
from snella.tuner.config import SnellaConfig
from snella.tuner.linear import SnellaLinear
from snella.tuner.modules import layer_class
from snella.tuner.shapes import is_attention, shape_of


def slices_of(key: str, module: nn.Module, config: SnellaConfig) -> int:
    """Number of matrices that the weight of ``module`` at path ``key`` stacks."""
    name = "in_proj_weight" if is_attention(module) else key.rpartition(".")[2]
    return config.fused_parts.get(name, 1)


def create_layer(
    target: nn.Module, adapter_name: str, config: SnellaConfig, key: str, **quantization: Any
) -> SnellaLinear:
    """Wrap one layer, or say which module cannot be adapted and why.

    quantization: what PEFT's backends of quantised layers need to know.
    """
    chosen, backend = layer_class(target), resolve_quantization_backend(target, **quantization)
    if backend is not None and backend.layer_type == "linear":
        chosen = SnellaLinear
    if reason := _refusal(target, chosen, backend):
        raise UserError(
            f"SNELLA cannot adapt {key!r}, {type(target).__name__}: {reason}. Name the layers to "
            f"adapt in target_modules, or leave this one out with exclude_modules=[{key!r}]."
        )
    assert chosen is not None
    slices, (outputs, _) = slices_of(key, target, config), shape_of(target)
    if outputs % slices:
        raise UserError(
            f"{key!r} has {outputs} outputs, which fused_parts cannot cut into {slices} equal "
            "parts."
        )
    layer = chosen(target, adapter_name, config, slices, key)
    layer.quantization_backend = backend
    return layer.train(target.training)


def _refusal(
    target: nn.Module, chosen: type[SnellaLinear] | None, backend: QuantizationBackend | None
) -> str | None:
    """Why this module cannot be adapted; None if it can."""
    if isinstance(target, BaseTunerLayer):
        return "it carries an adapter of another method"
    if chosen is None:
        return (
            "it is none of nn.Linear, nn.Conv1d to 3d, nn.Embedding, transformers' Conv1D and "
            "attention with one in_proj_weight"
        )
    if isinstance(target, nn.Embedding) and (target.max_norm is not None or target.sparse):
        return "an embedding with max_norm or sparse gradients changes its own weight"
    if isinstance(target, nn.modules.conv._ConvNd) and target.transposed:
        return "transposed convolutions are not offered"
    if backend is None and chosen.parameter not in target._parameters:
        return (
            f"its {chosen.parameter} is computed anew in every forward (weight_norm, spectral_norm "
            "or another parametrization); remove that first"
        )
    weight = getattr(target, chosen.parameter)
    if is_lazy(weight):
        return "its shape is not known before the model's first forward; run that first"
    if backend is None and not weight.is_floating_point():
        return f"its weight is {weight.dtype}, by a quantisation that PEFT does not know"
    return None
