"""What each verb does; its docstring is its help. Imports are inside, so that help is quick."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from snella.errors import UserError
from snella.suite import config as configuration
from snella.suite.overlays import expand, overlay
from snella.suite.reading import COMMAND_LINE, parse


def load(options: argparse.Namespace) -> configuration.Config:
    """The configuration that the options of a verb choose."""
    pairs: dict[str, Any] = {}
    for item in options.config:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"--config takes KEY=VALUE, got {item!r}.")
        one = {key: parse(value, f"--config {key}: the value")[0]}
        if key in pairs:
            raise UserError(f"--config gives {key} twice; give it once.")
        pairs |= one
    if options.overlay:
        pairs = overlay(_json(options.overlay, "--overlay"), expand(pairs, {}, COMMAND_LINE))
    return configuration.load(options.configfile, pairs)


def table_of(config: configuration.Config, options: argparse.Namespace) -> str:
    """The table that a verb is about."""
    from snella.suite.plan import main_table

    return options.table or main_table(config)


def _json(text: str, option: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{option} must be a JSON object.")
    return content


def run(options: argparse.Namespace) -> int:
    """Train one method on one data set, showing progress, and write its record.

    A run killed at any moment continues from its last epoch; a finished one is not trained again.
    """
    from snella.suite import plan as planning

    config = load(options)
    chosen = planning.resolve(config, options.method, options.dataset, options.seed)
    from snella.cli.progress import ProgressDisplay
    from snella.jobs import devices
    from snella.jobs.prepare import prepare_dataset
    from snella.runs.execute import execute as execute_run

    prepare_dataset(config, options.dataset, missing_only=True)
    devices.announce(config.gpu_share)
    title = f"{chosen.method.name} on {chosen.dataset.name}, seed {chosen.seed}"
    with devices.lease(), ProgressDisplay(title) as display:
        record = execute_run(chosen, display.report, again=options.again)
        display.finish(record, chosen.folder)
    return 0 if record["status"] == "ok" else 1


def execute(options: argparse.Namespace) -> int:
    """Do one run of the workflow from its resolved settings."""
    from snella.runs.run import Run

    _json(options.settings, "--settings")
    chosen = Run.from_json(options.settings)
    from snella.jobs import devices
    from snella.jobs.cells import finished_line
    from snella.runs.execute import execute as execute_run

    with devices.lease():
        record = execute_run(chosen, stage=options.stage)
    sys.stdout.write(f"{finished_line(record)}\n")
    return 0 if record["status"] in ("ok", "diverged") else 1


def check(options: argparse.Namespace) -> int:
    """Run the contract suite on one method and print a report; status 1 if something fails."""
    from snella.suite import plan as planning

    config = load(options)
    path, hyperparameters = planning.find_method(config, options.method)
    others = planning.method_files(config).values()
    from snella.check.report import check_and_report

    return check_and_report(options.method, path, hyperparameters, list(others))


def new_baseline(options: argparse.Namespace) -> None:
    """Write a method file that already passes `snella check`, to be edited."""
    from snella.jobs.scaffold import write_baseline

    for line in write_baseline(load(options), options.name):
        sys.stdout.write(f"{line}\n")


def plan(options: argparse.Namespace) -> None:
    """List every run of a table: done, stale and why, and how long the rest takes.

    With --suite it says what whole suites cost (`paper` stands for all that are no demonstration),
    and with --search what the search of the configured one costs, trial by trial.

    States: done, diverged, stale (made with other settings, code or data), failed, running,
    missing, damaged (a record that is unreadable or was changed by hand).
    """
    from snella.cli import lists

    config = load(options)
    if options.suite:
        lists.print_budget(config, options.suite, options.json)
    elif options.search:
        lists.print_search(config, options.json)
    else:
        lists.print_plan(config, table_of(config, options), options.json)


def status(options: argparse.Namespace) -> None:
    """Summarise the runs of a table: counts, time left, what runs where, what is wrong and why."""
    from snella.cli.lists import print_status

    config = load(options)
    print_status(config, table_of(config, options), options.json)


def methods(options: argparse.Namespace) -> None:
    """List the methods (rows) that the configuration knows."""
    from snella.cli.lists import print_methods

    print_methods(load(options), options.json)


def datasets(options: argparse.Namespace) -> None:
    """List the data sets (columns) that the configuration knows."""
    from snella.cli.lists import print_datasets

    print_datasets(load(options), options.json)


def prepare(options: argparse.Namespace) -> None:
    """Read or render a data set, check it, and write its prepared arrays and manifest.

    What is odd but usable (classes without images, images that occur twice) is a warning; it
    also stands in the notes of the tables that show the data set.
    """
    from snella.jobs.prepare import prepare_dataset, warnings_of

    folder = prepare_dataset(load(options), options.dataset)
    for warning in warnings_of(folder):
        sys.stdout.write(f"warning: {warning}\n")
    sys.stdout.write(f"{folder / 'manifest.json'}\n")


def doctor(options: argparse.Namespace) -> int:
    """Check machine, configuration, data and checkpoints; for each problem say what to do.

    The report holds no names, hosts or paths of yours beyond the repository, so that it can be
    pasted into a bug report. Status 1 if something is missing that a run of the suite needs.
    """
    from snella.cli.doctor import examine, print_findings

    return print_findings(examine(lambda: load(options)), options.json)


def completion(options: argparse.Namespace) -> None:
    """Print a script that completes verbs and options in your shell."""
    import shtab

    sys.stdout.write(shtab.complete(options.parser, options.shell) + "\n")


def schema(options: argparse.Namespace) -> None:
    """Write JSON schemas of the configuration files, which editors use to complete and check."""
    from snella.cli.schemas import write_schemas

    for path in write_schemas(options.out):
        sys.stdout.write(f"{path}\n")
