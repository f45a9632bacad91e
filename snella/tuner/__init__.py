"""SNELLA as a Hugging Face PEFT tuner; importing this package enters it into PEFT's tables."""

from typing import Any

from snella.tuner.config import SnellaConfig
from snella.tuner.export import LoraExport, convert_to_lora
from snella.tuner.hooks import (
    TrainingState,
    load_training_state,
    on_epoch_start,
    on_step_end,
    training_state,
)
from snella.tuner.importing import LoraImport, convert_from_lora
from snella.tuner.layer import SnellaLayer
from snella.tuner.linear import SnellaLinear
from snella.tuner.model import SnellaModel
from snella.tuner.registration import register
from snella.tuner.saving import save_adapter

__all__ = [
    "LoraExport",
    "LoraImport",
    "SnellaCallback",
    "SnellaConfig",
    "SnellaLayer",
    "SnellaLinear",
    "SnellaModel",
    "TrainingState",
    "convert_from_lora",
    "convert_to_lora",
    "load_training_state",
    "on_epoch_start",
    "on_step_end",
    "save_adapter",
    "training_state",
]


def __getattr__(name: str) -> Any:
    """Load the Trainer callback on first use: it needs transformers' trainer, which is slow."""
    if name == "SnellaCallback":
        from snella.tuner.callback import SnellaCallback

        return SnellaCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register(SnellaConfig, SnellaModel)
