"""Verbs about single runs and whole trees of them: show, diff, retry, crate."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from snella.cli.verbs import load, table_of
from snella.errors import UserError, closest, unknown
from snella.suite.config import DEFAULT

if TYPE_CHECKING:
    from snella.suite.config import Config


def show(options: argparse.Namespace) -> None:
    """Print a table, or everything about one run, from the records there are.

    A run is a folder or its name below results/runs, of which parts may be left out: what ran, how
    it ended, its numbers, warnings, environment, digests, curve, the end of its log, and the
    commands that repeat it.
    """
    config = load(options)
    name = table_of(config, options)
    if name in config.tables:
        _show_table(config, name, options)
        return
    from snella.jobs.runs import find_run
    from snella.report.runs.details import describe

    if "/" not in name and not Path(name).exists():
        _check_table(name, list(config.tables))
    details = describe(find_run(Path(config.results), name))
    if options.json:
        from snella.cli.lists import print_json

        print_json(details)
    else:
        from snella.cli.run_text import print_run

        print_run(details)


def _show_table(config: Config, name: str, options: argparse.Namespace) -> None:
    from snella.jobs import tables

    if not options.json:
        tables.show(config, name, stale=options.stale)
        return
    from snella.cli.lists import print_json
    from snella.report.write import cells

    table = tables.build(config, name, stale=options.stale)
    rows = json.loads(cells(table).to_json(orient="records"))
    print_json({"caption": table.caption, "cells": rows, "remarks": table.remarks})


def _check_table(name: str, tables: list[str]) -> None:
    """A name without a slash is most likely a misspelt table."""
    if closest(name, tables):
        raise unknown("table", name, tables)


def diff(options: argparse.Namespace) -> int:
    """Compare two results folders, or two runs, cell by cell.

    Says which cells differ in what came out (status, numbers, weights, predictions) or in their
    settings, and by how much; and what they were made with: commit, code, versions, hardware.
    Status 0 if the same was run and the same came out, 1 if not. Times and memory are not compared.
    """
    from snella.jobs.runs import find_run, read_tree
    from snella.report.runs.diff import compare

    results = Path(load(options).results)
    places = [Path(name) if Path(name).is_dir() else find_run(results, name)
              for name in (options.a, options.b)]  # fmt: skip
    trees = [read_tree(place) for place in places]
    for place, tree in zip(places, trees, strict=True):
        if not tree:
            raise UserError(f"{place} holds no records; name a results folder or a run.")
    if ("" in trees[0]) != ("" in trees[1]):
        raise UserError("Compare a run with a run, or a results folder with another one.")
    found = compare(*trees)
    if options.json:
        from snella.cli.lists import print_json

        print_json({"a": str(places[0]), "b": str(places[1]), **found.to_json()})
    else:
        from snella.cli.run_text import print_comparison

        print_comparison(found, *(place.as_posix() for place in places))
    return 0 if found.equal else 1


def retry(options: argparse.Namespace) -> int:
    """Let the workflow try failed cells again.

    Removes the marks of failure, of the named runs or of all; what had finished is kept, and a
    checkpoint is resumed. A run that diverged would diverge again, so it is tried again only where
    it is named. Prints the command to type then.
    """
    from snella.jobs.runs import failed_runs, find_run, forget_failures
    from snella.suite.plan import main_table

    config = load(options)
    results = Path(config.results)
    named = [find_run(results, name) for name in options.runs]
    cleared, busy = forget_failures(named or failed_runs(results), diverged=bool(named))
    for folder in busy:
        sys.stdout.write(f"still running, left alone: {folder.as_posix()}\n")
    for folder in cleared:
        sys.stdout.write(f"to be tried again: {folder.as_posix()}\n")
    if not cleared:
        sys.stdout.write("No run has failed; there is nothing to try again.\n")
        return 0
    target = (results / f"{main_table(config)}.tex").as_posix()
    sys.stdout.write(f"Now type: {_workflow(options)} -- {shlex.quote(target)}\n")
    return 0


def _workflow(options: argparse.Namespace) -> str:
    """The workflow's command with the settings of this call."""
    words = ["snakemake", "--cores", "all"]
    if options.configfile != DEFAULT:
        words += ["--configfile", options.configfile.as_posix()]
    if options.config:
        words += ["--config", *options.config]
    return shlex.join(words)


def crate(options: argparse.Namespace) -> None:
    """Export the results as a Workflow Run RO-Crate, to be archived and cited.

    A folder, or with the ending .zip one file: the workflow, its configuration, the tables and the
    record, settings, curve and log of every run, described in ro-crate-metadata.json
    (https://www.researchobject.org/workflow-run-crate/). Needs the package rocrate.
    """
    from snella.jobs.archive import write_crate

    config = load(options)
    path = write_crate(config, options.out, own=options.configfile, adapters=options.adapters)
    sys.stdout.write(f"{path.as_posix()}\n")
