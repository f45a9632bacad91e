"""What a cell costs beyond its work, alone in a SLURM job and in jobs of 4 and 16 cells.

Cells that are finished already do no work of their own: all the CPU time of their jobs is overhead
(SLURM's step, Snakemake on the node, imports). Everything runs on a SLURM of this script's own,
with pretended GPUs, as in tests/slurm; the coordinator does not count. Linux only.

    python benchmarks/job_overhead.py --json benchmarks/results/job_overhead.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "slurm"))
from cluster import Cluster, missing  # noqa: E402

SPENT: list[float] = []
"""CPU seconds of each orphan that has ended."""


def main() -> None:
    """Measure each size of job once and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if missing():
        raise SystemExit(missing())
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="snella-overhead", dir="/tmp"))
    try:
        with Cluster(folder / "s") as cluster:
            work = finished_tree(folder / "work", max(chosen.sizes), cluster)
            figures = {size: overhead(work, size, cluster) for size in chosen.sizes}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for size, seconds in figures.items():
        sys.stdout.write(f"{size:>3} cells a job: {seconds:.1f} CPU seconds a cell\n")
    if chosen.json:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        }
        content = {**about, "cpu_seconds_per_cell": figures}
        chosen.json.write_text(json.dumps(content, indent=2) + "\n")


def finished_tree(work: Path, seeds: int, cluster: Cluster) -> Path:
    """A tree whose runs are all finished: one method, one epoch, as many seeds as cells."""
    work.mkdir()
    suite = {
        "title": "Overhead", "backbone": "vit-quick", "protocol": "quick", "methods": ["linear"],
        "overrides": {"epochs": 1, "warmup_epochs": 0, "evaluate_every": 1},
        "seeds": list(range(seeds)), "groups": {"natural": ["digits"]},
    }  # fmt: skip
    config = {
        "suite": "overhead", "suites": {"overhead": suite},
        "cluster": {"partition": "gpu", "cpu_partition": "cpu", "memory_mb": 1500},
    }  # fmt: skip
    (work / "my.yaml").write_text(yaml.safe_dump(config))
    snakemake(work, cluster)
    return work


def overhead(work: Path, size: int, cluster: Cluster) -> float:
    """CPU seconds a cell when ``size`` finished cells share a job."""
    records = sorted(work.glob("results/runs/*/*/*/*/*/record.json"))
    for record in records[:size]:
        record.unlink()
    for table in work.glob("results/table1.*"):  # Snakemake asks for records only for a table
        table.unlink()
    batch = ("--profile", str(ROOT / "workflow/profiles/batch"), "--group-components", "cells=16")
    begin = jobs_seconds()
    snakemake(work, cluster, *slurm(), *(batch if size > 1 else ()))
    return (jobs_seconds() - begin) / size


def adopt_orphans() -> None:
    """Become the parent of daemons below this process, whose CPU time then counts as ours."""
    subreaper = 36
    ctypes.CDLL(None, use_errno=True).prctl(subreaper, 1, 0, 0, 0)


def jobs_seconds() -> float:
    """CPU time of all job steps that have ended: orphans, and what they waited for."""
    time.sleep(3)
    while True:
        try:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if not pid:
            break
        SPENT.append(usage.ru_utime + usage.ru_stime)
    return sum(SPENT)


def slurm() -> tuple[str, ...]:
    """Options for many short jobs."""
    return (
        "--profile", str(ROOT / "workflow/profiles/slurm"),
        "--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1",
    )  # fmt: skip


def snakemake(work: Path, cluster: Cluster, *options: str) -> None:
    """Build the tree's table."""
    subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", ".",
         "--configfile", "my.yaml", "--cores", "2", "--quiet", "all", *options,
         "--", "results/table1.tex"],
        cwd=work, check=True, env={**os.environ, **cluster.environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


if __name__ == "__main__":
    main()
