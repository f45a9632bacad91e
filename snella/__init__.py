"""SNELLA: kernelized sparse fine-tuning, and a reproducibility benchmark for vision PEFT."""

from typing import Any

__version__ = "0.1.0"

__all__ = [
    "SnellaCallback",
    "SnellaConfig",
    "SnellaModel",
    "__version__",
    "convert_to_lora",
    "load_adapter",
]
_TUNER = ("SnellaCallback", "SnellaConfig", "SnellaModel", "convert_to_lora", "load_adapter")


def __getattr__(name: str) -> Any:
    """Load the tuner on first use, so that ``import snella`` stays free of torch."""
    if name in _TUNER:
        from snella import tuner

        return getattr(tuner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
