"""The workflow's own promises that need no training: plan, gaps, and plain words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from snella.records import write_record

ROOT = Path(__file__).resolve().parents[1]


def snakemake(
    tmp_path: Path, target: str, *options: str, **config: str
) -> subprocess.CompletedProcess[str]:
    """Call Snakemake on the repository's Snakefile with its outputs below ``tmp_path``."""
    pairs = {"results": f"{tmp_path}/results", "data": f"{tmp_path}/data", **config}
    settings = [f"{key}={value}" for key, value in pairs.items()]
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--nolock", *options, "--config",
         *settings, "--", target],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_table_with_gaps_says_why_and_is_rebuilt_when_a_run_arrives(tmp_path):
    table = f"{tmp_path}/results/table1.tex"
    done = snakemake(tmp_path, table, suite="smoke", allow_missing="true")
    assert done.returncode == 0, done.stderr
    content = Path(table).read_text()
    assert "not run" in content and "\\textbf" not in content and "Smoke suite" in content
    again = snakemake(tmp_path, table, suite="smoke", allow_missing="true")
    assert "Nothing to be done" in again.stderr

    folder = tmp_path / "results/runs/smoke/vit-quick/digits/linear/seed0"
    folder.mkdir(parents=True)
    failure = {
        "schema": 2, "status": "oom", "reason": "no memory left", "metric": "top1",
        "run": {"suite": "smoke", "backbone": "vit-quick", "dataset": "digits",
                "method": "linear", "protocol": "quick", "seed": 0},
        "protocol": {"selection": "last"},
    }  # fmt: skip
    write_record(folder, failure)
    assert snakemake(tmp_path, table, suite="smoke", allow_missing="true").returncode == 0
    assert "out of memory" in Path(table).read_text()


def test_every_run_of_the_table_is_one_job(tmp_path):
    done = snakemake(tmp_path, f"{tmp_path}/results/table1.tex", "--dry-run", suite="smoke")
    shown = done.stdout + done.stderr
    counts = {line.split()[1] for line in shown.splitlines() if line.split()[:1] == ["run"]}
    assert counts == {"16"}, shown


@pytest.mark.parametrize(
    "config,words",
    [({"suite": "smok"}, "Did you mean 'smoke'"), ({"suit": "smoke"}, "Did you mean 'suite'")],
)
def test_a_mistake_is_one_line_and_status_two(tmp_path, config, words):
    done = snakemake(tmp_path, f"{tmp_path}/results/table1.tex", **config)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("snella: ")]
    assert words in line
    assert "Traceback" not in done.stderr
