"""Task families, discovered from the folders here and from a folder of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from snella.errors import UserError, one_line, unknown
from snella.tasks.base import (
    Backbone,
    DatasetSpec,
    Gallery,
    GalleryLine,
    Metric,
    Score,
    Scorer,
    Shown,
    Task,
    TaskInfo,
    TaskSettings,
    Toy,
)

__all__ = [
    "Backbone",
    "DatasetSpec",
    "Gallery",
    "GalleryLine",
    "Metric",
    "Score",
    "Scorer",
    "Shown",
    "Task",
    "TaskInfo",
    "TaskSettings",
    "Toy",
    "find_task",
    "task_names",
]

SHIPPED = Path(__file__).parent


def task_names(folder: str = "tasks") -> dict[str, Path]:
    """All families by name: the package's, then those in ``folder``."""
    return {
        path.parent.name: path.parent
        for root in (SHIPPED, Path(folder))
        for path in sorted(root.glob("[a-z]*/__init__.py"))
    }


def find_task(name: str, folder: str = "tasks") -> TaskInfo:
    """The description of a family.

    Raises :class:`~snella.errors.UserError` if there is none or its folder does not import.
    """
    return _load(name, _folder(name, folder, os.getcwd()))


@cache
def _folder(name: str, folder: str, here: str) -> str:
    """Where a family lies, seen from the working directory; asked for every run."""
    for root in (folder, SHIPPED):
        if name[:1].islower() and os.path.isfile(f"{root}/{name}/__init__.py"):
            return os.path.abspath(f"{root}/{name}")
    raise unknown("task", name, task_names(folder))


@cache
def _load(name: str, folder: str) -> TaskInfo:
    path = Path(folder)
    if path.parent == SHIPPED.absolute():
        module = importlib.import_module(f"snella.tasks.{name}")
    else:
        module = _import_folder(name, path)
    info = getattr(module, "TASK", None)
    if not isinstance(info, TaskInfo):
        raise UserError(f"{path / '__init__.py'} must define TASK, a snella.tasks.TaskInfo.")
    return info


def _import_folder(name: str, path: Path) -> ModuleType:
    """Import a package outside of ours under its folder's name."""
    if name in sys.modules:
        return sys.modules[name]
    file = path / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[path.as_posix()]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"Task folder {path} does not import: {one_line(error, file)}.") from error
    return module
