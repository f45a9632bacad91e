"""SNELLA: kernelized sparse fine-tuning, and a reproducibility benchmark for vision PEFT.

``import snella`` makes Hugging Face PEFT know SNELLA (``PeftModel.from_pretrained``, ``get_peft_model``
...), whichever of the two is imported first; the names below are loaded on first use.
"""

from typing import Any

from snella._registration import register_when_peft_is_imported

__version__ = "0.1.0"

_TUNER = (
    "LoraExport",
    "LoraImport",
    "SnellaCallback",
    "SnellaConfig",
    "SnellaLayer",
    "SnellaModel",
    "TrainingState",
    "convert_from_lora",
    "convert_to_lora",
    "load_training_state",
    "on_epoch_start",
    "on_step_end",
    "save_adapter",
    "training_state",
)
__all__ = ["__version__", *_TUNER]


def __getattr__(name: str) -> Any:
    """Load the tuner on first use, so that ``import snella`` stays free of torch."""
    if name in _TUNER:
        from snella import tuner

        return getattr(tuner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_TUNER})


register_when_peft_is_imported()
