"""From the configuration and the records on disk to the page of all results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from snella import results
from snella.errors import UserError
from snella.files import write_text
from snella.jobs import tables
from snella.jobs.figures import examples
from snella.jobs.prepare import inputs_of
from snella.records import FILES
from snella.report.page import Content, PageRun, PageSuite, PageTable, render
from snella.report.page.content import RunKey
from snella.report.published.audit import audit
from snella.report.published.papers import read_paper
from snella.report.runs.details import describe
from snella.report.table import Table
from snella.runs.run import Run
from snella.suite import plan
from snella.suite.config import Config
from snella.suite.status import Inputs, state


def write_page(config: Config, out: Path, *, stale: bool = False) -> Path:
    """Write every table, run, example and published number as one HTML file; return its path.

    A table is shown for every suite that has left a run of it. With ``stale`` records that do not
    fit the configuration count, marked.
    """
    write_text(out, render(content(config, stale=stale)))
    return out


def content(config: Config, *, stale: bool = False) -> Content:
    """All that the page shows."""
    suites: list[PageSuite] = []
    skipped: list[str] = []
    runs: dict[RunKey, PageRun] = {}
    for own in _suites(config):
        shown: list[PageTable] = []
        for name in sorted(own.tables, key=_order):
            planned = _runs(own, name)
            if not any(_started(run) for run in planned):
                continue
            inputs = inputs_of(own, planned)
            for run in planned:
                key = run.suite, run.method.name, run.dataset.name, run.seed
                if key not in runs:
                    runs[key] = _page_run(own, run, inputs)
            try:
                shown.append(_table(own, name, stale))
            except UserError as error:
                skipped.append(f"{name}, suite {own.suite}: {error}")
        if shown:
            info = tables.suite_info(own)
            try:
                galleries = examples(own)
            except UserError as error:
                galleries = []
                skipped.append(f"examples, suite {own.suite}: {error}")
            suites.append(PageSuite(info.title, info.banner, shown, galleries))
    try:
        found = audit(results.frame(config.results)) if suites else None
    except UserError as error:
        found = None
        skipped.append(f"audit: {error}")
    return Content(suites, runs, skipped, found)


def _suites(config: Config) -> Iterator[Config]:
    """The configuration with each suite that has left runs, the configured one first."""
    root = Path(config.results) / "runs"
    present = [name for name in config.suites if (root / name).is_dir()]
    for name in sorted(present, key=lambda name: name != config.suite):
        yield plan.with_suite(config, name)


def _runs(config: Config, name: str) -> list[Run]:
    """The runs of a table of the suite's own task; none where the suite has none of its columns."""
    try:
        if plan.for_table(config, name).suite != config.suite:
            return []
        return tables.table_runs(config, name)
    except UserError:
        return []


def _started(run: Run) -> bool:
    return any((run.folder / file).exists() for file in (*FILES, "config.json"))


def _page_run(config: Config, run: Run, inputs: Inputs) -> PageRun:
    entry, data = config.methods[run.method.name], config.datasets[run.dataset.name]
    try:
        how = state(run, inputs)
        name, why = str(how.name), how.reason
        details = describe(run.folder, check=False) if _started(run) else None
    except UserError as error:
        name, why, details = "damaged", str(error), None
    return PageRun(
        run.suite, run.method.name, run.dataset.name, run.seed,
        entry.label or run.method.name, data.label or run.dataset.name,
        name, why, run.folder.as_posix(), details,
    )  # fmt: skip


def _table(config: Config, name: str, stale: bool) -> PageTable:
    table = tables.build(config, name, stale)
    command = (
        f"snakemake --cores all --config suite={config.suite} results={config.results}"
        f" -- {config.results}/{name}.tex"
    )
    return PageTable(_title(table), table, command)


def _order(name: str) -> tuple[bool, int, str]:
    """Tables of the paper first, by number."""
    number = name.removeprefix("table")
    return (not number.isdigit(), int(number) if number.isdigit() else 0, name)


def _title(table: Table) -> str:
    """A table's name as it is said: "Table 5", "Table 3 of S²FT", "Further"."""
    number = table.name.rpartition("table")[2]
    if not number.isdigit():
        return table.name.replace("_", " ").capitalize()
    source = table.spec.published
    if table.name == f"table{number}" or source is None:
        return f"Table {number}"
    return f"Table {number} of {read_paper(source.source).title.partition(' (')[0]}"
