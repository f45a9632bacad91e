"""What runs need and lack: folders of raw data, lists, files of weights; named all at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from snella.errors import UserError
from snella.files import user_path
from snella.models.backbone_files import check_entry
from snella.runs.run import Run
from snella.suite.config import Config
from snella.suite.plan import is_made, manifest


def missing(config: Config, datasets: Iterable[str], runs: Iterable[Run]) -> list[str]:
    """A line for the data sets without data, and one for each faulty list, each backbone without
    usable weights, and each file that scoring lacks.
    """
    runs = list(runs)
    names = [name for name in dict.fromkeys(datasets) if not _is_there(config, name)]
    lost = [text for name in names if (text := _lost(config, name))]
    remedy = "set their `path:`, or leave them out of the suite (docs/data.md)"
    found = [f"No folder for data set {', '.join(lost)}; {remedy}."] if lost else []
    found += [text for name in names if not _lost(config, name) if (text := faulty(config, name))]
    backbones = {run.backbone.name: run.backbone for run in runs}
    for backbone in backbones.values():
        try:
            check_entry(backbone.entry)
        except UserError as error:
            found.append(str(error))
    return found + _unscorable(runs)


def _unscorable(runs: Iterable[Run]) -> list[str]:
    """A line for each setting whose file scoring reads and does not find."""
    once = {(r.dataset.task, r.protocol_name): r for r in runs if r.task.settings.scoring}
    return [
        f"Scoring {task} needs `{setting}: {path or '...'}`, a local file that is there; correct "
        f"protocol {protocol!r}."
        for (task, protocol), run in once.items()
        for setting, path in run.task_settings.scoring_files().items()
        if path is None or not Path(path).exists()
    ]


def missing_of(config: Config, runs: Iterable[Run]) -> list[str]:
    """The same for all that some runs need."""
    runs = list(runs)
    return missing(config, (run.dataset.name for run in runs), runs)


def _is_there(config: Config, name: str) -> bool:
    """Whether a data set is prepared, or rendered on demand."""
    return is_made(config, name) or manifest(config, name).exists()


def faulty(config: Config, name: str) -> str:
    """What is wrong with the lists of a folder of labelled images; empty if nothing is."""
    spec = config.datasets[name]
    if spec.task != "classification" or spec.kind != "folder" or spec.path is None:
        return ""

    def look() -> str:
        from snella.data.readers import check_lists  # imports numpy

        try:
            check_lists(str(spec.path), name, spec.num_classes, spec.options)
        except UserError as error:
            return str(error)
        return ""

    return config.once(("lists", name), look)


def _lost(config: Config, name: str) -> str:
    """The data set and the folder that it lacks; empty where there is one."""
    spec = config.datasets[name]
    if spec.path is None:
        return f"{name} (`datasets.{name}.path` is not set)"
    return "" if user_path(spec.path).exists() else f"{name} ({spec.path})"
