"""SnellaModel: SNELLA as a tuner of Hugging Face PEFT (`get_peft_model`, save, load, merge)."""

from __future__ import annotations

import copy
import re
import types
from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
)
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from snella.errors import UserError
from snella.tuner import hooks, saving
from snella.tuner.config import SnellaConfig
from snella.tuner.layer import SnellaLayer
from snella.tuner.layers import create_layer, slices_of
from snella.tuner.linear import SnellaLinear
from snella.tuner.targets import COMPILED, check_layer_index, default_targets

# Where an adapter of another method is around a layer (inject_adapter_in_model).
_WRAPPED = re.compile(r"\.base_layer(?=\.snella_)")


class SnellaModel(BaseTuner):
    """A model whose linear layers carry SNELLA adapters; made by ``get_peft_model``.

    Call ``on_epoch_start(epoch, epochs)`` before every epoch and ``on_step_end()`` after every
    optimizer step, before the gradients are cleared (or use ``SnellaCallback`` with transformers'
    Trainer).
    """

    prefix = "snella_"
    tuner_layer_cls = SnellaLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adapt ``model``; a configuration that PEFT completes is copied first.

        So one ``SnellaConfig`` can adapt several models.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, SnellaConfig)
        if config.modules_to_save and hasattr(model, "_orig_mod"):
            raise UserError(
                "modules_to_save of a model that is compiled already could not be loaded again: "
                "adapt the model first, then compile the result."
            )
        if _will_be_written_to(config.target_modules):
            self.peft_config[adapter_name] = copy.deepcopy(config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        hooks.attach(model, adapter_name)
        if hasattr(type(model), "save_lora_adapter"):
            # Bound, so that copies of the model have a method of their own.
            bound = types.MethodType(saving.save_lora_adapter, model)
            object.__setattr__(model, "save_lora_adapter", bound)

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        assert isinstance(peft_config, SnellaConfig)
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(self.model, peft_config)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        assert isinstance(peft_config, SnellaConfig)
        return check_layer_index(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SnellaConfig)
        if isinstance(target, SnellaLayer):
            if target.settings.get(adapter_name) is peft_config:
                return  # the projection after attention, which came with the attention
            if target.slices != slices_of(current_key, target.get_base_layer(), peft_config):
                raise UserError(
                    f"{current_key!r} holds an adapter that cuts it into {target.slices} part(s); "
                    "give all adapters of a model the same fused_parts."
                )
            target.update_layer(adapter_name, peft_config, peft_config.inference_mode)
            return
        quantization = get_quantization_kwargs(self.model)
        layer = create_layer(target, adapter_name, peft_config, current_key, **quantization)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT visits a module that has several names under the first of them only.
        names = [
            (module, name)
            for module in self.model.modules()
            for name, part in module._modules.items()
            if part is child
        ]
        if isinstance(child, BaseTunerLayer) and new_module is child.get_base_layer():  # unloaded
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)
        for module, name in names:
            module._modules[name] = new_module

    def _check_merge_allowed(self) -> None:
        """Refuse what would not be the live model; give layers that share a weight their own.

        Of tied embeddings only the adapted ones change (PEFT warns that the others would).
        """
        for wrapper in self._wrappers():
            if not isinstance(wrapper, LoraLayer) or wrapper.lora_variant:
                raise UserError(
                    f"{wrapper.base_layer.key!r} also carries an adapter of "
                    f"{type(wrapper).__module__} that is more than a sum with SNELLA's: they "
                    "cannot be merged together."
                )
        modules = list(self.model.modules())
        holders = Counter(id(p) for module in modules for p in module._parameters.values())
        for layer in modules:
            if isinstance(layer, SnellaLinear):
                weight = layer.get_base_layer()._parameters.get(layer.parameter)
                if weight is not None and holders[id(weight)] > 1:
                    layer.untie()

    def _wrappers(self) -> list[Any]:
        """Layers of other methods around SNELLA's (``inject_adapter_in_model``)."""
        return [
            module
            for module in self.model.modules()
            if isinstance(module, BaseTunerLayer)
            and isinstance(getattr(module, "base_layer", None), SnellaLinear)
        ]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """PEFT sees only the outermost of several adapter layers."""
        if merge:
            self._check_merge_allowed()
            for name in adapter_names or self.active_adapters:
                saving.check_density(self.model, name)
            for wrapper in self._wrappers():
                wrapper.base_layer.merge(safe_merge, adapter_names)
        unloaded: Any = super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )
        return unloaded

    def on_epoch_start(self, epoch: int, epochs: int, steps_per_epoch: int | None = None) -> None:
        """Lower the budget for this epoch (0 … ``epochs`` − 1) and share it out among layers."""
        hooks.on_epoch_start(self.model, epoch, epochs, steps_per_epoch)

    def on_step_end(self) -> None:
        """Take in the gradients of the step just made; call before they are cleared."""
        hooks.on_step_end(self.model)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What PEFT saves of this adapter; warns of what the file will not tell."""
        saving.check_density(model, adapter_name)
        saving.check_scale(model, adapter_name)
        state: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        # FullyShardedDataParallel hides the names by which PEFT looks for modules inside it.
        if any("_fsdp_wrapped_module" in name for name, _ in model.named_modules()):
            state |= {key: t for key, t in state_dict.items() if f".{cls.prefix}" in key}
        return state

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Names in files do not tell whether the model was compiled, or what wraps its layers."""
        name: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return _WRAPPED.sub("", name.replace(COMPILED, ""))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """For this model: modules with several names under all of them.

        An adapter saved without gates (init_weights=False) has them at 1.
        """
        state: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        _repeat_under_other_names(model, state)
        saving.check_origin(model, state, f".{cls.prefix}")
        gates = {
            f"{name}.snella_gate.{adapter_name}": layer.snella_gate[adapter_name]
            for name, layer in model.named_modules()
            if isinstance(layer, SnellaLayer) and adapter_name in layer.snella_gate
        }
        if gates and not any(".snella_gate." in name for name in state):
            state |= {
                name: torch.ones(gate.shape, dtype=gate.dtype) for name, gate in gates.items()
            }
        return state

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT passes ``adapter_names`` of mixed batches here."""
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "SNELLA has no batches of mixed adapters: every adapter is a whole weight matrix. "
                "Call the model once per adapter (set_adapter)."
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not offered, see the message."""
        raise UserError(
            "SNELLA has no add_weighted_adapter: a sum of sparse updates is not the update of one "
            "pair of factors. Activate several adapters (model.base_model.set_adapter([...])) and "
            "weigh them with layer.set_scale(name, weight), or use convert_to_lora first."
        )


def _repeat_under_other_names(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Add the keys of adapted modules that have several names; files hold the first of them."""
    names: dict[int, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, SnellaLayer):
            names.setdefault(id(layer), []).append(name)
    for first, *others in names.values():
        for other in others:
            own = {key: value for key, value in state.items() if key.startswith(f"{first}.")}
            state |= {other + key.removeprefix(first): value for key, value in own.items()}


def _will_be_written_to(targets: Any) -> bool:
    """Whether PEFT replaces ``target_modules`` by what it found, or by a shorter list."""
    if isinstance(targets, str):
        return targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    return targets is None or len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION
