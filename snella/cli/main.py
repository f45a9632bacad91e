"""The command line: parse, call, print. Exit status 2 is a user's mistake, 1 a broken run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from snella import __version__
from snella.errors import UserError
from snella.suite import config as configuration

OVERVIEW = """\
snella: parameter-efficient fine-tuning of vision models, measured so that numbers can be trusted.

  snella run --method snella-8 --dataset digits    train one method on one data set
  snella plan                                      the runs of a table, which are done, time left
  snella show table1                               a table in the terminal
  snella methods, snella datasets                  the rows and the columns there are
  snella new-baseline NAME, snella check NAME      write a method of your own, and certify it

Tables are made by the workflow:   snakemake --profile workflow/profiles/local -- results/table1.tex
All verbs: snella --help; one verb: snella VERB --help. Documentation: docs/ of the repository.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; print a user's mistake as one line."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        sys.stdout.write(OVERVIEW)
        return 0
    options = build_parser().parse_args(given)
    try:
        return options.verb(options) or 0
    except UserError as error:
        sys.stderr.write(f"snella: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("snella: interrupted; the same command resumes.\n")
        return 130
    except BrokenPipeError:
        return 0


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="snella", description=OVERVIEW, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"snella {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", title="verbs")

    def verb(name: str, call: Callable[[argparse.Namespace], int | None], example: str) -> Any:
        summary = (call.__doc__ or "").strip()
        sub = verbs.add_parser(
            name,
            help=summary.splitlines()[0],
            description=summary,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(verb=call)
        return sub

    run = _with_config(verb("run", _run, "snella run --method snella-8 --dataset digits"))
    run.add_argument("--method", required=True, help="a row of config/methods.yaml")
    run.add_argument("--dataset", required=True, help="a column of config/datasets.yaml")
    run.add_argument("--seed", type=int, default=0, help="the repetition (default: 0)")
    run.add_argument("--again", action="store_true", help="train anew even if the run is finished")

    execute = verb("execute", _execute, 'snella execute --settings "$(cat config.json)"')
    execute.add_argument("--settings", required=True, help="the run's resolved settings, JSON")
    execute.add_argument("--stage", choices=("all", "train"), default="all", help="where to stop")
    execute.add_argument("--warm", action="store_true", help="use a warm worker")

    check = _with_config(verb("check", _check, "snella check baselines/mymethod.py"))
    check.add_argument("method", help="a row, a file in baselines/, or a path to any .py file")
    new = _with_config(verb("new-baseline", _new_baseline, "snella new-baseline mymethod"))
    new.add_argument("name", help="letters, digits and underscores, or a path ending in .py")

    _with_config(verb("methods", _methods, "snella methods"))
    _with_config(verb("datasets", _datasets, "snella datasets"))
    prepare = _with_config(verb("prepare", _prepare, "snella prepare digits"))
    prepare.add_argument("dataset", help="a column of config/datasets.yaml")
    for name, call in (("plan", _plan), ("table", _table), ("show", _show)):
        table = _with_config(verb(name, call, f"snella {name} table1"))
        table.add_argument("table", nargs="?", default="table1", help="a table (default: table1)")
    verb("worker", _worker, "snella worker")
    pdf = verb("pdf", _pdf, "snella pdf results/table1.tex")
    pdf.add_argument("tex", type=Path, help="a table written by `snella table`")
    return parser


def _with_config(sub: Any) -> Any:
    default = configuration.DEFAULT
    sub.add_argument(
        "--configfile", type=Path, default=default, help=f"your own settings (default: {default})"
    )
    sub.add_argument(
        "--config", nargs="*", default=[], metavar="KEY=VALUE",
        help="settings that come on top, such as suite=smoke or methods.full.label=Ours",
    )  # fmt: skip
    sub.add_argument("--overlay", help="further settings as JSON; the workflow uses it")
    return sub


def _load(options: argparse.Namespace) -> configuration.Config:
    overrides: dict[str, Any] = {}
    for item in options.config:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--config takes KEY=VALUE, got {item!r}.")
        target = overrides
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"--config {item}: {parent} is given a value and a part of it.")
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--config {item}: the value is not YAML ({reason}).") from error
    if options.overlay:
        overrides = configuration.overlay(json.loads(options.overlay), overrides)
    return configuration.load(options.configfile, overrides)


def _run(options: argparse.Namespace) -> int:
    """Train one method on one data set, showing progress, and write its record."""
    from snella.cli.progress import ProgressDisplay
    from snella.jobs.prepare import prepare_dataset
    from snella.runs.execute import execute
    from snella.suite import plan

    config = _load(options)
    run = plan.resolve(config, options.method, options.dataset, options.seed)
    prepare_dataset(config, options.dataset, missing_only=True)
    with ProgressDisplay(f"{run.method.name} on {run.dataset.name}, seed {run.seed}") as display:
        record = execute(run, display.report, again=options.again)
        display.finish(record, run.folder)
    return 0 if record["status"] == "ok" else 1


def _execute(options: argparse.Namespace) -> int:
    """Do one run of the workflow from its resolved settings."""
    if options.warm:
        from snella.jobs import worker

        arguments = ["execute", "--settings", options.settings, "--stage", options.stage]
        status = worker.call(arguments) if worker.available() else None
        if status is not None:
            return status
    from snella.runs.execute import execute
    from snella.runs.run import Run

    record = execute(Run.from_json(options.settings), stage=options.stage)
    name = f"{record['run']['method']} on {record['run']['dataset']}"
    sys.stdout.write(f"{name}: {record['status']} {record['reason'] or ''}\n")
    return 0 if record["status"] in ("ok", "diverged") else 1


def _worker(options: argparse.Namespace) -> None:
    """Run many short jobs without paying torch's import for each; the workflow starts it."""
    from snella.jobs import worker

    worker.serve(main)


def _check(options: argparse.Namespace) -> int:
    """Run the contract suite on one method and print a report; status 1 if something fails."""
    from snella.check.report import check_and_report
    from snella.suite import plan

    config = _load(options)
    path, hyperparameters = plan.find_method(config, options.method)
    others = plan.method_files(config).values()
    return check_and_report(options.method, path, hyperparameters, list(others))


def _new_baseline(options: argparse.Namespace) -> None:
    """Write a method file that already passes `snella check`, to be edited."""
    from snella.jobs.scaffold import write_baseline

    for line in write_baseline(_load(options), options.name):
        sys.stdout.write(f"{line}\n")


def _plan(options: argparse.Namespace) -> None:
    """List the runs of a table, which are done, and how long the rest may take."""
    from snella.cli.progress import print_plan

    print_plan(_load(options), options.table)


def _methods(options: argparse.Namespace) -> None:
    """List the methods (rows) that the configuration knows."""
    from snella.cli.progress import print_methods

    print_methods(_load(options))


def _datasets(options: argparse.Namespace) -> None:
    """List the data sets (columns) that the configuration knows."""
    from snella.cli.progress import print_datasets

    print_datasets(_load(options))


def _prepare(options: argparse.Namespace) -> None:
    """Read or render a data set and write its prepared arrays and manifest."""
    from snella.jobs.prepare import prepare_dataset

    folder = prepare_dataset(_load(options), options.dataset)
    sys.stdout.write(f"{folder / 'manifest.json'}\n")


def _table(options: argparse.Namespace) -> None:
    """Write a table from the records there are."""
    from snella.jobs import tables

    for path in tables.write(_load(options), options.table):
        sys.stdout.write(f"{path}\n")


def _show(options: argparse.Namespace) -> None:
    """Print a table in the terminal, from the records there are."""
    from snella.jobs import tables

    tables.show(_load(options), options.table)


def _pdf(options: argparse.Namespace) -> None:
    """Compile a table to PDF and PNG."""
    from snella.report.pdf import compile_pdf

    done = compile_pdf(options.tex)
    if done is None:
        raise UserError("LaTeX is not installed (Debian: texlive-latex-recommended poppler-utils).")
    sys.stdout.write(f"{done[0]}\n")


if __name__ == "__main__":
    raise SystemExit(main())
