"""From a data set's entry in the configuration to its prepared folder."""

from __future__ import annotations

from pathlib import Path

from snella.errors import UserError, unknown
from snella.suite.config import Config, DatasetEntry
from snella.suite.plan import prepared_folder


def prepare_dataset(config: Config, name: str, *, missing_only: bool = False) -> Path:
    """Read or render the data set ``name``, check it, and write its prepared folder.

    Raises :class:`~snella.errors.UserError` if it is unknown, not configured or damaged.
    """
    if name not in config.datasets:
        raise unknown("data set", name, config.datasets)
    folder = prepared_folder(config, name)
    if missing_only and (folder / "manifest.json").exists():
        return folder
    entry = config.datasets[name]
    if entry.kind == "quick":
        _prepare_quick(name, folder)
    else:
        _prepare_folder(name, entry, folder)
    return folder


def _prepare_quick(name: str, folder: Path) -> None:
    from snella.data.prepared import write_prepared
    from snella.quick import tasks as quick

    if name not in quick.QUICK:
        raise unknown("quick data set", name, quick.QUICK)
    task = quick.QUICK[name]
    info = {
        "name": name,
        "source": task.source,
        "description": task.description,
        "licence": task.licence,
        "num_classes": task.num_classes,
        "class_names": list(task.class_names),
        "demo": True,
    }
    write_prepared(folder, quick.make(name), info=info)


def _prepare_folder(name: str, entry: DatasetEntry, folder: Path) -> None:
    from snella.data.folder import read_folder
    from snella.data.prepared import write_prepared

    if entry.path is None:
        raise UserError(
            f"Data set {name!r} has no folder; set `datasets.{name}.path` in the configuration "
            "to a folder in the VTAB-1k layout (docs/data.md)."
        )
    splits, info = read_folder(Path(entry.path), name, entry.num_classes)
    write_prepared(folder, splits, info=info)
