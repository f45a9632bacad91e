"""Verbs about tables, figures and data sets' folders; each docstring is the verb's help."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from snella.cli.verbs import load, table_of
from snella.errors import UserError, unknown
from snella.suite.config import locate


def table(options: argparse.Namespace) -> None:
    """Write a table from the records there are: LaTeX, CSV, Markdown.

    A run without a record is a dash with a footnote; so is a stale one, unless --stale is given.
    """
    from snella.jobs import tables

    config = load(options)
    _list(tables.write(config, table_of(config, options), stale=options.stale))


def report(options: argparse.Namespace) -> None:
    """Write all results as one HTML page that works offline, from whatever records there are.

    Every table with its published numbers, every run behind a cell, failures and gaps, trade-offs,
    examples, and the audit.
    """
    from snella.jobs.page import write_page

    config = load(options)
    out = options.out or Path(config.results) / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: the page is HTML; give its file a name that ends in .html.")
    sys.stdout.write(f"{write_page(config, out, stale=options.stale)}\n")


def figure(options: argparse.Namespace) -> None:
    """Draw a figure of examples from the predictions there are."""
    from snella.jobs import figures

    sys.stdout.write(f"{figures.draw(load(options), options.figure)}\n")


class _Progress:
    """Says on stderr how far a download is, at most every ten seconds."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def __call__(self, name: str, done: int, total: int | None) -> None:
        if time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            share = f" ({done / total:.0%})" if total else ""
            sys.stderr.write(f"{name}: {done / 1e6:,.0f} MB{share}\n")


def pdf(options: argparse.Namespace) -> None:
    """Compile a table to PDF and PNG."""
    from snella.report.pdf import compile_pdf

    if options.tex.suffix != ".tex":
        raise UserError(f"{options.tex} is no .tex file; name a table written by `snella table`.")
    if not options.tex.is_file():
        raise UserError(f"There is no file {options.tex}; write it with `snella table`.")
    try:
        options.tex.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{options.tex} is not UTF-8 (byte {error.start}); save it so, or write it anew with "
            "`snella table`."
        ) from error
    sys.stdout.write(f"{compile_pdf(options.tex)[0]}\n")


def statistics(options: argparse.Namespace) -> None:
    """Write the paired comparison of a table's rows with a reference row, and their ranks."""
    from snella.jobs import tables

    config = load(options)
    reference = options.reference
    if reference is not None and reference not in config.methods:
        raise unknown("method", reference, config.methods)
    table = table_of(config, options)
    _list(tables.write_statistics(config, table, reference, stale=options.stale))


def versus(options: argparse.Namespace) -> None:
    """Write a table beside the published numbers that it can be compared with."""
    from snella.jobs import tables

    config = load(options)
    table = table_of(config, options)
    written = tables.write_versus(config, table, stale=options.stale)
    if not written:
        sys.stderr.write(
            f"No published number can be compared with {table} of suite {config.suite!r}; nothing "
            "was written.\n"
        )
    _list(written)


def search(options: argparse.Namespace) -> None:
    """Write what a search of settings found, from the records of its trials; and its plot.

    The workflow runs the trials and then this: snakemake --cores all -- results/SUITE/search.yaml.
    What it costs is said by: snella plan --search.
    """
    from snella.jobs import search as searching
    from snella.suite import plan

    config = load(options)
    if options.suite is not None:
        config = plan.with_suite(config, options.suite)
    _list(searching.write(config))


def audit(options: argparse.Namespace) -> None:
    """Write the list of every published number and what became of it here."""
    from snella.jobs import tables

    _list(tables.write_audit(load(options)))


def data(options: argparse.Namespace) -> int:
    """Look at a data set's folder, or fetch one that its owner publishes.

    `check` looks at everything that can move a number, without preparing it. `download` fetches
    what config/downloads.yaml lists; an interrupted download goes on where it stopped.
    """
    raise AssertionError("one of its two parts is called")


def check_data(options: argparse.Namespace) -> int:
    """Print what a data set's folder holds and what is odd; status 1 if it cannot be used."""
    from snella.data.check import check, lines
    from snella.suite.plan import is_made

    config = load(options)
    known = config.datasets
    if options.name not in known:
        raise unknown("data set", options.name, known)
    if is_made(config, options.name):
        sys.stdout.write(f"{options.name} is packaged or rendered; there is no folder to check.\n")
        return 0
    findings = check(options.name, known[options.name])
    for line in lines(findings):
        sys.stdout.write(f"{line}\n")
    return int(any(finding.level == "error" for finding in findings))


def download(options: argparse.Namespace) -> int:
    """Fetch a data set or checkpoint, or list what can be fetched."""
    from snella.data.download import download as fetch
    from snella.data.download import load_downloads

    known = load_downloads(Path(locate("config/downloads.yaml")))
    if options.name is not None:
        entry = known.get(options.name)
        if entry is not None and not entry.manual:
            sys.stdout.write(f"{entry.title}; licence: {entry.licence}\n")
        _list(fetch(options.name, known, options.to, _Progress()))
        return 0
    for name, entry in known.items():
        how = "by hand" if entry.manual else "download"
        sys.stdout.write(f"{name}: {entry.title} ({how}; licence: {entry.licence})\n")
    return 0


def _list(paths: Iterable[Path]) -> None:
    for path in paths:
        sys.stdout.write(f"{path}\n")
