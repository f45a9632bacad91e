"""Enter SNELLA into Hugging Face PEFT when PEFT is imported, so that ``import snella`` stays light.

PEFT's tuners register when ``peft`` is imported. SNELLA does the same from outside: if PEFT is
loaded already, at once; otherwise by a finder that waits for ``import peft``. The cost of
``import snella`` is that of a list entry, and a program without PEFT never pays for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _RegisteringLoader(Loader):
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


class _Finder(MetaPathFinder):
    """Stands before the other finders until PEFT is asked for, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_when_peft_is_imported() -> None:
    """Register now if PEFT has been imported, else as soon as it is."""
    if "peft" in sys.modules:
        import snella.tuner  # noqa: F401  registers
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
