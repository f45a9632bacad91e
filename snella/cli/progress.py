"""What a person sees: progress of a run, the plan of a suite, the lists of what there is."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from snella.records import read_record
from snella.suite import plan
from snella.suite.config import Config


class ProgressDisplay:
    """Epochs, loss, accuracy and time left: a bar, or plain lines where it is no terminal."""

    def __init__(self, title: str) -> None:
        self.console = Console()
        self.title = title
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("epochs  {task.fields[numbers]}"), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.started = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        self.bar.start()
        self.line = self.bar.add_task(self.title, total=None, numbers="preparing")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.bar.stop()

    def report(self, row: dict[str, float], epochs: int) -> None:
        """Show one finished epoch."""
        numbers = f"loss {row['loss']:.3f}"
        if "val" in row:
            numbers += f"  val {100 * row['val']:.1f} %"
        done = int(row["epoch"]) + 1
        self.bar.update(self.line, completed=done, total=epochs, numbers=numbers)
        if self.bar.disable:
            left = (time.monotonic() - self.started) / done * (epochs - done)
            self.console.print(f"epoch {done}/{epochs}  {numbers}  {left:.0f} s left")

    def finish(self, record: dict[str, Any], folder: Path) -> None:
        """Say how the run ended and where its record is."""
        self.bar.stop()
        if record["status"] == "ok":
            metric = record["metric"]
            for rule, found in record["metrics"].items():
                self.console.print(
                    f"{metric} {100 * found[metric]:.2f} % on test ({rule}, "
                    f"epoch {found['epoch'] + 1})"
                )
            trained = record["parameters"]
            self.console.print(f"{trained['trainable']:,} trainable parameters without the head")
            self.console.print(f"record: {folder / 'record.json'}")
        else:
            self.console.print(f"{record['status']}: {record['reason']}")
            self.console.print(f"log: {folder / 'log.txt'}")


def print_plan(config: Config, table_name: str) -> None:
    """Print each run of a table, whether it is done, and the time the rest may take."""
    runs = plan.table_runs(config, table_name)
    records = {run.key: read_record(run.folder) for run in runs}
    table = Table(
        "Method",
        "Data set",
        "Seed",
        "Status",
        "Seconds",
        title=f"{table_name}, suite {config.suite}",
    )
    for run in runs:
        record = records[run.key]
        status = record["status"] if record else "to do"
        seconds = f"{record['cost']['train_seconds']:.0f}" if record and "cost" in record else ""
        table.add_row(run.method.name, run.dataset.name, str(run.seed), status, seconds)
    console = Console()
    console.print(table)
    known = [r["cost"]["train_seconds"] for r in records.values() if r and "cost" in r]
    waiting = sum(record is None or record["status"] != "ok" for record in records.values())
    console.print(f"{len(runs)} runs, {len(runs) - waiting} done, {waiting} to do")
    if known and waiting:
        typical = statistics.median(known)
        console.print(
            f"about {waiting * typical / 60:.0f} core-minutes of training "
            f"({typical:.0f} s per run, the median of {len(known)} finished runs)"
        )
    elif waiting:
        console.print("no run has finished yet, so there is nothing to estimate their time from")


def print_methods(config: Config) -> None:
    """Print the configured rows."""
    table = Table("Name", "Label", "File", "Hyper-parameters")
    for name, entry in config.methods.items():
        settings = ", ".join(f"{k}={v}" for k, v in entry.hyperparameters.items())
        table.add_row(name, entry.label or name, plan.method_path(config, entry.file), settings)
    Console().print(table)


def print_datasets(config: Config) -> None:
    """Print the configured data sets and whether they are prepared."""
    table = Table("Name", "Label", "Kind", "Folder", "Prepared")
    for name, entry in config.datasets.items():
        ready = (plan.prepared_folder(config, name) / "manifest.json").exists()
        where = entry.path or ("packaged or rendered" if entry.kind == "quick" else "not set")
        table.add_row(name, entry.label or name, entry.kind, where, "yes" if ready else "no")
    Console().print(table)
