"""Which adapter layer a module gets: linear, convolution, embedding, attention, or a refusal."""

from __future__ import annotations

from torch import nn

from snella.errors import UserError
from snella.tuner.config import SnellaConfig
from snella.tuner.layer import SnellaLayer
from snella.tuner.linear import SnellaLinear


def slices_of(key: str, module: nn.Module, config: SnellaConfig) -> int:
    """Number of matrices that the weight of ``module`` at path ``key`` stacks."""
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else key.rpartition(".")[2]
    return config.fused_parts.get(name, 1)


def create_layer(
    target: nn.Module, adapter_name: str, config: SnellaConfig, key: str
) -> SnellaLayer:
    """Wrap one layer, or say which module cannot be adapted and why."""
    if not isinstance(target, nn.Linear) or not target.weight.is_floating_point():
        raise UserError(
            f"SNELLA adapts torch.nn.Linear with floating-point weights; {key!r} is "
            f"{type(target).__name__}. Name the linear layers in target_modules, or leave this one "
            f"out with exclude_modules=[{key!r}]."
        )
    slices = slices_of(key, target, config)
    if target.out_features % slices:
        raise UserError(
            f"{key!r} has {target.out_features} outputs, which fused_parts cannot cut into "
            f"{slices} equal parts."
        )
    return SnellaLinear(target, adapter_name, config, slices, key)
