"""What the rules of the workflow ask: inputs, parameters and outputs of each job.

Rules stay declarative; every function here takes Snakemake's wildcards and answers from the
plan, cheaply, because Snakemake asks often.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from snella.errors import (
    MISTAKE,
    UserError,
    ascii_name,
    closest,
    explain,
    record_traceback,
)
from snella.files import digest_json
from snella.jobs import cells, devices, retries, submission, worker
from snella.jobs.arguments import targets
from snella.jobs.coordinator import Coordinator, start_over, watch_pending
from snella.jobs.inputs import missing, missing_of
from snella.jobs.prepare import moved, origin_of
from snella.jobs.requests import Requests
from snella.models.backbone_files import present
from snella.records import FILES, read_record
from snella.runs.identity import code_key, entry_key, training_key
from snella.runs.run import Run
from snella.suite import config as configuration
from snella.suite import plan
from snella.suite.checks import look_up
from snella.suite.config import Config
from snella.suite.status import PARTS, Inputs, differences

Answer = TypeVar("Answer")


def _user(call: Callable[[], Answer]) -> Answer:
    """End with a user's mistake as one line; as an exception Snakemake would print where it fell.

    The status is 2.
    """
    try:
        return call()
    except UserError as error:
        _say(explain(error).line)
        raise SystemExit(MISTAKE) from None


def _say(line: str) -> None:
    sys.stderr.write(f"snella: {line}\n")
    sys.stderr.flush()


class WorkflowPlan:
    """The plan of a configuration, indexed by the paths that Snakemake knows."""

    def __init__(self, config: Config, overlay: dict[str, Any], workflow: Any = None) -> None:
        self.config, self.workflow = config, workflow
        self.requests = Requests(config, lambda: workflow is not None and workflow.non_local_exec)
        self._overlay = json.dumps(overlay, sort_keys=True, default=str)
        self.runs = {run.record.as_posix(): run for run in plan.plan(config)}
        self.main_table = plan.main_table(config)
        devices.announce(config.gpu_share)
        self._inputs = Inputs()
        self._moved = cache(partial(moved, config))
        self._origin = cache(lambda name: json.dumps(origin_of(config, name), sort_keys=True))

    @classmethod
    def from_snakemake(cls, config: dict[str, Any], workflow: Any) -> WorkflowPlan:
        """Build from Snakemake's merged configuration and the files it comes from.

        A user's mistake ends it with one line and status 2.
        """
        try:
            files = [Path(file) for file in workflow.configfiles]
            merged = configuration.typed(dict(config), files)
            found = configuration.from_snakemake(merged, files)
            os.environ.setdefault("SNELLA_CHECKOUT", str(configuration.CHECKOUT))  # for envs/
            return cls(found, merged, workflow)
        except Exception as error:
            outcome = explain(error)
            if outcome.status != MISTAKE:
                record_traceback(error)
            _say(outcome.line)
            raise SystemExit(outcome.status) from None

    def run(self, wildcards: Any) -> Run:
        """The run of a train job, of any configured suite or of a trial of its search."""
        folder = Path(self.config.results) / wildcards.place / "runs" / wildcards.suite
        folder = folder / wildcards.backbone / wildcards.dataset / wildcards.method
        key = (folder / f"seed{wildcards.seed}" / "record.json").as_posix()
        if key not in self.runs:
            self.runs[key] = _user(lambda: self._of_suite(wildcards, key))
        return self.runs[key]

    def _of_suite(self, wildcards: Any, key: str) -> Run:
        config = plan.with_suite(self.config, wildcards.suite)
        run = plan.resolve(config, wildcards.method, wildcards.dataset, int(wildcards.seed))
        if run.backbone.name != wildcards.backbone:
            raise UserError(
                f"Suite {wildcards.suite!r} has backbone {run.backbone.name}, "
                f"not {wildcards.backbone}."
            )
        if run.record.as_posix() != key:
            raise UserError(f"There is no run {key}; trials of a search lie in search/.")
        return run

    def check_targets(self, workflow: Any, arguments: Sequence[str]) -> None:
        """End with one line if no rule makes a target.

        Called when all rules are known, which is before Snakemake looks for their outputs.
        """
        known = [rule.name for rule in workflow.rules]
        chosen = workflow.resource_settings
        for option in ("overwrite_threads", "overwrite_resources"):
            for rule in getattr(chosen, option):
                _user(partial(look_up, "rule", rule, dict.fromkeys(known)))
        for target in () if workflow.remote_exec else targets(arguments[1:]):
            path = target if os.path.isabs(target) else os.path.relpath(target or ".")
            made = any(rule.is_producer(path) for rule in workflow.rules)
            if not (made or workflow.is_rule(target) or os.path.isfile(path)):
                _user(partial(self._refuse_target, target))

    def _refuse_target(self, target: str) -> None:
        """Raise :class:`~snella.errors.UserError` with the closest file that can be asked for."""
        results = Path(self.config.results).as_posix()
        names = [f"{name}.tex" for name in self.config.tables]
        names += [f"{name}.pdf" for name in self.config.figures]
        names += [f"{name}/search.yaml" for name in self.config.suites]
        names += ["report.html", "audit.html"]
        own = target.removeprefix(f"{results}/")
        tries = (own if own != target else "", Path(target).name, f"{Path(target).stem}.tex")
        close = next(filter(None, (closest(name, names) for name in tries)), None)
        hint = f" Did you mean {results}/{close}?" if close else ""
        raise UserError(
            f"No rule makes {ascii_name(target)}.{hint} Targets are files of {results}/, such as "
            f"{results}/table1.tex or {results}/report.html (docs/command-line.md)."
        )

    def begin(self, workflow: Any) -> None:
        """Start a workflow: alone on its results, after the jobs of one that died, retries chosen.

        A user's mistake ends it with one line and status 2.
        """
        try:
            self.coordinator = Coordinator(Path(self.config.results))
            name = self._begin_slurm(workflow) if workflow.non_local_exec else ""
            self.coordinator.note(name)
            jobs = list(workflow.dag.needrun_jobs())
            self._require_inputs(jobs)
            records = [str(job.output[0]) for job in jobs if job.rule.name == "run"]
            cells.begin(records)
            if records and self.config.warm_workers and not workflow.non_local_exec:
                self.worker = worker.start()
            chosen = retries.Retries(records, name)
            retries.install(chosen, _say)
            if name:
                submission.watch(workflow.scheduler._executor, chosen, _say)
        except UserError as error:
            _say(str(error))
            raise SystemExit(MISTAKE) from None

    def _require_inputs(self, jobs: Iterable[Any]) -> None:
        """End before anything runs if a job lacks raw data or weights; all are named."""
        jobs = list(jobs)
        datasets = [job.wildcards.dataset for job in jobs if job.rule.name == "prepare"]
        runs = [self.run(job.wildcards) for job in jobs if job.rule.name in ("run", "train")]
        if lost := missing(self.config, datasets, runs):
            raise UserError(" ".join(lost))

    def _records(self, runs: Iterable[Run]) -> list[str]:
        """The records that a result of runs needs; none are demanded with ``allow_missing``.

        A dry run, whose status is Snakemake's own, says what the runs lack.
        """
        if self.config.allow_missing:
            return []
        runs = list(runs)
        if self.workflow is not None and self.workflow.dryrun:
            for line in missing_of(self.config, runs):
                if self.config.first_time("missing", line):
                    _say(f"missing: {line} Without the -n Snakemake ends here, with status 2.")
        return [run.record.as_posix() for run in runs]

    def _settle_in_job(self) -> None:
        """In a cluster job of several cells, share the imports, and go on after one has failed.

        Neither profiles nor hooks reach Snakemake on a node. Its settings are there once it plans
        its jobs, which is when it asks for their inputs.
        """
        here = self.workflow
        if here is not None and here.remote_exec and here.execution_settings is not None:
            here.execution_settings.keep_going = True
            several = len(here.dag_settings.target_jobs) > 1
            if several and self.config.warm_workers and worker.PLACE not in os.environ:
                self.worker = worker.start()

    def _begin_slurm(self, workflow: Any) -> str:
        """Check what is asked of SLURM, wait for former jobs, return the new jobs' common name."""
        name = str(getattr(workflow.scheduler._executor, "run_uuid", ""))
        if not name:  # another scheduler's executor
            return name
        self.requests.check(list(workflow.dag.needrun_jobs()))
        if self.coordinator.wait_for_former(_say) and not workflow.execution_settings.lock:
            start_over()
        watch_pending(name, _say)
        return name

    def settings(self, wildcards: Any) -> str:
        """The run's resolved settings, canonical JSON."""
        return self.run(wildcards).to_json()

    def code(self, wildcards: Any) -> str:
        """The code and libraries that train and score the run: what makes it stale when changed."""
        run = self.run(wildcards)
        return json.dumps(_user(lambda: code_key(run)), sort_keys=True)

    def training_code(self, wildcards: Any) -> str:
        """The code and libraries that train the run."""
        key = _user(lambda: training_key(self.run(wildcards)))
        return json.dumps(key, sort_keys=True)

    def training(self, wildcards: Any) -> list[str]:
        """The finished training, where scoring is a job of its own."""
        run = self.run(wildcards)
        return [f"{run.folder.as_posix()}/training.json"] if run.task.expensive_scoring else []

    def backbone_file(self, wildcards: Any) -> list[str]:
        """The files of the backbone's weights that are there.

        What the run left that no longer fits the plan is made again: asked here, once for each job.
        """
        self._settle_in_job()
        run = self.run(wildcards)
        if self.workflow is not None and not self.workflow.remote_exec:
            self.workflow.dag.forcefiles.update(_user(lambda: self._outdated(run)))
        return [file.as_posix() for file in present(run.backbone.entry)]

    def _outdated(self, run: Run) -> list[str]:
        """The files of a run, and its data, that were made from something else than planned.

        Snakemake sees that by its notes on the jobs it ran, and has none of what `snella run` made
        or another folder's workflow.
        """
        found = [f"{run.dataset.prepared}/manifest.json"] if self._moved(run.dataset.name) else []
        try:
            record = read_record(run.place)
        except UserError:
            return found  # damaged: the table says so
        changed = set() if record is None else set(differences(run, record, self._inputs))
        if changed:
            found.append(run.record.as_posix())
        if changed - {PARTS["evaluation"], PARTS["merge"]}:  # those cost no training
            found.append(f"{run.place}/training.json")
        return found

    def method_file(self, wildcards: Any) -> str:
        """The method's source file, for reports; what counts of it is in :meth:`code`."""
        return self.run(wildcards).method.file

    def threads(self, wildcards: Any) -> int:
        """CPU threads of a run, from its protocol."""
        return self.run(wildcards).protocol.threads

    def overlay(self, wildcards: Any) -> str:
        """The whole configuration; returned by a function, its braces are no wildcards."""
        return self._overlay

    def dataset_overlay(self, wildcards: Any) -> str:
        """A configuration with one data set's entry: all that preparing it needs."""
        known = self.config.datasets
        spec = _user(lambda: look_up("data set", wildcards.dataset, known))
        entry = spec.model_dump(mode="json")
        content = {
            "data": self.config.data,
            "tasks": self.config.tasks,
            "datasets": {wildcards.dataset: entry},
        }
        return json.dumps(content, sort_keys=True)

    def dataset_origin(self, wildcards: Any) -> str:
        """What a prepared folder is made from; an image replaced under its list changes it."""
        return str(_user(lambda: self._origin(wildcards.dataset)))

    def table_records(self, wildcards: Any) -> list[str]:
        """The records a table needs."""
        return self._records(self._table_runs(wildcards))

    def search_records(self, wildcards: Any) -> list[str]:
        """The records of all trials of a suite's search."""
        return self._records(self._search_runs(wildcards))

    def search_content(self, wildcards: Any) -> str:
        """What a search shows besides its records."""
        runs = self._search_runs(wildcards)
        suite = plan.with_suite(self.config, wildcards.suite)
        search = plan.current_suite(suite).search.model_dump(mode="json")
        return self._content([search, _report_code()], runs)

    def _search_runs(self, wildcards: Any) -> list[Run]:
        return _user(lambda: plan.search_runs(plan.with_suite(self.config, wildcards.suite)))

    def page_content(self, wildcards: Any) -> str:
        """What page and audit show: all records and failures, and the code that writes them."""
        found = sorted(Path(self.config.results).glob("runs/*/*/*/*/*/*.json"))
        marks = [[p.as_posix(), p.stat().st_mtime_ns] for p in found if p.name in FILES]
        return digest_json([marks, _report_code()])

    def figure_records(self, wildcards: Any) -> list[str]:
        """The records a figure needs."""
        return self._records(self._figure_runs(wildcards))

    def figure_content(self, wildcards: Any) -> str:
        """What a figure shows besides its records."""
        runs, spec = self._figure_runs(wildcards), self.config.figures[wildcards.figure]
        task = runs[0].task
        code = entry_key(task.figures[task.figure_kind(spec.kind)])
        return self._content([spec.model_dump(), code], runs)

    def _figure_runs(self, wildcards: Any) -> list[Run]:
        return _user(lambda: plan.figure_runs(self.config, wildcards.figure))

    @property
    def figure_names(self) -> str:
        """What figures are called: the configured names, and any that looks like a figure's.

        The latter are asked for by mistake; :meth:`figure_records` then names the closest one.
        """
        return "|".join(["figure[A-Za-z0-9_]+", *map(re.escape, self.config.figures)])

    def table_content(self, wildcards: Any) -> str:
        """What a table shows besides its records.

        A faulty description ends the planning: a job would have cost the older table.
        """
        from snella.jobs.tables import table_spec

        config = _user(lambda: plan.for_table(self.config, wildcards.table))
        _user(lambda: table_spec(config, wildcards.table))
        shown = {
            "spec": config.tables[wildcards.table],
            "suite": plan.current_suite(config).model_dump(mode="json"),
            "name": config.suite,
            "labels": {name: row.label for name, row in config.methods.items()},
            "code": _report_code(),
        }
        return self._content(shown, self._table_runs(wildcards))

    def _content(self, shown: Any, runs: Iterable[Run]) -> str:
        """What is shown and, with ``allow_missing``, which records and failures there are."""
        wanted = runs if self.config.allow_missing else ()
        files = [run.folder / name for run in wanted for name in FILES]
        there = [f"{path}@{path.stat().st_mtime_ns}" for path in files if path.exists()]
        return json.dumps([shown, there], sort_keys=True)

    def _table_runs(self, wildcards: Any) -> list[Run]:
        from snella.jobs import tables

        return _user(lambda: tables.table_runs(self.config, wildcards.table))


@cache
def _report_code() -> str:
    """The digest of all that writes tables, published numbers included."""
    from snella.files import digest_tree
    from snella.runs.sources import PACKAGE

    return digest_tree(PACKAGE / "report")
