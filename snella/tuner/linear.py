"""A linear layer with SNELLA adapters: y = x (W + S)ᵀ + bias, S the sparsified merged matrix."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from snella.backends.update import effective_weight
from snella.tuner.config import SnellaConfig
from snella.tuner.functional import merged_linear, merged_weight
from snella.tuner.layer import SnellaLayer, identity


class SnellaLinear(nn.Module, SnellaLayer):
    """``nn.Linear`` with SNELLA adapters."""

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, config: SnellaConfig, slices: int, key: str
    ) -> None:
        super().__init__()
        SnellaLayer.__init__(self, base_layer, slices)
        self.key = key
        self._active_adapter = adapter_name
        self._warned = False
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._live_adapters()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if self._folds(names):
            return F.linear(x, self._fold(names), bias)
        self._folded = None
        y = None
        for name in names:
            tensors, update = self._tensors(name), self._update(name)
            if torch.is_grad_enabled():
                self._watch(name)
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
        if self._folds(names):
            return self._fold(names)
        self._folded = None
        for name in names:
            update = self._update(name)
            if torch.is_grad_enabled():
                self._watch(name)
            if self._drops(name) and not self._warned:
                self._warned = True
                warnings.warn(
                    f"The module around {self.key!r} reads its weight instead of calling it: "
                    "dropout on the SNELLA update has no effect there.",
                    stacklevel=2,
                )
            weight = merged_weight(weight, *self._tensors(name), update)
        return weight

    def _live_adapters(self) -> list[str]:
        """Adapters that act now, apart from those merged into the frozen weight."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.snella_A]

    def _folds(self, names: list[str]) -> bool:
        """Whether one plain matrix does: no gradient for the update, and no dropout on it."""
        if any(self._drops(name) for name in names):
            return False
        if torch.is_grad_enabled():
            return not any(t.requires_grad for name in names for t in self._tensors(name))
        # Training without gradients is a checkpointed forward; keeping matrices would undo it.
        return not self.training

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
        state = (identity(weight), *updates)
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
