"""A linear layer with SNELLA adapters: y = x (W + S)ᵀ + bias, S the sparsified merged matrix.

A fused layer (query, key and value in one weight) holds one kernel, budget and threshold per slice.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from snella import sparsify
from snella.errors import UserError
from snella.kernels import Kernel, initial_factor, merge
from snella.tuner.config import SnellaConfig


class SnellaLayer(BaseTunerLayer):
    """State of the SNELLA adapters of one linear layer, by adapter name."""

    adapter_layer_names = ("snella_A", "snella_B", "snella_scalars")
    other_param_names = ("snella_budget", "settings", "kernels", "scaling", "allocators", "steps_without_hook")

    def __init__(self, base_layer: nn.Linear, slices: int) -> None:
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.slices = slices
        self.snella_A = nn.ParameterDict()
        self.snella_B = nn.ParameterDict()
        self.snella_scalars = nn.ParameterDict()
        self.snella_budget = BufferDict(persistent=True)
        self.settings: dict[str, SnellaConfig] = {}
        self.kernels: dict[str, Kernel] = {}
        self.scaling: dict[str, float] = {}
        self.allocators: dict[str, Any] = {}
        self.steps_without_hook: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def slice_size(self) -> int:
        """Entries of one slice's weight matrix, N_l."""
        return self.in_features * self.out_features // self.slices

    def update_layer(
        self, adapter_name: str, config: SnellaConfig, inference_mode: bool = False
    ) -> None:
        """Create a fresh adapter of this name."""
        kernel = config.merge_kernel
        self.settings[adapter_name] = config
        self.kernels[adapter_name] = kernel
        self.scaling[adapter_name] = 1.0
        out_features = self.out_features // self.slices
        self.snella_A[adapter_name] = nn.Parameter(
            initial_factor(kernel, self.slices, self.in_features)
        )
        self.snella_B[adapter_name] = nn.Parameter(
            initial_factor(kernel, self.slices, out_features)
        )
        if kernel.scalars:
            # One vector, so that optimizers that decay matrices only leave the scalars alone.
            values = torch.tensor(list(kernel.scalars.values()) * self.slices)
            self.snella_scalars[adapter_name] = nn.Parameter(values)
        budget = sparsify.budget_from_sparsity(
            config.sparsity_at_start, self.slice_size, str(config.budget_rule)
        )
        self.snella_budget[adapter_name] = torch.full((self.slices,), budget)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_budget(self, adapter_name: str, budget: list[int]) -> None:
        """Set the entries to keep of every slice."""
        if self.settings[adapter_name].budget_rule == "quantile":
            budget = [min(b, self.slice_size - 1) for b in budget]
        self.snella_budget[adapter_name].copy_(torch.tensor(budget))

    def _scalars(self, adapter_name: str) -> Tensor:
        """Kernel scalars as (slices, K)."""
        if adapter_name in self.snella_scalars:
            return self.snella_scalars[adapter_name].view(self.slices, -1)
        return self.snella_A[adapter_name].new_zeros(self.slices, 0)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The sparse update S, shape (out, in), differentiable; in the adapter's own precision."""
        merged = merge(
            self.kernels[adapter_name],
            self.snella_A[adapter_name],
            self.snella_B[adapter_name],
            self._scalars(adapter_name),
        )
        form = str(self.settings[adapter_name].sparsify)
        budgets = self.snella_budget[adapter_name].tolist()
        slices = [sparsify.sparsify(w, b, form) for w, b in zip(merged, budgets, strict=True)]
        return torch.cat(slices) * self.scaling[adapter_name]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the update by ``scale`` (1 is as trained)."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo ``scale_layer``; without a scale, back to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class SnellaLinear(nn.Module, SnellaLayer):
    """``nn.Linear`` with SNELLA adapters."""

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, config: SnellaConfig, slices: int, key: str
    ) -> None:
        super().__init__()
        SnellaLayer.__init__(self, base_layer, slices)
        self.key = key
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.snella_A]
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        weight = self.base_layer.weight
        y = self.base_layer(x)
        for name in names:
            delta = self.get_delta_weight(name).to(weight.dtype)
            config = self.settings[name]
            update = F.linear(self._drop_input(x, config), delta)
            y = y + self._drop_path(update, config)
        return y

    def _drop_input(self, x: Tensor, config: SnellaConfig) -> Tensor:
        exempt = any(self.key.endswith(suffix) for suffix in config.no_dropout)
        return x if exempt else F.dropout(x, float(config.dropout or 0), self.training)

    def _drop_path(self, update: Tensor, config: SnellaConfig) -> Tensor:
        rate = float(config.drop_path or 0)
        if not (self.training and rate > 0):
            return update
        # One decision per sample and slice, as in the released code with separate q, k and v.
        keep = torch.rand(update.shape[0], self.slices, device=update.device) >= rate
        keep = keep.to(update.dtype).div_(1 - rate)
        keep = keep.repeat_interleave(self.out_features // self.slices, dim=1)
        return update * keep.view(update.shape[0], *[1] * (update.dim() - 2), -1)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the active (or named) adapters into the frozen weight."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.snella_A:
                continue
            weight = self.get_base_weight()
            merged = (weight + self.get_delta_weight(name)).to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"{self.key}: adapter {name!r} is not finite; it was not merged.")
            weight.copy_(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged adapters again."""
        if not self.merged:
            warnings.warn(f"{self.key} is not merged; nothing to do.", stacklevel=2)
        weight = self.get_base_weight()
        while self.merged_adapters:
            delta = self.get_delta_weight(self.merged_adapters.pop())
            weight.copy_((weight - delta).to(weight.dtype))

    def __repr__(self) -> str:
        return f"snella.{super().__repr__()}"


def create_layer(
    target: nn.Module, adapter_name: str, config: SnellaConfig, key: str
) -> SnellaLinear:
    """Wrap one linear layer, or say which module cannot be adapted and why."""
    if not isinstance(target, nn.Linear) or not target.weight.is_floating_point():
        raise UserError(
            f"SNELLA adapts torch.nn.Linear with floating-point weights; {key!r} is "
            f"{type(target).__name__}. Name the linear layers in target_modules, or leave this one "
            f"out with exclude_modules=[{key!r}]."
        )
    slices = config.fused_parts.get(key.rpartition(".")[2], 1)
    if target.out_features % slices:
        raise UserError(
            f"{key!r} has {target.out_features} outputs, which fused_parts cannot cut into "
            f"{slices} equal parts."
        )
    return SnellaLinear(target, adapter_name, config, slices, key)
