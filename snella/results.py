"""All results as one pandas frame, for notebooks and for everything that this package prints.

import snella.results
frame = snella.results.frame()
frame[frame.selected].pivot_table("value", "method", "dataset")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snella.records import FILES, read_record
from snella.report.frame import Missing, tidy

if TYPE_CHECKING:
    import pandas as pd

    from snella.suite.config import Config

Stale = Callable[[Path, Mapping[str, Any]], str]
"""Says why a record does not fit the configuration; empty if it does."""


def frame(
    results: str | os.PathLike[str] = "results",
    config: Config | None = None,
    *,
    subsets: bool = False,
    stale: Stale | None = None,
) -> pd.DataFrame:
    """One row per run, selection and metric of all records below ``results``.

    Columns: what was run (suite, backbone, dataset, group, method, label, protocol, seed, task),
    how it ended (status, reason), the number (selection, epoch, subset, metric, title, value,
    unit, higher_is_better, lower, upper, chance, primary, selected), parameters, costs, where it
    comes from (commit, versions, hardware, identities), warnings (one a line), folder, and every
    protocol field as ``protocol.<field>``. ``value`` is as recorded: a fraction for the unit "%".
    ``selected`` rows are of the selection that the run's protocol names. A failed run has one
    row without a value. With ``subsets`` there are further rows for the groups of a record.

    ``config`` (:func:`snella.suite.config.load`) adds labels and groups, says in ``stale`` in what
    a record of the configured suite differs from what is planned now, and adds the runs of the
    suite that are missing as rows of status "not run". ``stale`` may be another judge. Raises
    :class:`~snella.errors.UserError` for a record that cannot be read.
    """
    folders = list(record_folders(Path(results)))
    if config is not None and stale is None:
        stale = _against(config)
    return tidy(
        _records(folders, config, stale),
        subsets=subsets,
        labels=None if config is None else labels(config),
        groups=None if config is None else groups(config),
    )


def _against(config: Config) -> Stale:
    """Compare records with the plan of the configured suite."""
    from snella.suite import plan
    from snella.suite.status import differences

    planned = {run.folder.resolve(): run for run in plan.plan(config)}

    def judge(folder: Path, record: Mapping[str, Any]) -> str:
        run = planned.get(folder.resolve())
        found = [] if run is None else differences(run, dict(record))
        return f"made with {' and '.join(found)}" if found else ""

    return judge


def record_folders(results: Path) -> Iterator[Path]:
    """The folders of all runs with a record, in order of their names."""
    top = results / "runs" if (results / "runs").is_dir() else results
    for folder, names, files in os.walk(top):
        names.sort()
        if Path(folder) == results and "search" in names:  # trials are no results
            names.remove("search")
        if not set(FILES).isdisjoint(files):
            yield Path(folder)


def read(folder: Path, stale: Stale | None = None) -> dict[str, Any] | None:
    """The record of a run's folder, with the folder and why it is stale; None without one."""
    record = read_record(folder)
    if record is None:
        return None
    return record | {"folder": folder, "stale": stale(folder, record) if stale else ""}


def labels(config: Config) -> dict[str, str]:
    """The printed names of the configured methods."""
    return {name: row.label or name for name, row in config.methods.items()}


def groups(config: Config) -> dict[str, dict[str, str]]:
    """The group of every data set, by suite."""
    return {
        name: {dataset: group for group, datasets in suite.groups.items() for dataset in datasets}
        for name, suite in config.suites.items()
    }


def _records(
    folders: list[Path], config: Config | None, stale: Stale | None
) -> Iterator[dict[str, Any] | Missing]:
    for folder in folders:
        record = read(folder, stale)
        if record is not None:
            yield record
    if config is not None:
        from snella.suite import plan

        known = {folder.resolve() for folder in folders}
        for run in plan.plan(config):
            if run.folder.resolve() not in known:
                names = run.method.name, run.dataset.name, run.seed
                yield Missing(*names, run.suite, run.backbone.name)
