"""From the configuration and the records on disk to a written or printed table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snella.records import read_record
from snella.report import Missing, SuiteInfo, parse_spec, print_table, write_table
from snella.suite import plan
from snella.suite.config import Config


def write(config: Config, name: str) -> list[Path]:
    """Write the table ``name`` in every format below the results folder; return the paths.

    Raises :class:`~snella.errors.UserError` for an unknown table or records that may not share
    one; a run without a record becomes a dash with a footnote.
    """
    spec, suite, methods, records = _material(config, name)
    return write_table(spec, suite, methods, records, Path(config.results), name)


def show(config: Config, name: str) -> None:
    """Print the table ``name`` in the terminal."""
    spec, suite, methods, records = _material(config, name)
    print_table(spec, suite, methods, records, name)


def _material(config: Config, name: str) -> tuple[Any, SuiteInfo, Mapping[str, str], list[Any]]:
    config = plan.for_table(config, name)
    groups = plan.table_methods(config, name)
    labels = {
        method: config.methods[method].label or method
        for _, methods in groups
        for method in methods
    }
    records = [
        read_record(run.folder) or Missing(run.method.name, run.dataset.name, run.seed)
        for run in plan.table_runs(config, name)
    ]
    return parse_spec(name, config.tables[name]), _suite_info(config), labels, records


def _suite_info(config: Config) -> SuiteInfo:
    suite = plan.current_suite(config)
    labels = {name: config.datasets[name].label or name for name in suite.datasets}
    labels[suite.backbone] = config.backbones[suite.backbone].title or suite.backbone
    return SuiteInfo(config.suite, suite.title, suite.groups, suite.demo, labels)
