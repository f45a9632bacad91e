"""State of SNELLA adapters in one layer: A, B, kernel scalars, and the entries each slice keeps.

A fused layer (query, key and value in one weight) holds one kernel, budget and threshold per slice.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snella.backends.update import Update
from snella.equations import sparsify
from snella.equations.kernels import Kernel, initial_factor
from snella.errors import UserError
from snella.tuner.budget import Budgets
from snella.tuner.config import SnellaConfig
from snella.tuner.fold import Fold
from snella.tuner.functional import merged_weight
from snella.tuner.identity import enlarge


class SnellaLayer(BaseTunerLayer):
    """State of the SNELLA adapters of one linear layer, by adapter name."""

    adapter_layer_names = ("snella_A", "snella_B", "snella_scalars", "snella_gate")
    other_param_names = (
        "snella_budget",
        "settings",
        "kernels",
        "scaling",
        "allocators",
    )

    base_layer: Any
    key: str  # path of the layer in the model
    parameter: str  # name of the adapted parameter in the base layer

    def __init__(self, base_layer: nn.Module, slices: int, shape: tuple[int, int]) -> None:
        self.base_layer = base_layer
        self.out_features, self.in_features = shape
        self.slices = slices
        self.snella_A = nn.ParameterDict()
        self.snella_B = nn.ParameterDict()
        self.snella_scalars = nn.ParameterDict()
        self.snella_gate = nn.ParameterDict()
        self.snella_budget = Budgets()
        self.settings: dict[str, SnellaConfig] = {}
        self.kernels: dict[str, Kernel] = {}
        self.scaling: dict[str, float] = {}
        self.allocators: dict[str, Any] = {}
        self._updates: dict[str, Update] = {}
        self._folded = Fold()
        self._shared: list[nn.Parameter] = []
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
        kernel = config.kernel_of(self.key)
        self.settings[adapter_name] = config
        self.kernels[adapter_name] = kernel
        self.scaling[adapter_name] = 1.0
        self._updates.pop(adapter_name, None)
        factor_a = initial_factor(kernel, self.slices, self.in_features)
        factor_b = initial_factor(kernel, self.slices, self.out_features // self.slices)
        # One vector, so that optimizers that decay matrices only leave the scalars alone.
        scalars = torch.tensor(list(kernel.scalars.values()) * self.slices)
        if config.init_weights:
            weight = getattr(self.base_layer, self.parameter)
            enlarge(kernel, str(config.sparsify), factor_a, factor_b, scalars, weight)
            self.snella_gate[adapter_name] = nn.Parameter(torch.zeros(self.slices))
        self.snella_A[adapter_name] = nn.Parameter(factor_a)
        self.snella_B[adapter_name] = nn.Parameter(factor_b)
        if kernel.scalars:
            self.snella_scalars[adapter_name] = nn.Parameter(scalars)
        budget = sparsify.budget_from_sparsity(
            config.sparsity_at_start, self.slice_size, str(config.budget_rule)
        )
        self.snella_budget[adapter_name] = torch.full((self.slices,), budget)
        self._update(adapter_name)  # now: torch 2.11 cannot compile how it is made
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_budget(self, adapter_name: str, budget: list[int]) -> None:
        """Set the entries to keep of every slice."""
        if self.settings[adapter_name].budget_rule == "quantile":
            budget = [min(b, self.slice_size - 1) for b in budget]
        self.snella_budget[adapter_name].copy_(torch.tensor(budget))

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The sparse update S, shape (out, in), differentiable; in the adapter's own precision."""
        self._refuse_shards(adapter_name)
        delta = merged_weight(None, *self._tensors(adapter_name), self._update(adapter_name))
        gate = self._gate(adapter_name)
        return delta if gate is None else delta * self._per_output(gate).unsqueeze(1)

    def _refuse_shards(self, adapter_name: str) -> None:
        if hasattr(self.snella_A[adapter_name], "full_tensor"):
            raise UserError(
                f"{self.key}: fully_shard has left a part of the adapter on every process. Load "
                "the whole state into a plain model (get_model_state_dict with "
                "full_state_dict=True), and read or merge it there."
            )

    def _gate(self, adapter_name: str) -> Tensor | None:
        """The learned factor on S of every slice, of adapters that start at the identity."""
        return self._part("snella_gate", adapter_name)

    def _part(self, container: str, adapter_name: str) -> Tensor | None:
        """A parameter of an adapter.

        Not by attributes: modules look those up slowly, which at every layer and step adds up.
        """
        own = self.__dict__["_modules"][container].__dict__
        if adapter_name not in own["_keys"]:
            return None
        found: Tensor | None = own["_parameters"].get(adapter_name)
        return own[adapter_name] if found is None else found  # FSDP leaves plain attributes

    def _per_output(self, values: Tensor) -> Tensor:
        """(slices,) to (out,)."""
        return values.repeat_interleave(self.out_features // self.slices)

    def _tensors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, scalars and budgets."""
        a, b = self._part("snella_A", adapter_name), self._part("snella_B", adapter_name)
        if a is None or b is None:
            raise KeyError(adapter_name)
        scalars = self._part("snella_scalars", adapter_name)
        budgets = self.__dict__["_modules"]["snella_budget"][adapter_name]
        return a, b, a.new_zeros(0) if scalars is None else scalars, budgets

    def _update(self, adapter_name: str) -> Update:
        """The choices that make the adapter's function."""
        update, scale = self._updates.get(adapter_name), self.scaling[adapter_name]
        if update is None or update.scale != scale:
            config = self.settings[adapter_name]
            update = self._updates[adapter_name] = Update(
                self.kernels[adapter_name],
                str(config.sparsify),
                float(scale),
                config.keep_merged,
                config.compile,
            )
        return update

    def _watch(self, adapter_name: str) -> None:
        """Note a forward pass in training, for an adapter whose allocation needs the hooks."""
        allocator = self.allocators.get(adapter_name)
        if allocator is not None and allocator.config.allocation:
            allocator.watch.on_forward(self, adapter_name)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the update by ``scale`` (1 is as trained)."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale
            self._update(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.set_scale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo ``scale_layer``; without a scale, back to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.set_scale(name, 1.0 if scale is None else self.scaling[name] / scale)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True
