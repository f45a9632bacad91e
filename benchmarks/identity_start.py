"""What ``init_weights=True`` does to training: SNELLA's start at the identity against the paper's.

Trains SNELLA-8 on a task of the quick suite with both starts, at the suite's learning rate and at
multiples of it, with the same seeds; the test accuracy is of the last epoch. The loss is the mean
over each epoch.

    python benchmarks/identity_start.py --out benchmarks/results/identity_start.json
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from snella.jobs.prepare import prepare_dataset
from snella.records import provenance
from snella.runs.execute import execute
from snella.suite import config as configuration
from snella.suite import plan

ROW = "snella-8"
STARTS = {"paper": False, "identity": True}


def train(start: str, factor: float, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Accuracies (%) of all seeds and the mean losses of the epochs."""
    overrides: dict[str, Any] = {
        "suite": "quick", "data": str(options.data), "results": str(folder / f"{start}-{factor}"),
    }  # fmt: skip
    config = configuration.load(overrides=overrides)
    prepare_dataset(config, options.dataset, missing_only=True)
    cells: dict[str, Any] = {"methods": [ROW], "datasets": [options.dataset]}
    (first,) = plan.plan(config, **cells, seeds=[0])
    rate = factor * first.protocol.lr
    row = f"suites.quick.method_overrides.{ROW}"
    overrides |= {
        f"{row}.hyperparameters": {"options": {"init_weights": STARTS[start]}},
        f"{row}.protocol": {"lr": rate},
    }
    accuracies, losses = [], []
    config = configuration.load(overrides=overrides)
    for run in plan.plan(config, **cells, seeds=options.seeds):
        record = execute(run)
        if record["status"] != "ok":
            raise SystemExit(f"{run.key}: {record['status']}: {record['reason']}")
        accuracies.append(round(100 * record["metrics"]["last"]["top1"], 2))
        with (run.folder / "history.csv").open(encoding="utf-8") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    return {
        "start": start,
        "learning_rate": rate,
        "accuracy": accuracies,
        "mean": round(float(np.mean(accuracies)), 2),
        "loss_by_epoch": np.mean(losses, axis=0).round(3).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--results", type=Path, help="keep the runs here; finished ones are used")
    parser.add_argument("--out", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.results or Path(temporary)
        rows = [
            train(start, factor, options, folder) for factor in options.rates for start in STARTS
        ]
    table = Table("Start", "Learning rate", "Top-1 by seed", "Mean", "Loss, first and last epoch")
    for row in rows:
        losses = row["loss_by_epoch"]
        table.add_row(
            row["start"], f"{row['learning_rate']:g}", str(row["accuracy"]), str(row["mean"]),
            f"{losses[0]} … {losses[-1]}",
        )  # fmt: skip
    Console().print(table)
    if options.out:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(UTC).date().isoformat(),
            "dataset": options.dataset,
            "row": ROW,
            "seeds": options.seeds,
        }
        report = about | {"results": rows, "provenance": provenance()}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
