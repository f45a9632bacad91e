"""From a folder, or a formula, to a prepared classification data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snella.data.options import options_of
from snella.errors import UserError, unknown
from snella.tasks.base import DatasetSpec

if TYPE_CHECKING:
    import numpy as np

KINDS = ("quick", "folder")


def prepare(name: str, spec: DatasetSpec, folder: Path) -> dict[str, Any]:
    """Read or render the data set, check it, and write its prepared folder.

    Raises :class:`~snella.errors.UserError` if it is not configured or damaged.
    """
    check(name, spec)
    splits, info = _quick(name) if spec.kind == "quick" else _folder(name, spec)
    return write_labelled(folder, splits, info)


def check(name: str, spec: DatasetSpec) -> None:
    """Raise :class:`~snella.errors.UserError` for an entry that no folder could make right."""
    if spec.kind not in KINDS:
        raise unknown(f"kind of data set {name!r}:", spec.kind, KINDS)
    if spec.kind == "quick" and spec.options:
        raise unknown(f"option of data set {name!r}:", next(iter(spec.options)), ())
    options_of(name, spec.options)


def sources(spec: DatasetSpec) -> list[Path]:
    """The lists that say what a folder holds: text, json and .mat files beside the images."""
    if spec.kind != "folder" or spec.path is None:
        return []
    return sorted(f for kind in ("txt", "json", "mat") for f in Path(spec.path).glob(f"*.{kind}"))


def write_labelled(
    folder: Path, splits: Mapping[str, tuple[Any, np.ndarray]], info: Mapping[str, Any]
) -> dict[str, Any]:
    """Write images and labels (N,), after checking the labels against the number of classes.

    Without ``num_classes`` in ``info`` it is one more than the highest label.
    """
    import numpy as np

    from snella.data.prepared import write_prepared

    highest = max(int(labels.max()) for _, labels in splits.values())
    num_classes = int(info.get("num_classes") or 1 + highest)
    for split, (_, labels) in splits.items():
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"{split}: a label is outside 0 to {num_classes - 1}")
    counts = {
        split: np.bincount(labels, minlength=num_classes).tolist()
        for split, (_, labels) in splits.items()
    }
    columns = {
        split: {"image": images, "label": labels.astype(np.int64)}
        for split, (images, labels) in splits.items()
    }
    described = {**info, "num_classes": num_classes, "class_counts": counts}
    return write_prepared(folder, columns, sealed=("label",), info=described)


def _quick(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from snella.quick import tasks

    if name not in tasks.QUICK:
        raise unknown("quick data set", name, tasks.QUICK)
    task = tasks.QUICK[name]
    info = {
        "name": name,
        "source": task.source,
        "description": task.description,
        "licence": task.licence,
        "num_classes": task.num_classes,
        "class_names": list(task.class_names),
        "demo": True,
    }
    return tasks.make(name), info


def _folder(name: str, spec: DatasetSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    from snella.data.folder import read_folder

    if spec.path is None:
        raise UserError(
            f"Data set {name!r} has no folder; set `datasets.{name}.path` in the configuration "
            "to a folder with its images (docs/data.md)."
        )
    return read_folder(Path(spec.path), name, spec.num_classes, spec.options)
