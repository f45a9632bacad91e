"""SNELLA as a Hugging Face PEFT tuner; importing this package registers it."""

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
from snella.tuner.layer import SnellaLayer, SnellaLinear
from snella.tuner.model import SnellaModel

__all__ = [
    "SnellaConfig",
    "SnellaLayer",
    "SnellaLinear",
    "SnellaModel",
    "load_training_state",
    "on_epoch_start",
    "on_step_end",
    "training_state",
]


def _register() -> None:
    """Enter SNELLA in PEFT's tables; ``register_peft_method`` only accepts members of its own enum."""
    key = SnellaPeftType.SNELLA
    PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(key, SnellaConfig)
    PEFT_TYPE_TO_TUNER_MAPPING.setdefault(key, SnellaModel)
    PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(key, SnellaModel.prefix)


_register()
