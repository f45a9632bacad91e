"""From the configuration and the records on disk to a written or printed table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from snella import results
from snella.errors import UserError, unknown
from snella.files import atomic
from snella.jobs.prepare import inputs_of
from snella.records import many, read_failure
from snella.report import (
    Missing,
    SuiteInfo,
    TableSpec,
    build_table,
    parse_spec,
    print_table,
    write_table,
)
from snella.report.columns import expand_columns
from snella.report.frame import tidy
from snella.report.table import Table
from snella.report.text import origin
from snella.report.write import statistics_texts, versus_texts, write_texts
from snella.runs.run import Run
from snella.suite import plan
from snella.suite.config import Config
from snella.suite.status import Inputs, usable
from snella.tasks import find_task

COMPANIONS = ("cells", "statistics", "ranks", "vs_published")


def write(config: Config, name: str, stale: bool = False) -> list[Path]:
    """Write the table ``name`` in every format into the folder of its suite; return the paths.

    Its files are copied to the results folder, where those of another suite make way.

    Raises :class:`~snella.errors.UserError` for an unknown table or records that may not share
    one. A run without a record becomes a dash with a footnote; so does a stale one (made with
    other settings, code or data than planned), or with ``stale`` it is shown and marked.
    """
    table, results = build(config, name, stale), Path(config.results)
    for old in (results / f"{name}.pdf", results / f"{name}.png"):  # compiled from an older text
        old.unlink(missing_ok=True)
    return _publish(table, results, write_table(table, results / table.suite.name))


def write_versus(config: Config, name: str, stale: bool = False) -> list[Path]:
    """Write ``<name>_vs_published.{tex,csv,md}`` alone; none where there is nothing to compare."""
    table, results = build(config, name, stale), Path(config.results)
    return _publish(table, results, write_texts(results / table.suite.name, versus_texts(table)))


def write_statistics(
    config: Config, name: str, reference: str | None = None, stale: bool = False
) -> list[Path]:
    """Write ``<name>_statistics.{tex,csv,md}`` and the critical-difference diagram.

    ``reference`` is any row of the table; by default the one that the table names, or its first.
    """
    from snella.report.figures import critical_difference
    from snella.report.statistics import table_statistics

    table, results = build(config, name, stale), Path(config.results)
    found = table_statistics(table, reference or table.spec.reference or table.methods[0])
    out = results / table.suite.name
    paths = write_texts(out, statistics_texts(found))
    return _publish(table, results, paths + critical_difference(found, out / f"{name}_ranks"))


def _publish(table: Table, results: Path, written: list[Path]) -> list[Path]:
    """Copy files of a table from its suite's folder to ``results``.

    There another suite's files of the table make way: all, so that no companion of it stays.
    """
    stems = [table.name, *(f"{table.name}_{part}" for part in COMPANIONS)]
    texts = [results / f"{stem}.tex" for stem in stems]
    own = origin(table)
    if not all(own in text.read_text(encoding="utf-8") for text in texts if text.exists()):
        for old in (file for stem in stems for file in results.glob(f"{stem}.*")):
            old.unlink(missing_ok=True)
    for path in written:
        with atomic(results / path.name) as temporary:
            shutil.copyfile(path, temporary)
    return [results / path.name for path in written]


def write_audit(config: Config) -> list[Path]:
    """Write ``audit.{csv,md,html,tex,pdf}``: every published number and what became of it."""
    from snella.report.published import audit_texts

    return audit_texts.write(results.frame(config.results), Path(config.results))


def show(config: Config, name: str, stale: bool = False) -> None:
    """Print the table ``name`` in the terminal."""
    print_table(build(config, name, stale))


@many()
def build(config: Config, name: str, stale: bool = False) -> Table:
    """The table ``name`` with all its numbers, from all records that it shows."""
    config = plan.for_table(config, name)
    spec, methods = _rows(config, name)
    runs = table_runs(config, name)
    inputs = inputs_of(config, runs)
    records = (_read(run, stale, inputs) for run in runs)  # not all at once
    frame = tidy(records, subsets=spec.subsets)
    others = _others(config, spec)
    return build_table(name, spec, suite_info(config), methods, frame, others=others)


def table_runs(config: Config, name: str) -> list[Run]:
    """All runs whose records a table shows: its rows on the data sets of its columns."""
    config = plan.for_table(config, name)
    spec, methods = _rows(config, name)
    columns = expand_columns(spec, suite_info(config), others=_others(config, spec))
    datasets: dict[str, dict[str, None]] = {}
    for column in columns:
        datasets.setdefault(column.suite.name, {}).update(dict.fromkeys(column.datasets))
    runs: list[Run] = []
    for suite, wanted in datasets.items():
        own = plan.with_suite(config, suite)
        enabled = plan.enabled_methods(own, name)
        rows = [method for method in methods if method in enabled]
        runs += plan.plan(own, methods=rows, datasets=list(wanted)) if rows else []
    return runs


def _read(run: Run, stale: bool, inputs: Inputs) -> dict[str, Any] | Missing:
    """A run's record; without one that counts, or with a later failure, why the cell is empty."""
    record, found = usable(run, stale, inputs)
    if record is None and found.name == "failed":
        record = read_failure(run.folder)
    if record is None:
        why = found.reason or found.name
        reason = f"stale, {why}" if found.name == "stale" else why
        names = run.method.name, run.dataset.name, run.seed
        return Missing(*names, run.suite, run.backbone.name, reason)
    note = found.reason if found.name == "stale" else ""
    # A record holds the numbers of all selections; which one counts is asked now.
    protocol = {**(record.get("protocol") or {}), "selection": run.protocol.selection}
    return record | {"folder": run.place, "stale": note, "protocol": protocol}


def table_spec(config: Config, name: str) -> TableSpec:
    """A table's description, typed; a fault is named with its place in the configuration."""
    try:
        spec = parse_spec(name, config.tables[name])
        _check_names(config, spec)
    except UserError as error:
        raise UserError(f"{config.where(('tables', name))}: {error}") from error
    return spec


def _check_names(config: Config, spec: TableSpec) -> None:
    """The metrics and the reference row that a table's description names."""
    known = {metric.name for metric in find_task(spec.task, config.tasks).metrics}
    for metric in (spec.metric, *(getattr(c, "metric", None) for c in spec.columns)):
        for one in metric if isinstance(metric, list) else [metric]:
            if one is not None and one not in known:
                raise unknown("metric", one, known)
    rows = [*config.methods, *(row.name for row in spec.constants)]
    if spec.reference is not None and spec.reference not in rows:
        raise unknown("reference row", spec.reference, rows)


def _rows(config: Config, name: str) -> tuple[TableSpec, dict[str, str]]:
    """A table's description and its enabled rows with their labels."""
    enabled = [m for _, methods in plan.table_methods(config, name) for m in methods]
    spec = table_spec(config, name)
    if spec.others is None:  # rows that no table names stay out of this one
        named = {m for group in spec.rows for m in group.methods}
        enabled = [m for m in enabled if m in named]
    return spec, {m: config.methods[m].label or m for m in enabled}


def _others(config: Config, spec: TableSpec) -> dict[str, SuiteInfo]:
    return {
        other: suite_info(plan.with_suite(config, other))
        for other in spec.suites
        if other in config.suites and other != config.suite
    }


def suite_info(config: Config) -> SuiteInfo:
    """What a table needs to know of the configured suite."""
    suite = plan.current_suite(config)
    labels = {name: config.datasets[name].label or name for name in suite.datasets}
    labels[suite.backbone] = config.backbones[suite.backbone].title or suite.backbone
    return SuiteInfo(config.suite, suite.title, suite.groups, suite.demo, labels, suite.backbone)
