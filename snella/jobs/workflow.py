"""What the rules of the workflow ask: inputs, parameters and outputs of each job.

Rules stay declarative; every function here takes Snakemake's wildcards and answers from the
plan, cheaply, because Snakemake asks often.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from snella.errors import UserError
from snella.suite import config as configuration
from snella.suite import plan
from snella.suite.config import Config


class WorkflowPlan:
    """The plan of a configuration, indexed by the paths that Snakemake knows."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.runs = {run.record.as_posix(): run for run in plan.plan(config)}
        self.warm = "--warm" if config.warm_workers else ""

    @classmethod
    def from_snakemake(cls, config: dict[str, Any]) -> WorkflowPlan:
        """Build from Snakemake's merged configuration; a user's mistake ends it with status 2."""
        try:
            return cls(configuration.merge(dict(config), configuration.DEFAULT, {}))
        except UserError as error:
            sys.stderr.write(f"snella: {error}\n")
            raise SystemExit(2) from None

    def run(self, wildcards: Any) -> plan.Run:
        """The run of a train job."""
        folder = Path(self.config.results) / "runs" / wildcards.suite / wildcards.backbone
        folder = folder / wildcards.dataset / wildcards.method / f"seed{wildcards.seed}"
        key = (folder / "record.json").as_posix()
        if key not in self.runs:
            self.runs[key] = self._outside(wildcards)
        return self.runs[key]

    def _outside(self, wildcards: Any) -> plan.Run:
        from snakemake.exceptions import WorkflowError

        suite = self.config.suite
        if (wildcards.suite, wildcards.backbone) != (
            suite,
            plan.current_suite(self.config).backbone,
        ):
            raise WorkflowError(
                f"Suite {suite!r} is configured; for {wildcards.suite}/{wildcards.backbone} use "
                f"--config suite={wildcards.suite}."
            )
        try:
            return plan.resolve(
                self.config, wildcards.method, wildcards.dataset, int(wildcards.seed)
            )
        except UserError as error:
            raise WorkflowError(str(error)) from None

    def settings(self, wildcards: Any) -> str:
        """The run's resolved settings, canonical JSON: what makes it stale when changed."""
        return self.run(wildcards).json

    def folder(self, wildcards: Any) -> str:
        """The run's folder."""
        return self.run(wildcards).folder.as_posix()

    def method_file(self, wildcards: Any) -> str:
        """The method's source file."""
        return self.run(wildcards).settings["method"]["file"]

    def backbone_file(self, wildcards: Any) -> list[str]:
        """The backbone's weights, if they are a file."""
        file = self.run(wildcards).settings["backbone"]["file"]
        return [file] if file else []

    def data_folder(self, wildcards: Any, output: Any) -> str:
        """The data folder that a prepared manifest lies in."""
        return Path(output[0]).parents[2].as_posix()

    def dataset_entry(self, wildcards: Any) -> str:
        """A data set's entry, canonical JSON."""
        return json.dumps(self.config.datasets[wildcards.dataset].model_dump(), sort_keys=True)

    def source_lists(self, wildcards: Any) -> list[str]:
        """The split lists of a folder data set, so that a changed list is noticed."""
        entry = self.config.datasets.get(wildcards.dataset)
        if entry is None or entry.kind != "folder" or entry.path is None:
            return []
        return [path.as_posix() for path in sorted(Path(entry.path).glob("*.txt"))]

    def table_records(self, wildcards: Any) -> list[str]:
        """The records a table needs; none are demanded with ``allow_missing``."""
        if self.config.allow_missing:
            return []
        return [run.record.as_posix() for run in self._table_runs(wildcards)]

    def table_content(self, wildcards: Any) -> str:
        """What a table shows besides its records, and with ``allow_missing`` which there are."""
        content: dict[str, Any] = {
            "spec": self.config.tables[wildcards.table],
            "suite": plan.current_suite(self.config).model_dump(),
            "labels": {name: row.label for name, row in self.config.methods.items()},
        }
        if self.config.allow_missing:
            content["records"] = [
                f"{path}@{os.stat(path).st_mtime_ns}"
                for run in self._table_runs(wildcards)
                for path in (run.record, run.folder / "failure.json")
                if path.exists()
            ]
        return json.dumps(content, sort_keys=True)

    def _table_runs(self, wildcards: Any) -> list[plan.Run]:
        from snakemake.exceptions import WorkflowError

        try:
            return plan.table_runs(self.config, wildcards.table)
        except UserError as error:
            raise WorkflowError(str(error)) from None
