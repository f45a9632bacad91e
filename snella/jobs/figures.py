"""From the predictions on disk to a figure of examples."""

from __future__ import annotations

from pathlib import Path

from snella.data.prepared import Prepared
from snella.errors import UserError
from snella.records import read_record
from snella.runs.trainer import prediction_folder
from snella.suite import plan
from snella.suite.config import Config


def draw(config: Config, name: str) -> Path:
    """Draw the figure ``name`` of the configuration below the results folder; return its PDF.

    A method whose run failed or is missing is left out. The predictions are those of the epoch
    that the protocol selects. Raises :class:`~snella.errors.UserError` if no run is there.
    """
    folders: dict[str, Path] = {}
    runs = plan.figure_runs(config, name)
    for run in runs:
        record = read_record(run.folder)
        if record is None or record["status"] != "ok":
            continue
        selections = record["metrics"]
        epoch = selections.get(run.protocol.selection, selections["last"])["epoch"]
        label = config.methods[run.method.name].label or run.method.name
        folders[label] = prediction_folder(run.folder, epoch, "test")
    if not folders:
        raise UserError(f"Figure {name!r} has no finished run to show; train its methods first.")
    first = runs[0]
    data = Prepared.open(Path(first.dataset.prepared))
    file = Path(config.results) / f"{name}.pdf"
    first.task.draw_figure(data, first.task_settings, folders, file)
    return file
