"""SNELLA: kernelized sparse fine-tuning, and a reproducibility benchmark for vision PEFT.

``import snella`` makes Hugging Face PEFT know SNELLA (``PeftModel.from_pretrained``,
``get_peft_model``, ...), whichever of the two is imported first. PEFT's own tuners register when
``peft`` is imported, and so does SNELLA: at once if PEFT is loaded already, else by a finder that
waits for ``import peft``. So ``import snella`` costs a list entry, and a program without PEFT never
pays for torch. The names below are loaded on first use. Nothing else is imported: until the command
line runs, Ctrl-C is a traceback.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__version__ = "0.1.0"

__all__ = [
    "LoraExport",
    "LoraImport",
    "SnellaCallback",
    "SnellaConfig",
    "SnellaLayer",
    "SnellaModel",
    "TrainingState",
    "__version__",
    "convert_from_lora",
    "convert_to_lora",
    "load_training_state",
    "on_epoch_start",
    "on_step_end",
    "save_adapter",
    "training_state",
]
_TUNER = tuple(name for name in __all__ if name != "__version__")


def __getattr__(name: str) -> Any:
    """Load the tuner on first use, so that ``import snella`` stays free of torch."""
    if name in _TUNER:
        from snella import tuner

        return getattr(tuner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _RegisteringLoader:
    """Loads PEFT as its own loader would, and then the tuner."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        import snella.tuner  # noqa: F401  registers


class _Finder:
    """Stands before the other finders until PEFT is asked for, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft":
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = _RegisteringLoader(spec.loader)
            spec.loader = loader
        return spec


def _register_when_peft_is_imported() -> None:
    """Register now if PEFT has been imported, else as soon as it is."""
    if "peft" in sys.modules:
        import snella.tuner  # noqa: F401  registers
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


_register_when_peft_is_imported()
