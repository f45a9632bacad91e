"""The workflow's own promises that need no training: plan, gaps, and plain words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

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


def planned(tmp_path: Path, **config: str) -> dict[str, str]:
    """The number of jobs by rule that the smoke suite's Table 1 needs."""
    target = f"{tmp_path}/results/table1.tex"
    done = snakemake(tmp_path, target, "--dry-run", suite="smoke", **config)
    words = [line.split() for line in done.stderr.splitlines()]
    return {pair[0]: pair[1] for pair in words if len(pair) == 2 and pair[1].isdigit()}


def test_every_run_of_the_table_is_one_job(tmp_path):
    assert planned(tmp_path) == {"prepare": "4", "run": "16", "table": "1", "total": "21"}


def test_what_snakemake_did_not_make_is_made_again_when_it_no_longer_fits(tmp_path):
    where = ["--config", "suite=smoke", f"results={tmp_path}/results", f"data={tmp_path}/data"]
    run = ["run", "--method", "linear", "--dataset", "digits", *where]
    subprocess.run([sys.executable, "-m", "snella.cli", *run], cwd=ROOT, check=True)
    changed = planned(tmp_path, protocols="{quick: {weight_decay: 0.5}}")
    assert changed == {"prepare": "3", "run": "16", "table": "1", "total": "20"}
    mark = tmp_path / "data/prepared/.digits.origin.json"
    mark.write_text(mark.read_text().replace('"code"', '"cod"'))
    assert planned(tmp_path) == {"prepare": "4", "run": "16", "table": "1", "total": "21"}


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


HELD = '''\
"""Trains the head, and goes beyond its first epoch only once there is a file `go`."""

import time
from pathlib import Path

from snella.method import Method


class Held(Method):
    """The head alone."""

    head_only = True

    def adapt(self, model):
        """Nothing but the head trains."""

    def on_epoch_start(self, model, epoch, epochs):
        """Wait, and note which epochs were begun."""
        with Path("epochs").open("a") as file:
            file.write(f"{epoch}\\n")
        while epoch and not Path("go").exists():
            time.sleep(0.1)
'''
SUITE = {
    "title": "One data set", "backbone": "vit-quick", "protocol": "quick",
    "overrides": {"epochs": 2, "warmup_epochs": 0, "evaluate_every": 2},
    "groups": {"natural": ["digits"]}, "methods": ["held"],
}  # fmt: skip


@pytest.fixture
def clone(tmp_path) -> Path:
    """The repository in a folder whose name has a space and letters that are not ASCII."""
    folder = tmp_path / "größere Läufe" / "snella-bench"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if not name.startswith(("tests/", "docs/", "benchmarks/")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "baselines/held.py").write_text(HELD)
    content = {"suite": "mine", "suites": {"mine": SUITE}, "methods": {"held": {}}}
    (folder / "my.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_the_same_command_goes_on_after_the_coordinator_was_killed(clone):
    """In a folder of any name; the run's orphan trains to the end, and nothing is trained twice."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [
        sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", "my.yaml",
        "--config", "warm_workers=false", "--", "results/table1.tex",
    ]  # fmt: skip
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(clone)}
    with (clone / "log").open("w") as log:
        coordinator = subprocess.Popen(
            command, cwd=clone, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    epochs, deadline = clone / "epochs", time.monotonic() + 300
    while not (epochs.exists() and epochs.read_text().split() == ["0", "1"]):
        assert time.monotonic() < deadline, (clone / "log").read_text()
        assert coordinator.poll() is None, (clone / "log").read_text()
        time.sleep(0.1)
    coordinator.kill()
    coordinator.wait()
    (clone / "go").touch()
    done = subprocess.run(
        command, cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert epochs.read_text().split() == ["0", "1"]
    assert "&" in (clone / "results/table1.tex").read_text()
