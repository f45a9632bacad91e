"""SNELLA as a Hugging Face PEFT tuner; importing this package registers it."""

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from snella.tuner.allocator import (
    load_training_state,
    on_epoch_start,
    on_step_end,
    training_state,
)
from snella.tuner.config import SnellaConfig, SnellaPeftType
from snella.tuner.export import LoraExport, convert_to_lora
from snella.tuner.layer import SnellaLayer
from snella.tuner.linear import SnellaLinear
from snella.tuner.model import SnellaModel, load_adapter

__all__ = [
    "LoraExport",
    "SnellaCallback",
    "SnellaConfig",
    "SnellaLayer",
    "SnellaLinear",
    "SnellaModel",
    "convert_to_lora",
    "load_adapter",
    "load_training_state",
    "on_epoch_start",
    "on_step_end",
    "training_state",
]


def _register() -> None:
    """Enter SNELLA in PEFT's tables; ``register_peft_method`` only accepts its own enum."""
    key: Any = SnellaPeftType.SNELLA
    PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(key, SnellaConfig)
    PEFT_TYPE_TO_TUNER_MAPPING.setdefault(key, SnellaModel)
    PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(key, SnellaModel.prefix)


def __getattr__(name: str) -> Any:
    """Load the Trainer callback on first use: it needs transformers' trainer, which is slow."""
    if name == "SnellaCallback":
        from snella.tuner.callback import SnellaCallback

        return SnellaCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register()
