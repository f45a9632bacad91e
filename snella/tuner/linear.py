"""A linear layer with SNELLA adapters: y = x (W + S)ᵀ + bias, S the sparsified merged matrix."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from snella.backends.dispatch import effective_weight
from snella.errors import UserError
from snella.tuner import offloading
from snella.tuner.calling import call_with
from snella.tuner.config import SnellaConfig
from snella.tuner.functional import merged_linear, merged_weight
from snella.tuner.layer import SnellaLayer
from snella.tuner.shapes import shape_of


class SnellaLinear(nn.Module, SnellaLayer):
    """``nn.Linear`` with SNELLA adapters."""

    base_layer: Any

    parameter = "weight"  # name of the adapted parameter in the base layer

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SnellaConfig, slices: int, key: str
    ) -> None:
        super().__init__()
        SnellaLayer.__init__(self, base_layer, slices, shape_of(base_layer))
        self.key = key
        self._active_adapter = adapter_name
        self._warned = False
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self._live_adapters()
        if not names:
            return self.base_layer(*args, **kwargs)
        with offloading.loaded(self):
            return self._forward(names, *args, **kwargs)

    def _forward(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = self.__dict__["_modules"]["base_layer"]  # see ``_part``
        absent = self._hidden()
        if not absent and self._folds(names):
            weight = self._fold(names)
            if is_plain(base):
                return F.linear(x, weight, base.bias)
            return call_with(base, {"weight": weight}, (x, *args), kwargs)
        self._begin(names)
        joining = [] if absent else [name for name in names if self._joins(name)]
        inside = joining[0] if joining else None
        if inside is None:
            y = base(x, *args, **kwargs)
        elif is_plain(base):
            tensors, update = self._tensors(inside), self._update(inside)
            y = merged_linear(x, base.weight, base.bias, *tensors, update)
        else:
            weight = self._merged(base.weight, inside)
            y = call_with(base, {"weight": weight}, (x, *args), kwargs)
        for name in names:
            if name != inside:
                y = y + self._product(x, name).to(y.dtype)
        return y

    def _product(self, x: Tensor, name: str) -> Tensor:
        """x Sᵀ of one adapter, with its dropout and its gate."""
        tensors, update = self._tensors(name), self._update(name)
        product = merged_linear(self._dropout(x, name), None, None, *tensors, update)
        gate = self._gate(name)
        if gate is not None:
            product = product * self._per_output(gate)
        return self._drop_path(product, name)

    def _joins(self, name: str) -> bool:
        """Whether the update shares the product with the frozen weight."""
        return not self._drops(name) and self._gate(name) is None

    def _hidden(self) -> bool:
        """Whether the frozen weight cannot be read: offloaded until the base layer is called, or
        quantised."""
        base = self.__dict__["_modules"]["base_layer"]
        return base.weight.is_meta or self.quantization_backend is not None

    def _base_matrix(self) -> Tensor:
        """The frozen weight as a matrix (out, in)."""
        weight: Tensor = getattr(self.base_layer, self.parameter)
        return weight

    def _native(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the shape of the frozen weight."""
        return matrix

    def _begin(self, names: list[str]) -> None:
        """Before a forward that does not fold."""
        if torch.compiler.is_compiling():
            return
        self._folded.clear()
        if torch.is_grad_enabled():
            for name in names:
                self._watch(name)

    def _merged(self, weight: Tensor, name: str) -> Tensor:
        """W + S, differentiable; the caller's product keeps it for backward."""
        if self._gate(name) is not None:
            return weight + self.get_delta_weight(name).to(weight.dtype)
        return merged_weight(weight, *self._tensors(name), self._update(name))

    @property
    def weight(self) -> Tensor:
        """The weight that the layer applies, for modules that bypass ``forward`` (BEiT, Swin v2).

        Differentiable, but the caller's product keeps the merged matrix for backward, and dropout
        on the update does not act.
        """
        names = self._live_adapters()
        if not names or self._hidden():
            return self._native(self._base_matrix())
        self._warn_of_dropout(names)
        return self._effective(names)

    def _effective(self, names: list[str]) -> Tensor:
        """W + S of these adapters, in the shape of the frozen weight."""
        weight = self._base_matrix()
        if names and self._folds(names):
            return self._native(self._fold(names))
        self._begin(names)
        for name in names:
            weight = self._merged(weight, name)
        return self._native(weight)

    def _warn_of_dropout(self, names: list[str]) -> None:
        if not self._warned and any(self._drops(name) for name in names):
            self._warned = True
            warnings.warn(
                f"The module around {self.key!r} reads its weight instead of calling it: "
                "dropout on the SNELLA update has no effect there.",
                stacklevel=3,
            )

    def _live_adapters(self) -> list[str]:
        """Adapters that act now, apart from those merged into the frozen weight."""
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return []
        # torch 2.11's compiler cannot look into the second.
        if not torch.compiler.is_compiling() and torch._C._is_tracing():
            raise UserError(
                "torch.jit.trace cannot follow SNELLA's operations: merge the adapter first "
                "(merge_and_unload), or use torch.export."
            )
        return [name for name in self.active_adapters if self._part("snella_A", name) is not None]

    def _folds(self, names: list[str]) -> bool:
        """Whether one plain matrix does: no gradient for W or the update, and no dropout on it."""
        if torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled():
            if any(tensor.requires_grad for tensor in self._learned(names)):
                return False
        elif self.training:
            return False  # a checkpointed forward; keeping matrices would undo it
        if any(map(is_functorch_wrapped_tensor, self._learned(names))):
            return False  # which is refused
        return not any(self._drops(name) for name in names)

    def _learned(self, names: list[str]) -> Iterator[Tensor]:
        """What may need a gradient; factors first, as one that does often answers the question."""
        for name in names:
            yield from self._tensors(name)[:3]
            gate = self._gate(name)
            if gate is not None:
                yield gate
        yield self._base_matrix()

    def _drops(self, name: str) -> bool:
        return self.training and bool(self.settings[name].drop_path or self._dropout_rate(name))

    def _dropout_rate(self, name: str) -> float:
        config = self.settings[name]
        if not config.dropout or any(f".{self.key}".endswith(f".{n}") for n in config.no_dropout):
            return 0.0
        return float(config.dropout)

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
        parts = []
        for name in names:
            gate = self._gate(name)
            factor = None if gate is None else self._per_output(gate)
            parts.append((self._update(name), self._tensors(name), factor))
        return self._folded.of(self._base_matrix(), parts)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the active (or named) adapters into the frozen weight."""
        self._folded.clear()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.snella_A:
                continue
            self._refuse_shards(name)
            weight = self._readable()
            if self._gate(name) is None:
                merged, _ = effective_weight(self._update(name), weight, *self._tensors(name))
            else:
                merged = weight + self.get_delta_weight(name)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"{self.key}: adapter {name!r} is not finite; it was not merged.")
            self._write(merged)
            self.merged_adapters.append(name)

    def untie(self) -> None:
        """Merge into a copy of the frozen weight, until unmerged: other modules hold it too."""
        weight: nn.Parameter = getattr(self.base_layer, self.parameter)
        if not self._shared and not self._hidden():
            self._shared.append(weight)
            copy = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            setattr(self.base_layer, self.parameter, copy)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged adapters again."""
        if not self.merged:
            warnings.warn(f"{self.key} is not merged; nothing to do.", stacklevel=2)
        if self._shared:
            setattr(self.base_layer, self.parameter, self._shared.pop())
            self.merged_adapters.clear()
        while self.merged_adapters:
            delta = self.get_delta_weight(self.merged_adapters.pop())
            self._write(self._readable().to(delta.dtype) - delta)

    def _readable(self) -> Tensor:
        """The frozen weight as a matrix, of a quantised layer dequantised."""
        if not self._hidden():
            if self.parameter not in self.base_layer._parameters:
                raise UserError(
                    f"{self.key}: its {self.parameter} has come under a parametrization, which an "
                    "update cannot be written to: remove that first."
                )
            return self._base_matrix()
        backend = self.quantization_backend
        if backend is None or not backend.supports_merge:
            raise UserError(
                f"{self.key}: its weight is kept by {backend.backend_name if backend else 'meta'}, "
                "which cannot take an update in. Keep the adapter apart."
            )
        state = getattr(self.base_layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UserError(
                f"{self.key}: bitsandbytes packed its weight for a CPU at the first evaluation, "
                "which PEFT cannot unpack. Merge before the first forward in eval mode."
            )
        weight: Tensor = backend.get_base_weight(self.get_base_layer())
        return weight

    def _write(self, matrix: Tensor) -> None:
        """Set the frozen weight from a matrix."""
        if self._hidden():
            self.set_base_weight(matrix)
        else:
            getattr(self.base_layer, self.parameter).data.copy_(self._native(matrix))

    def __repr__(self) -> str:
        return f"snella.{super().__repr__()}"


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch_module, f"_global{name}") for name in _HOOKS]


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a linear layer does no more than ``F.linear`` with its weight and bias."""
    own = layer.__dict__
    if type(layer).forward is not nn.Linear.forward or "forward" in own:
        return False
    return not any(own[name] for name in _HOOKS) and not any(_GLOBAL_HOOKS)
