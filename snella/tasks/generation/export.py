"""Trained models in the layouts of PEFT and diffusers, so that others can load them.

A method that PEFT implements, and SNELLA, leaves a small adapter; every method that folds leaves a
plain transformer. docs/generation.md shows how each loads back into a pipeline in five lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from snella.errors import UserError

ADAPTER = "default"
PREFIX = "base_model.model."


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter as ``PeftModel.from_pretrained`` reads it.

    Raises :class:`~snella.errors.UserError` where the method keeps no adapter of PEFT's.
    """
    config, state = _peft_adapter(model)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    named = {PREFIX + name: tensor.contiguous() for name, tensor in state.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_lora(model: nn.Module, folder: Path) -> None:
    """Write a LoRA adapter as ``StableDiffusion3Pipeline.load_lora_weights`` reads it.

    Raises :class:`~snella.errors.UserError` for any other method.
    """
    from diffusers import StableDiffusion3Pipeline

    config, state = _peft_adapter(model)
    if config.peft_type != "LORA":
        raise UserError(
            f"diffusers' loader reads LoRA only, not {config.peft_type}; use save_adapter, or "
            "snella.convert_to_lora for an approximation."
        )
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=config.to_dict(),
    )


def save_transformer(model: nn.Module, folder: Path) -> None:
    """Write a transformer whose update is folded in: a plain ``SD3Transformer2DModel`` folder.

    Raises :class:`~snella.errors.UserError` if the model still holds an adapter.
    """
    plain = type(model)(**model.config)  # type: ignore[arg-type]
    if model.state_dict().keys() != plain.state_dict().keys():
        extra = sorted(model.state_dict().keys() ^ plain.state_dict().keys())
        raise UserError(f"The update is not folded in ({extra[0]}); call the method's merge first.")
    model.save_pretrained(folder)  # type: ignore[operator]


def _peft_adapter(model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    from peft import get_peft_model_state_dict

    configs = getattr(model, "peft_config", None)
    if not configs:
        raise UserError(
            "This method keeps no adapter that PEFT can read; fold it in and use save_transformer."
        )
    config = configs[ADAPTER]
    config.inference_mode = True
    return config, get_peft_model_state_dict(model, adapter_name=ADAPTER)
