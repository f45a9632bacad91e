"""What runs need and is not there: folders of raw data and files of weights, named all at once."""

from __future__ import annotations

from collections.abc import Iterable

from snella.errors import UserError
from snella.files import user_path
from snella.models.backbone_files import check_entry
from snella.runs.run import Run
from snella.suite.config import Config
from snella.suite.plan import is_made, prepared_folder


def missing(config: Config, datasets: Iterable[str], runs: Iterable[Run]) -> list[str]:
    """A line for the data sets without data, and one for each backbone without usable weights."""
    lost = [text for name in dict.fromkeys(datasets) if (text := _lost(config, name))]
    remedy = "set their `path:`, or leave them out of the suite (docs/data.md)"
    found = [f"No folder for data set {', '.join(lost)}; {remedy}."] if lost else []
    backbones = {run.backbone.name: run.backbone for run in runs}
    for backbone in backbones.values():
        try:
            check_entry(backbone.entry)
        except UserError as error:
            found.append(str(error))
    return found


def missing_of(config: Config, runs: Iterable[Run]) -> list[str]:
    """The same for all that some runs need."""
    runs = list(runs)
    return missing(config, (run.dataset.name for run in runs), runs)


def _lost(config: Config, name: str) -> str:
    """The data set and the folder that it lacks; empty where it is prepared or can be."""
    spec = config.datasets[name]
    if is_made(config, name) or (prepared_folder(config, name) / "manifest.json").exists():
        return ""
    if spec.path is None:
        return f"{name} (`datasets.{name}.path` is not set)"
    return "" if user_path(spec.path).exists() else f"{name} ({spec.path})"
