"""SnellaModel: SNELLA as a tuner of Hugging Face PEFT (`get_peft_model`, save, load, merge)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from snella.errors import UserError
from snella.tuner import allocator
from snella.tuner.config import SnellaConfig
from snella.tuner.layer import SnellaLayer
from snella.tuner.linear import create_layer, slices_of

# Linear layers of attention and MLP inside a numbered block, as timm, transformers, diffusers,
# segment-anything and open_clip name them.
_NAMES = (
    r"qkv|kv|q|k|v|query|key|value|[qkvo]_proj|out_proj|proj|to_[qkv]|to_out\.0|to_add_out|"
    r"add_[qkv]_proj|attention\.output\.dense|intermediate\.dense|output\.dense|"
    r"fc1|fc2|w12|w3|lin1|lin2|linear1|linear2|c_fc|c_proj|net\.0\.proj|net\.2"
)
DEFAULT_TARGETS = re.compile(rf"(.*\.)?\d+\.(.*\.)?({_NAMES})")


class SnellaModel(BaseTuner):
    """A model whose linear layers carry SNELLA adapters; made by ``get_peft_model``.

    Call ``on_epoch_start(epoch, epochs)`` before every epoch and ``on_step_end()`` after every
    optimizer step, before the gradients are cleared (or use ``SnellaCallback`` with transformers'
    Trainer).
    """

    prefix = "snella_"
    tuner_layer_cls = SnellaLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        assert isinstance(peft_config, SnellaConfig)
        if peft_config.target_modules is None:
            names = {
                name
                for name, module in self.model.named_modules()
                if isinstance(module, nn.Linear | SnellaLayer) and DEFAULT_TARGETS.fullmatch(name)
            }
            if not names:
                raise UserError(
                    f"No linear layers to adapt were recognised in {type(self.model).__name__}; "
                    "name them with SnellaConfig(target_modules=[...])."
                )
            peft_config.target_modules = sorted(names)
        return peft_config

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
            if target.slices != slices_of(current_key, peft_config):
                raise UserError(
                    f"{current_key!r} holds an adapter that cuts it into {target.slices} part(s); "
                    "give all adapters of a model the same fused_parts."
                )
            target.update_layer(adapter_name, peft_config, peft_config.inference_mode)
            return
        layer = create_layer(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def on_epoch_start(self, epoch: int, epochs: int, steps_per_epoch: int | None = None) -> None:
        """Lower the budget for this epoch (0 … ``epochs`` − 1) and share it out among layers."""
        allocator.on_epoch_start(self.model, epoch, epochs, steps_per_epoch)

    def on_step_end(self) -> None:
        """Take in the gradients of the step just made; call before they are cleared."""
        allocator.on_step_end(self.model)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


def load_adapter(model: nn.Module, path: str | Path, trainable: bool = False) -> PeftModel:
    """Put a saved SNELLA adapter on its backbone, in a process that has not imported SNELLA yet.

    The same as ``PeftModel.from_pretrained`` after ``import snella.tuner``. Raises ``UserError`` if
    the folder holds no adapter.
    """
    if not (Path(path) / "adapter_config.json").is_file():
        raise UserError(f"{path} holds no adapter: it has no adapter_config.json.")
    return PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
