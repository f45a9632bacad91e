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
from snella.kernels import Kernel, initial_factor
from snella.tuner.config import SnellaConfig
from snella.tuner.functional import merged_linear, merged_weight
from snella.update import Update, effective_weight

# Training steps seen without a hook before they are taken to be forgotten; a loaded state or a
# learning-rate finder may change the parameters a few times before training begins.
PATIENCE = 3


class SnellaLayer(BaseTunerLayer):
    """State of the SNELLA adapters of one linear layer, by adapter name."""

    adapter_layer_names = ("snella_A", "snella_B", "snella_scalars")
    other_param_names = ("snella_budget", "settings", "kernels", "scaling", "allocators", "_cache")

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
        self._cache: dict[str, tuple[tuple[Any, ...], Update]] = {}
        self._folded: tuple[tuple[Any, ...], Tensor] | None = None
        self._generation = 0
        self._trained: Update | None = None
        self._unseen_steps = 0
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
        factor_a = initial_factor(kernel, self.slices, self.in_features)
        factor_b = initial_factor(kernel, self.slices, self.out_features // self.slices)
        self.snella_A[adapter_name] = nn.Parameter(factor_a)
        self.snella_B[adapter_name] = nn.Parameter(factor_b)
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

    def hook_called(self) -> None:
        """Note that training calls the hooks, and that the parameters may have changed."""
        self._unseen_steps = 0
        self._generation += 1

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The sparse update S, shape (out, in), differentiable; in the adapter's own precision."""
        return merged_weight(None, *self._tensors(adapter_name), self._update(adapter_name))

    def _tensors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self.snella_A[adapter_name], self.snella_B[adapter_name]
        if adapter_name in self.snella_scalars:
            return a, b, self.snella_scalars[adapter_name]
        return a, b, a.new_zeros(0)

    def _update(self, adapter_name: str) -> Update:
        """The adapter's current function; its thresholds are found anew only after a change."""
        budget = self.snella_budget[adapter_name]
        # The generation covers optimizers that write through .data, which versions do not show.
        state = (
            self._generation,
            self.scaling[adapter_name],
            *((t._version, t.data_ptr()) for t in (*self._tensors(adapter_name), budget)),
        )
        cached = self._cache.get(adapter_name)
        if cached is not None and cached[0] == state:
            return cached[1]
        config = self.settings[adapter_name]
        update = Update(
            self.kernels[adapter_name],
            str(config.sparsify),
            budget.tolist(),
            self.scaling[adapter_name],
            config.keep_merged,
            config.compile,
        )
        self._cache[adapter_name] = (state, update)
        return update

    def _check_hooks(self, adapter_name: str, update: Update) -> None:
        """Raise if training goes on although nobody calls the hooks that allocation needs."""
        if update is self._trained or not self.settings[adapter_name].allocation:
            return
        self._trained = update
        self._unseen_steps += 1
        if self._unseen_steps > PATIENCE:
            raise UserError(
                "SNELLA's budget allocation needs two calls that were never made: "
                "model.on_epoch_start(epoch, epochs) before every epoch and model.on_step_end() "
                "after every optimizer.step(), before zero_grad() (with transformers' Trainer: "
                "callbacks=[SnellaCallback()]). To train without, set allocation=False."
            )

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
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._live_adapters()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if not self._learns(names):
            return F.linear(x, self._fold(names), bias)
        self._folded = None
        y = None
        for name in names:
            tensors, update = self._tensors(name), self._update(name)
            if self.training:
                self._check_hooks(name, update)
            if y is None and not self._drops(name):
                y = merged_linear(x, weight, bias, *tensors, update)
                continue
            y = self.base_layer(x) if y is None else y
            product = merged_linear(self._dropout(x, name), None, None, *tensors, update)
            y = y + self._drop_path(product, name).to(y.dtype)
        assert y is not None
        return y

    @property
    def weight(self) -> Tensor:
        """The weight that the layer applies, for modules that bypass ``forward`` (BEiT, Swin v2).

        Differentiable, but the caller's product keeps the merged matrix for backward, and dropout
        on the update does not act.
        """
        names = self._live_adapters()
        weight = self.base_layer.weight
        if not names:
            return weight
        if not self._learns(names):
            return self._fold(names)
        self._folded = None
        for name in names:
            update = self._update(name)
            if self.training:
                self._check_hooks(name, update)
            weight = merged_weight(weight, *self._tensors(name), update)
        return weight

    def _live_adapters(self) -> list[str]:
        """Adapters that act now, apart from those merged into the frozen weight."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.snella_A]

    def _learns(self, names: list[str]) -> bool:
        """Whether the update has to be differentiated, or is random because of dropout."""
        if torch.is_grad_enabled() and any(self.snella_A[name].requires_grad for name in names):
            return True
        return any(self._drops(name) for name in names)

    def _drops(self, name: str) -> bool:
        config = self.settings[name]
        return self.training and bool(self._dropout_rate(name) or config.drop_path)

    def _dropout_rate(self, name: str) -> float:
        config = self.settings[name]
        exempt = any(f".{self.key}".endswith(f".{name}") for name in config.no_dropout)
        return 0.0 if exempt else float(config.dropout or 0)

    def _dropout(self, x: Tensor, name: str) -> Tensor:
        return F.dropout(x, self._dropout_rate(name), self.training)

    def _drop_path(self, product: Tensor, name: str) -> Tensor:
        rate = float(self.settings[name].drop_path or 0)
        if not (self.training and rate > 0):
            return product
        # One decision per sample and slice, as in the released code with separate q, k and v.
        keep = torch.rand(product.shape[0], self.slices, device=product.device) >= rate
        keep = keep.to(product.dtype).div_(1 - rate)
        keep = keep.repeat_interleave(self.out_features // self.slices, dim=1)
        return product * keep.view(product.shape[0], *[1] * (product.dim() - 2), -1)

    def _fold(self, names: list[str]) -> Tensor:
        """W + S as a plain matrix, kept while nothing changes: evaluation costs what W does."""
        weight = self.base_layer.weight
        updates = [self._update(name) for name in names]
        state = (weight._version, weight.data_ptr(), *updates)
        if self._folded is None or self._folded[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                folded = weight
                for name, update in zip(names, updates, strict=True):
                    folded = effective_weight(update, folded, *self._tensors(name))
                self._folded = (state, folded.to(weight.dtype))
        return self._folded[1]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the active (or named) adapters into the frozen weight."""
        self._folded = None
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.snella_A:
                continue
            weight = self.get_base_weight()
            merged = effective_weight(self._update(name), weight, *self._tensors(name))
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
            weight.copy_(weight.to(delta.dtype) - delta)

    def __repr__(self) -> str:
        return f"snella.{super().__repr__()}"


def slices_of(key: str, config: SnellaConfig) -> int:
    """Number of matrices that the layer at path ``key`` stacks."""
    return config.fused_parts.get(key.rpartition(".")[2], 1)


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
    slices = slices_of(key, config)
    if target.out_features % slices:
        raise UserError(
            f"{key!r} has {target.out_features} outputs, which fused_parts cannot cut into "
            f"{slices} equal parts."
        )
    return SnellaLinear(target, adapter_name, config, slices, key)
