"""The best low-rank approximation of a trained adapter, for programs that load only LoRA.

S of a layer is cut off after ``rank`` singular values, which in Frobenius norm loses the least that
any factors of this rank can.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snella.errors import UserError
from snella.tuner.layer import SnellaLayer
from snella.tuner.saving import PREFIX
from snella.tuner.shapes import CONVOLUTIONS, is_attention


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
        state = {PREFIX + name.removeprefix(PREFIX): t for name, t in self.state_dict.items()}
        save_file(state, str(folder / "adapter_model.safetensors"))


@torch.no_grad()
def convert_to_lora(
    model: nn.Module, rank: int | float, adapter_name: str = "default"
) -> LoraExport:
    """Approximate a SNELLA adapter by LoRA.

    model: an adapted model that is not merged. rank: of every layer (at most its own); a float in
    (0, 1] is the share of squared singular values to keep instead. Linear layers, ``Conv1D``,
    embeddings and convolutions without groups and dilation can be converted. Raises ``UserError``
    for others, and if there is no such adapter.
    """
    if not (isinstance(rank, int) and rank > 0) and not 0 < rank <= 1:
        raise UserError(f"rank is a whole number from 1, or a share from 0 to 1, not {rank!r}.")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SnellaLayer) and adapter_name in module.snella_A
    }
    if not layers:
        raise UserError(f"The model has no SNELLA adapter called {adapter_name!r}.")
    for name, layer in layers.items():
        if reason := _refusal(layer.get_base_layer()):
            raise UserError(
                f"{name!r} cannot be converted to LoRA: {reason}; leave it out of the adapter with "
                "exclude_modules."
            )
    state = _trained_in_full(model, adapter_name)
    ranks, errors, lost, total = {}, {}, 0.0, 0.0
    for name, layer in layers.items():
        delta = layer.get_delta_weight(adapter_name)
        b, a = _factors(delta.double(), rank)
        difference, size = float((delta - b @ a).square().sum()), float(delta.square().sum())
        errors[name] = (difference / size) ** 0.5 if size else 0.0
        lost, total = lost + difference, total + size
        ranks[name.removeprefix(PREFIX)] = a.shape[0]
        parts = _layout(layer.get_base_layer(), a.to(delta.dtype), b.to(delta.dtype))
        state |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
    bases = [layer.get_base_layer() for layer in layers.values()]
    config = _config(model, ranks, adapter_name, all(isinstance(b, Conv1D) for b in bases))
    return LoraExport(config, state, errors, (lost / total) ** 0.5 if total else 0.0)


def _refusal(base: nn.Module) -> str | None:
    """Why LoRA of Hugging Face PEFT cannot hold an update of this layer; None if it can."""
    if is_attention(base):
        return "its query, key and value are one parameter"
    if isinstance(base, CONVOLUTIONS) and (
        base.groups > 1 or set(base.dilation) != {1} or base.padding_mode != "zeros"
    ):
        return "PEFT's LoRA knows no groups, dilation and padding but by zeros"
    return None


def _factors(delta: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) nearest to ``delta``, (out, in)."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    if not isinstance(rank, int):
        energy = s.square().cumsum(0)
        rank = int(torch.searchsorted(energy, rank * energy[-1])) + 1
    return u[:, :rank] * s[:rank], v[:rank]


def _layout(base: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A (r, in) and B (out, r) as PEFT's LoRA of this type of layer names and shapes them."""
    if isinstance(base, nn.Embedding):
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    if isinstance(base, CONVOLUTIONS):
        kernel = base.weight.shape[1:]
        a, b = a.view(-1, *kernel), b.view(*b.shape, *[1] * (len(kernel) - 1))
    return {"lora_A.weight": a, "lora_B.weight": b}


def _config(
    model: nn.Module, ranks: dict[str, int], adapter_name: str, transposed: bool
) -> LoraConfig:
    """ranks: by path of the layer; LoRA's scale is 1."""
    ours = getattr(model, "peft_config", {}).get(adapter_name)
    usual = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=transposed,
        modules_to_save=getattr(ours, "modules_to_save", None),
        base_model_name_or_path=getattr(ours, "base_model_name_or_path", None),
        inference_mode=True,
    )


def _trained_in_full(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What is saved with the adapter beside its own tensors: ``modules_to_save``."""
    if adapter_name not in getattr(model, "peft_config", {}):
        return {}
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {name: t.clone().contiguous() for name, t in state.items() if ".snella_" not in name}
