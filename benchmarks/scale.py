"""CPU time and memory of planning and tables at the size of a laboratory's results.

    python benchmarks/scale.py                           # 1,728 runs planned, 10,008 records
    python benchmarks/scale.py --json benchmarks/results/scale_cpu.json

Writes synthetic records of 24 data sets, three seeds and as many rows as it takes into a temporary
folder, each as large as a real one and current under the configuration. Seconds are CPU seconds of
the process and its children, so that a busy machine matters little; memory is the largest resident
set of any of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from snella.records import provenance, write_record
from snella.runs.identity import backbone_digest, identity
from snella.runs.run import Run
from snella.suite import config as configuration
from snella.suite import plan

GROUPS = {
    "fgvc": ["cub", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars"],
    "natural": ["cifar100", "caltech101", "dtd", "flowers102", "pets", "svhn", "sun397"],
    "specialized": ["patch_camelyon", "eurosat", "resisc45", "retinopathy"],
    "structured": [
        "clevr_count", "clevr_dist", "dmlab", "kitti_dist", "dsprites_loc", "dsprites_ori",
        "smallnorb_azi", "smallnorb_ele",
    ],
}  # fmt: skip
ROWS = [
    "full", "mlp3", "vpt-shallow", "vpt-deep", "adapter-8", "adapter-32", "spt-adapter", "mosa",
    "linear", "partial-1", "bias", "lora-8", "lora-16", "spt-lora", "ssf", "gps", "snell-8",
    "snell-16", "snell-32", "snella-8", "snella-16", "snella-32", "karst", "oft",
]  # fmt: skip
SEEDS = [0, 1, 2]
IMAGES = 500


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--records", type=int, default=10_000, help="at least so many records")
    options.add_argument("--scores", action="store_true", help="scores per image beside each")
    options.add_argument("--json", type=Path, help="write the figures here, too")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        few = describe(folder / "few", ROWS)
        figures = {"dry run of 1,728 runs, no data": measure(dry_run(few))}
        copies = -(-chosen.records // (len(SEEDS) * sum(map(len, GROUPS.values()))))
        many = describe(folder / "many", ROWS, copies)
        count = write_records(many, chosen.scores)
        overlay = ["--configfile", str(many)]
        snella = [sys.executable, "-m", "snella.cli"]
        figures[f"snella plan, {count:,} records"] = measure([*snella, "plan", *overlay])
        figures[f"snella table, {count:,} records"] = measure([*snella, "table", *overlay])
    show(figures)
    if chosen.json:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "hardware": provenance()["hardware"],
            "python": platform.python_version(),
        }
        chosen.json.write_text(json.dumps({**about, "measured": figures}, indent=2) + "\n")


def describe(folder: Path, rows: list[str], count: int | None = None) -> Path:
    """A configuration of ``count`` rows, the given ones again and again under other names."""
    names = {f"{rows[i % len(rows)]}-copy{i}": rows[i % len(rows)] for i in range(count or 0)}
    known = configuration.load(Path("config/config.yaml")).methods
    content: dict[str, Any] = {
        "suite": "scale",
        "results": str(folder / "results"),
        "data": str(folder / "data"),
        "methods": {name: known[row].model_dump() for name, row in names.items()},
        "datasets": {
            name: {"path": str(folder / name), "num_classes": None}
            for group in GROUPS.values()
            for name in group
        },
        "suites": {
            "scale": {
                "title": "Scale", "backbone": "vit-quick", "protocol": "fair", "seeds": SEEDS,
                "overrides": {"image_size": 32}, "groups": GROUPS, "methods": list(names) or rows,
            }
        },
    }  # fmt: skip
    folder.mkdir()
    file = folder / "scale.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def dry_run(config: Path) -> list[str]:
    """The command that plans Table 1 of a configuration without running anything."""
    table = f"{yaml.safe_load(config.read_text())['results']}/table1.tex"
    return [
        sys.executable, "-m", "snakemake", "--cores", "1", "--nolock", "--dry-run", "--quiet",
        "all", "--configfile", str(config), "--", table,
    ]  # fmt: skip


def write_records(file: Path, scores: bool) -> int:
    """A finished record, and with ``scores`` those of single images, for every planned run."""
    config = configuration.load(file)
    rng, made = random.Random(0), provenance() | {"threads": 1, "device": "cpu"}
    for name in plan.current_suite(config).datasets:
        manifest = Path(config.data) / "prepared" / name / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"digest": f"data of {name}"}))
    runs = plan.plan(config)
    for run in runs:
        right = np.array([rng.random() < 0.7 for _ in range(IMAGES)], dtype=np.float32)
        write_record(run.folder, record(run, float(right.mean()), made, scores))
        if scores:
            np.savez_compressed(run.folder / "scores.npz", **{"last/top1": right})
    return len(runs)


def record(run: Run, value: float, made: dict[str, Any], scores: bool) -> dict[str, Any]:
    """What :func:`snella.runs.execute.execute` would have recorded, with a number made up."""
    info = run.task.primary
    return {
        "schema": 2,
        "task": run.dataset.task,
        "run": {
            "suite": run.suite, "backbone": run.backbone.name, "dataset": run.dataset.name,
            "method": run.method.name, "protocol": run.protocol_name, "seed": run.seed,
        },
        "protocol": {"name": run.protocol_name, **run.protocol.model_dump(), **run.settings},
        "method": run.method.model_dump() | {"file": Path(run.method.file).name},
        "status": "ok",
        "reason": None,
        "metric": info.name,
        "metric_info": [vars(info) | {"chance": 0.1}],
        "metrics": {r: {"epoch": 99, "top1": value} for r in ("last", "best-test")},
        "groups": {r: {"top1": {str(k): value for k in range(10)}} for r in ("last", "best-test")},
        "scores": "scores.npz" if scores else None,
        "test_size": IMAGES,
        "parameters": {"trainable": 9216, "head": 970, "with_head": 10186, "total": 691488},
        "merge": {"merged": True, "max_difference": 1e-6, "failed": False, "reason": None},
        "cost": {
            "gflops": 0.02, "peak_memory_mb": 100.0, "train_seconds": 30.0,
            "train_seconds_per_image": 1e-3, "inference_seconds_per_image": 1e-4,
        },
        "files": {"adapter.safetensors": "0" * 64, "predictions": "0" * 64},
        "warnings": list(run.notes),
        "identity": identity(run, f"data of {run.dataset.name}", backbone_digest(run)),
        "provenance": made,
    }  # fmt: skip


def measure(command: list[str]) -> dict[str, float]:
    """CPU seconds of a command, its output thrown away, and its largest resident set in MB."""
    inner = (
        "import json, resource, subprocess, sys; "
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "sys.stderr.buffer.write(done.stderr if done.returncode else b''); "
        "print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1000])); "
        "sys.exit(done.returncode)"
    )
    arguments = [sys.executable, "-c", inner, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, env=environment)
    seconds, memory = json.loads(done.stdout)
    return {"cpu_seconds": round(seconds, 2), "peak_mb": round(memory)}


def show(figures: dict[str, dict[str, float]]) -> None:
    """Print the figures."""
    table = Table("What", "CPU seconds", "MB")
    for name, found in figures.items():
        table.add_row(name, f"{found['cpu_seconds']:.1f}", f"{found['peak_mb']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
