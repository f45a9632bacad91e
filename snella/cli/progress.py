"""What a person sees of one run: a bar, or plain lines where it is no terminal."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressDisplay:
    """Epochs, loss, accuracy and time left: a bar, or plain lines where it is no terminal."""

    def __init__(self, title: str) -> None:
        self.console = Console(soft_wrap=True, highlight=False, markup=False)
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
            info = next((m for m in record["metric_info"] if m["name"] == metric), {"unit": "%"})
            percent = info["unit"] == "%"
            for rule, found in record["metrics"].items():
                value = f"{100 * found[metric]:.2f} %" if percent else f"{found[metric]:.4g}"
                self.console.print(f"{metric} {value} on test ({rule}, epoch {found['epoch'] + 1})")
            trained = record["parameters"]
            self.console.print(f"{trained['trainable']:,} trainable parameters without the head")
            for warning in record.get("warnings", ()):
                self.console.print(f"warning: {warning}")
            self.console.print(f"record: {folder / 'record.json'}")
        else:
            self.console.print(f"{record['status']}: {record['reason']}")
            self.console.print(f"log: {folder / 'log.txt'}")
