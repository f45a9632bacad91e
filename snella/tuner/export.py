"""SNELLA as LoRA: the best low-rank approximation of every update, with its error stated.

Programs that load LoRA only (diffusers' loader, ComfyUI) can use the result. SNELLA's updates have
high rank, so the truncation loses something: by Eckart-Young the least possible in Frobenius norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft import convert_to_lora as peft_convert_to_lora
from safetensors.torch import save_file
from torch import Tensor, nn

from snella.errors import UserError
from snella.tuner.layer import SnellaLayer


@dataclass
class LoraExport:
    """A LoRA adapter and how far it is from the SNELLA adapter it stands for.

    errors: ‖S − BA‖ / ‖S‖ (Frobenius) of every adapted layer; error: the same over all layers.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor]
    errors: dict[str, float]
    error: float

    def save(self, path: str | Path) -> None:
        """Write a folder that ``PeftModel.from_pretrained`` loads without SNELLA."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        save_file(self.state_dict, str(folder / "adapter_model.safetensors"))


@torch.no_grad()
def convert_to_lora(
    model: nn.Module, rank: int | float, adapter_name: str = "default"
) -> LoraExport:
    """Approximate a SNELLA adapter by LoRA.

    model: an adapted model that is not merged. rank: of every layer; a float in (0, 1] is the share
    of squared singular values to keep instead. Raises ``UserError`` if there is no such adapter.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SnellaLayer) and adapter_name in module.snella_A
    }
    if not layers:
        raise UserError(f"The model has no SNELLA adapter called {adapter_name!r}.")
    for name, layer in layers.items():
        if not layer.supports_lora_conversion(adapter_name):
            raise UserError(
                f"{name!r} is no linear layer, and cannot be converted to LoRA; leave it out "
                "of the adapter with exclude_modules."
            )
    config, state = peft_convert_to_lora(model, rank, adapter_name)
    state = {name: value.clone().contiguous() for name, value in state.items()}
    errors, lost, total = {}, 0.0, 0.0
    for name, layer in layers.items():
        delta = layer.get_delta_weight(adapter_name).double()
        low_rank = torch.zeros_like(delta)
        if f"{name}.lora_A.weight" in state:
            factor_b = state[f"{name}.lora_B.weight"].double()
            low_rank = factor_b @ state[f"{name}.lora_A.weight"].double()
        difference, size = float((delta - low_rank).square().sum()), float(delta.square().sum())
        errors[name] = (difference / size) ** 0.5 if size else 0.0
        lost, total = lost + difference, total + size
    return LoraExport(config, state, errors, (lost / total) ** 0.5 if total else 0.0)
