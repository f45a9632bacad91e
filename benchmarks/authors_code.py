"""Import the authors' released files beside today's timm and without their training frameworks.

The repositories date from 2022 to 2024 and import packages that their models do not need.
Within :func:`imported`, such packages are empty, timm's old module names exist, and timm's
registry takes no entries, because the authors' models carry the names of timm's own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import timm.layers
import timm.models
import torch

UNUSED = {
    *("avalanche", "easydict", "fvcore", "iopath", "ipdb", "ml_collections", "simplejson"),
    *("termcolor", "torchprofile", "turtle", "vtab"),
    *("numpy.lib.arraysetops", "model.swin_transformer"),
}
"""Imported by the files below, and not needed for a training step of their models."""
OLD_NAMES = ("timm.models.helpers", "timm.models.layers", "timm.models.registry")


class Settings(dict):
    """A dictionary with attributes, as in easydict and ml_collections."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    __setattr__ = dict.__setitem__  # type: ignore[assignment]


class _Module(ModuleType):
    """Has every name: timm's where timm has it today, else one that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "register_model":
            return lambda function: function
        if name in {"ConfigDict", "EasyDict"}:
            return Settings
        for place in (timm.layers, timm.models, timm.models._manipulate, timm.models._builder):
            if self.__name__.startswith("timm.") and hasattr(place, name):
                return getattr(place, name)
        return MagicMock()


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        covered = name in UNUSED or name.split(".")[0] in UNUSED or name.startswith(OLD_NAMES)
        return ModuleSpec(name, self, is_package=True) if covered else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Module(spec.name)
        module.__dict__["__all__"] = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: the module answers when it is asked."""


@contextmanager
def imported(root: Path, name: str) -> Iterator[Any]:
    """The module ``name`` of the clone ``root``; its code also runs within the context."""
    before = dict(sys.modules)
    for known in before:
        if known.startswith(OLD_NAMES):
            del sys.modules[known]
    sys.path.insert(0, str(root))
    sys.meta_path.insert(0, _Finder())
    try:
        with (
            patch("timm.models.layers", timm.layers, create=True),
            patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
            patch("builtins.print"),
        ):
            yield importlib.import_module(name)
    finally:
        sys.path.remove(str(root))
        del sys.meta_path[0]
        places = (*UNUSED, *OLD_NAMES)
        new = {n: _origin(m) for n, m in sys.modules.items() if n not in before}
        for found, origin in new.items():
            if origin.startswith(str(root)) or found.startswith(places):
                del sys.modules[found]
        sys.modules.update({n: m for n, m in before.items() if n.startswith(OLD_NAMES)})


def _origin(module: ModuleType) -> str:
    """Where a module's file or, without one, its folder is."""
    return getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "")
