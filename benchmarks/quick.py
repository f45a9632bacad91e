"""Where the time of the quick suite goes: start-up, data, training, evaluation, Snakemake.

    python benchmarks/quick.py                     # runs the suite afresh in a temporary folder
    python benchmarks/quick.py --results results   # looks at a suite that has already run

Seconds are summed over jobs unless they are said to be wall time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

IMPORTS = ("torch", "timm", "peft", "snella.runs.execute")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", type=Path, help="results of a suite that has run")
    options.add_argument("--suite", default="quick")
    options.add_argument("--cores", type=int, default=os.cpu_count())
    options.add_argument("--json", type=Path, help="write the figures here, too")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures: dict[str, float] = {}
        results = chosen.results
        if results is None:
            results = Path(temporary) / "results"
            figures |= run_workflow(Path(temporary), results, chosen.suite, chosen.cores)
        figures |= start_up() | inside(results / "runs" / chosen.suite)
    show(figures, chosen.cores)
    if chosen.json:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "cores": chosen.cores,
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        }
        chosen.json.write_text(json.dumps({**about, "seconds": figures}, indent=2) + "\n")


def run_workflow(folder: Path, results: Path, suite: str, cores: int) -> dict[str, float]:
    """Wall time of the whole workflow from no data, and of a second call with nothing to do."""
    command = [
        "snakemake", "--cores", str(cores),
        "--quiet", "all", "--config", f"suite={suite}", f"results={results}",
        f"data={folder / 'data'}",
        "--", str(results / "table1.tex"),
    ]  # fmt: skip
    seconds = {}
    for label in ("workflow, wall", "second call, wall"):
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        seconds[label] = time.perf_counter() - begin
    return seconds


def start_up() -> dict[str, float]:
    """Import times in a fresh process, which warm workers pay once instead of once per run."""
    found = {}
    for module in IMPORTS:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        found[f"import {module}"] = time.perf_counter() - begin
    return found


def inside(runs: Path) -> dict[str, float]:
    """Training and evaluation as the runs recorded them."""
    rows = [row for path in runs.rglob("history.csv") for row in csv.DictReader(path.open())]
    records = list(runs.rglob("record.json"))
    if not records:
        raise SystemExit(f"No records below {runs}.")
    return {
        "runs": len(records),
        "training": sum(float(row["train_seconds"]) for row in rows),
        "evaluation on test": sum(float(row.get("predict_seconds") or 0) for row in rows),
    }


def show(figures: dict[str, float], cores: int) -> None:
    """Print the figures, and what is left for Snakemake and start-up."""
    table = Table("What", "Seconds", title=f"Quick suite on {cores} cores")
    for name, value in figures.items():
        table.add_row(name, f"{value:.0f}" if name == "runs" else f"{value:.1f}")
    if "workflow, wall" in figures:
        work = figures["training"] + figures["evaluation on test"]
        rest = figures["workflow, wall"] * cores - work
        table.add_row("all else (core-seconds: data, start-up, Snakemake, waiting)", f"{rest:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
