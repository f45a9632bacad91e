"""Files of adapters in models adapted in place (diffusers, ``inject_adapter_in_model``)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from snella.errors import UserError
from snella.tuner.allocator import kept_entries
from snella.tuner.config import SnellaConfig
from snella.tuner.hooks import snella_layers
from snella.tuner.layer import SnellaLayer

PREFIX = "base_model.model."

# Why an adapter that keeps too many entries does so.
_BEGUN = (
    "training is in epoch {} of 0 … {}. That is as it should be for a checkpoint; after early "
    "stopping, or if on_epoch_start() is not called before every epoch, the adapter stays denser "
    "than asked."
)
_NEVER_BEGUN = (
    "on_epoch_start() was never called for it. If it is an average over the parameters() of a "
    "model in training, copy that model's buffers() too, which hold the budgets."
)


def check_scale(model: nn.Module, adapter_name: str) -> None:
    """Warn if the adapter's update is scaled, which files of PEFT do not hold."""
    layers = (module for module in model.modules() if isinstance(module, SnellaLayer))
    scales = {layer.scaling[adapter_name] for layer in layers if adapter_name in layer.scaling}
    if scales - {1.0}:
        warnings.warn(
            f"The SNELLA adapter {adapter_name!r} is scaled by "
            f"{', '.join(map(str, sorted(scales)))}, which is not saved: call set_scale again "
            "after loading, or merge it.",
            stacklevel=4,
        )


def check_origin(model: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Warn if a file, its keys already those of ``model``, has tensors of other layers."""
    known = model.state_dict()
    strange = [key for key in state if prefix in key and key not in known]
    if strange:
        warnings.warn(
            f"The SNELLA file has {len(strange)} tensors of layers that this model does not adapt, "
            f"{strange[0]!r} for one: is it of another backbone? They are left out.",
            stacklevel=5,
        )


def check_density(model: nn.Module, adapter_name: str) -> None:
    """Warn if a trained adapter keeps more entries than its schedule ends with.

    Of one whose training is not known, only if it has changed and its budget is still the first.
    """
    layers = snella_layers(model, adapter_name)
    allocator = layers[0].allocators.get(adapter_name) if layers else None
    if allocator is None or allocator.expected:
        return
    config, schedule = allocator.config, allocator.schedule(layers)
    if not config.allocation or layers[0].snella_budget[adapter_name].is_meta:
        return
    asked, first = int(schedule.target), int(schedule.start)
    if allocator.epoch is None:
        if allocator.is_fresh(layers, adapter_name):
            return
        least, reason = first, _NEVER_BEGUN
    else:
        last = schedule.budget(allocator.updates - 1, allocator.updates)
        asked = least = last if last < first else asked
        reason = _BEGUN.format(allocator.epoch, allocator.epochs - 1)
    layers = allocator.competing(layers)
    total = sum(layer.slice_size * layer.slices for layer in layers)
    kept, rounding = kept_entries(layers, adapter_name), sum(layer.slices for layer in layers)
    if kept > asked + rounding and kept + rounding >= least:
        warnings.warn(
            f"The SNELLA adapter {adapter_name!r} keeps {kept:,} of {total:,} entries, not the "
            f"{asked:,} of target_sparsity={config.target_sparsity}: {reason}",
            stacklevel=4,
        )


def save_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter for ``PeftModel.from_pretrained``, also from a model without ``PeftModel``.

    For models that ``add_adapter`` of diffusers or ``peft.inject_adapter_in_model`` adapted in
    place. Raises ``UserError`` if there is no such SNELLA adapter.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, SnellaConfig):
        raise UserError(f"The model has no SNELLA adapter called {adapter_name!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    state = {
        PREFIX + name.removeprefix(PREFIX): value.contiguous() for name, value in state.items()
    }
    save_file(state, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode


def save_lora_adapter(
    model: Any, save_directory: str | Path, adapter_name: str = "default", **kwargs: Any
) -> None:
    """diffusers' method of this name, kept from writing a SNELLA adapter under LoRA's name."""
    if isinstance(getattr(model, "peft_config", {}).get(adapter_name), SnellaConfig):
        raise UserError(
            f"Adapter {adapter_name!r} is SNELLA's, which a LoRA file cannot hold: save it with "
            "snella.save_adapter(model, folder, adapter_name), or its best low-rank approximation "
            "with snella.convert_to_lora(model, rank, adapter_name).save(folder)."
        )
    type(model).save_lora_adapter(model, save_directory, adapter_name=adapter_name, **kwargs)
