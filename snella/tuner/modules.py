"""SNELLA on layers other than ``nn.Linear`` whose weight, reshaped, is one matrix (out, in).

Convolutions (out, in/groups · kernel), GPT-2's ``Conv1D`` and embeddings (stored transposed), and
attention that holds query, key and value in one ``in_proj_weight``. They are called with W + S in
the place of W, so forward hooks and forwards of their own act; their product keeps W + S for
backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snella.errors import UserError
from snella.tuner.calling import call_with
from snella.tuner.config import SnellaConfig
from snella.tuner.linear import SnellaLinear
from snella.tuner.shapes import CONVOLUTIONS, is_attention
from snella.tuner.targets import matches_layers


class SnellaModule(SnellaLinear):
    """A layer that is called with its adapted weight."""

    def _forward(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        inside = [name for name in names if not self._drops(name)]
        y: Tensor = self._call({self.parameter: self._effective(inside)}, x, *args, **kwargs)
        for name in names:
            if name not in inside:
                weights = {self.parameter: self._native(self.get_delta_weight(name))}
                bias = getattr(self.base_layer, "bias", None)
                if bias is not None:
                    weights["bias"] = torch.zeros_like(bias)
                product = self._call(weights, self._dropout(x, name), *args, **kwargs)
                y = y + self._drop_path(product, name).to(y.dtype)
        return y

    def _effective(self, names: list[str]) -> Tensor:
        if self._base_matrix().is_meta and not any(self.snella_A[n].is_meta for n in names):
            raise UserError(
                f"{self.key!r}: accelerate has offloaded its weight, which with SNELLA it can do "
                "for linear layers only. Keep it on its device, or merge the adapter first."
            )
        return super()._effective(names)

    def _call(self, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return call_with(self.base_layer, weights, args, kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT's own conversion writes linear layers only; ``snella.convert_to_lora``


class SnellaConvolution(SnellaModule):
    """A convolution; a column of the matrix is one place in the kernel of one input channel."""

    def _native(self, matrix: Tensor) -> Tensor:
        return matrix.view(getattr(self.base_layer, self.parameter).shape)

    def _base_matrix(self) -> Tensor:
        return super()._base_matrix().flatten(1)

    def _drop_path(self, product: Tensor, name: str) -> Tensor:
        return _drop_samples(product, float(self.settings[name].drop_path or 0))


class SnellaConv1D(SnellaModule):
    """GPT-2's linear layer, which stores its weight as (in, out)."""

    def _native(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def _base_matrix(self) -> Tensor:
        return super()._base_matrix().T


class SnellaEmbedding(SnellaConv1D):
    """An embedding: input features are the entries of the table, output features its columns."""

    def _dropout_rate(self, name: str) -> float:
        return 0.0  # the input is an index

    def _drop_path(self, product: Tensor, name: str) -> Tensor:
        return _drop_samples(product, float(self.settings[name].drop_path or 0))


class SnellaAttention(SnellaModule):
    """``nn.MultiheadAttention``, and others with query, key and value in one ``in_proj_weight``.

    The projection after attention carries an adapter of its own. Dropout on the update does not act
    on query, key and value (a warning says so).
    """

    parameter = "in_proj_weight"

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SnellaConfig, slices: int, key: str
    ) -> None:
        super().__init__(base_layer, adapter_name, config, slices, key)
        self._adapt_projection(adapter_name, config)

    def update_layer(
        self, adapter_name: str, config: SnellaConfig, inference_mode: bool = False
    ) -> None:
        super().update_layer(adapter_name, config, inference_mode)
        projection = self.base_layer.out_proj
        if isinstance(projection, SnellaLinear):
            projection.update_layer(adapter_name, config, inference_mode)
        elif len(self.snella_A) > 1:  # the first adapter's is made when this layer is complete
            self._adapt_projection(adapter_name, config)

    def _adapt_projection(self, adapter_name: str, config: SnellaConfig) -> None:
        base, key = self.base_layer, f"{self.key}.out_proj"
        if isinstance(base.out_proj, nn.Linear) and matches_layers(config, key):
            base.out_proj = SnellaLinear(base.out_proj, adapter_name, config, 1, key)

    def _forward(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        self._warn_of_dropout(names)
        return self._call({self.parameter: self._effective(names)}, *args, **kwargs)

    def _hidden(self) -> bool:
        return False

    @property
    def in_proj_weight(self) -> Tensor:
        """For modules that read it instead of calling the attention."""
        return self.weight

    @property
    def bias(self) -> Tensor:
        bias: Tensor = self.base_layer.in_proj_bias
        return bias

    def __getattr__(self, name: str) -> Any:
        """What the modules around an attention ask it for: its heads, its projection, its sizes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The attention without adapters; called by PEFT."""
        projection = self.base_layer.out_proj
        if merge:
            self.merge(safe_merge, adapter_names)
        if isinstance(projection, SnellaLinear):
            if merge:
                projection.merge(safe_merge, adapter_names)
            self.base_layer.out_proj = projection.get_base_layer()
        base: nn.Module = self.base_layer
        return base


def layer_class(target: nn.Module) -> type[SnellaLinear] | None:
    """The adapter layer for this module; None where there is none."""
    if isinstance(target, nn.Linear):
        return SnellaLinear
    if isinstance(target, Conv1D):
        return SnellaConv1D
    if isinstance(target, CONVOLUTIONS):
        return SnellaConvolution
    if isinstance(target, nn.Embedding):
        return SnellaEmbedding
    return SnellaAttention if is_attention(target) else None


def _drop_samples(product: Tensor, rate: float) -> Tensor:
    """Stochastic depth of whole samples, the first axis of ``product``."""
    keep = torch.rand(product.shape[0], *[1] * (product.dim() - 1), device=product.device) >= rate
    return product * keep.to(product.dtype).div_(1 - rate)
