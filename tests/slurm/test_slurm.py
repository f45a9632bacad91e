"""The workflow on a real SLURM of one node: same table, and what happens to jobs and coordinator.

Skipped where SLURM's packages or Snakemake's executor plugin are not installed; nothing is fetched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster, missing

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "snakemake_executor_plugin_slurm"
WHY = missing() or (
    "" if importlib.util.find_spec(PLUGIN) else 'no SLURM executor here (pip install ".[cluster]")'
)
pytestmark = pytest.mark.skipif(bool(WHY), reason=f"no test of SLURM: {WHY}")
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
BROKEN = HELD.replace("while epoch", 'raise ValueError("never works")\n        while epoch')
SECONDS = 600
"""What any one wait may take on a busy machine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A SLURM of this module's own; sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="snella-slurm", dir="/tmp"))
    try:
        with Cluster(folder / "s") as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Tree:
    """A working directory with a configuration of its own, and Snakemake in it."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.coordinators: list[subprocess.Popen[str]] = []

    def configure(self, methods: dict[str, Any], **cluster: Any) -> None:
        """One data set, one seed, the rows ``methods``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        suite = {
            "title": "One data set",
            "backbone": "vit-quick",
            "protocol": "quick",
            "overrides": {"epochs": 2, "warmup_epochs": 0, "evaluate_every": 2},
            "groups": {"natural": ["digits"]},
            "methods": list(methods),
        }
        wanted = {"partition": "gpu", "cpu_partition": "cpu", "memory_mb": 1500, **cluster}
        rows = {name: row for name, row in methods.items() if row}
        content = {
            "suite": "mine", "suites": {"mine": suite}, "methods": rows, "cluster": wanted,
            "tables": {"table1": {"rows": [{"methods": list(methods)}]}},
        }  # fmt: skip
        (self.folder / "my.yaml").write_text(yaml.safe_dump(content))
        (self.folder / "held.py").write_text(HELD)
        (self.folder / "broken.py").write_text(BROKEN)

    def start(self, *options: str, profile: str = "slurm") -> subprocess.Popen[str]:
        """Snakemake, told to look often at its jobs."""
        slurm = (
            "--profile", str(ROOT / "workflow/profiles/slurm"), "--latency-wait", "20",
            "--slurm-init-seconds-before-status-checks", "1", "--cores", "2",
            "--seconds-between-status-checks", "1", "--slurm-keep-successful-logs",
        )  # fmt: skip
        command = [
            sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", ".",
            "--configfile", "my.yaml", *(slurm if profile else ("--cores", "2")), *options,
            "--", "results/table1.tex",
        ]  # fmt: skip
        python = str(Path(sys.executable).parent)
        environment = {**os.environ, **self.cluster.environment}
        environment["PATH"] = f"{python}{os.pathsep}{environment['PATH']}"
        number = len(self.coordinators)
        with (self.folder / f"coordinator{number}.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, text=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.coordinators.append(process)
        return process

    def log(self, number: int = -1) -> str:
        """What a coordinator printed."""
        return (self.folder / f"coordinator{number % len(self.coordinators)}.log").read_text(
            errors="replace"
        )

    def cell(self, method: str) -> Path:
        """The folder of a run."""
        return self.folder / f"results/runs/mine/vit-quick/digits/{method}/seed0"

    def submitted(self, method: str) -> list[dict[str, str]]:
        """The SLURM jobs of a run in this tree, oldest first."""
        ending = f"_mine_vit-quick_digits_{method}_0"
        jobs = [j for j in self.cluster.jobs() if j["comment"].endswith(ending)]
        return sorted((j for j in jobs if j["folder"] == str(self.folder)), key=lambda j: j["id"])

    def is_training(self, method: str) -> bool:
        """Whether a run has finished an epoch and goes on."""
        folder = self.cell(method)
        return (folder / "checkpoint.pt").exists() and not (folder / "record.json").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory, cluster) -> Path:
    """Prepared data for the tests that are about something else."""
    folder = tmp_path_factory.mktemp("data")
    own = folder / "my.yaml"
    own.write_text(yaml.safe_dump({"suite": "quick", "data": str(folder)}))
    command = [sys.executable, "-m", "snella.cli", "prepare", "digits", "--configfile", str(own)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
def tree(tmp_path, cluster) -> Iterator[Tree]:
    """A tree in a folder with a space and a letter that is not ASCII."""
    found = Tree(tmp_path / "Läufe 1", cluster)
    yield found
    for process in found.coordinators:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for job in cluster.jobs():
        if job["folder"] == str(found.folder):
            cluster.call("scancel", job["id"])


def wait(until: Callable[[], Any], tree: Tree) -> None:
    """Wait for a condition; a failure shows what the coordinator said."""
    deadline = time.monotonic() + SECONDS
    while not until():
        assert time.monotonic() < deadline, tree.log()
        time.sleep(0.2)


def ended(process: subprocess.Popen[str], tree: Tree) -> int:
    """The exit status of a coordinator."""
    wait(lambda: process.poll() is not None, tree)
    return process.returncode


def begins_again(tree: Tree, method: str, begun: list[str]) -> bool:
    """Whether a run that was queued again has begun the epochs ``begun``.

    Spares its job the minutes that SLURM makes it wait, and takes back what SLURM does to a node
    that returned while the job's first processes were still being ended (held, drained).
    """
    (job,) = tree.submitted(method)
    if "drain" in tree.cluster.call("sinfo", "-h", "-o", "%T"):
        tree.cluster.call("scontrol", "update", "nodename=node1", "state=resume")
    if job["state"] == "PENDING":
        tree.cluster.call("scontrol", "release", job["id"])
        tree.cluster.call("scontrol", "update", f"jobid={job['id']}", "starttime=now")
    return (tree.folder / "epochs").read_text().split() == begun


def record(tree: Tree, method: str) -> dict[str, Any]:
    """A run's record."""
    return dict(json.loads((tree.cell(method) / "record.json").read_text()))


def test_the_table_equals_the_local_one(tree, tmp_path, cluster):
    """Byte for byte, with preparing on the CPU partition and each run on a GPU of its own."""
    tree.configure({"linear": {}, "lora-8": {}})
    assert ended(tree.start(), tree) == 0, tree.log()
    jobs = [job for job in cluster.jobs() if job["folder"] == str(tree.folder)]
    places = {job["comment"].split("_")[1]: job["partition"] for job in jobs}
    assert places == {"prepare": "cpu", "run": "gpu"} and len(jobs) == 3
    log = next((tree.folder / "logs/slurm").glob("rule_run/*/*.log")).read_text()
    assert "--gpus=1" in tree.log() or "gpu=1" in log

    local = Tree(tmp_path / "local", cluster)
    local.configure({"linear": {}, "lora-8": {}})
    shutil.copytree(tree.folder / "data", local.folder / "data")
    assert ended(local.start(profile=""), local) == 0, local.log()
    for name in ("table1.tex", "table1.csv", "table1.md"):
        assert (tree.folder / "results" / name).read_bytes() == (
            local.folder / "results" / name
        ).read_bytes()


def test_a_killed_coordinator_leaves_jobs_that_the_same_command_waits_for(tree, data):
    """No job is submitted twice; two coordinators on one tree are one too many."""
    tree.configure({"held": {"file": "held.py"}})
    options = ("--config", f"data={data}")
    first = tree.start(*options)
    wait(lambda: tree.is_training("held"), tree)
    second = tree.start(*options)
    assert ended(second, tree) == 2
    (line,) = [x for x in tree.log().splitlines() if x.startswith("snella: ")]
    assert "Another Snakemake" in line and f"process {first.pid}" in line
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    third = tree.start(*options)
    wait(lambda: "waiting for them" in tree.log(), tree)
    (tree.folder / "go").touch()
    assert ended(third, tree) == 0, tree.log()
    assert len(tree.submitted("held")) == 1
    assert (tree.folder / "epochs").read_text().split() == ["0", "1"]
    assert (tree.folder / "results/table1.tex").exists()


def test_preemption_and_a_lost_node_cost_no_finished_epoch(tree, data, cluster):
    """SLURM queues the same job again, which goes on from its checkpoint."""
    tree.configure({"held": {"file": "held.py"}})
    coordinator = tree.start("--config", f"data={data}")
    begun = tree.folder / "epochs"
    wait(lambda: begun.exists() and begun.read_text().split() == ["0", "1"], tree)
    (job,) = tree.submitted("held")
    cluster.call("scontrol", "requeue", job["id"])
    wait(lambda: begins_again(tree, "held", ["0", "1", "1"]), tree)
    cluster.call("scontrol", "update", "nodename=node1", "state=down", "reason=test")
    wait(lambda: tree.submitted("held")[0]["state"] != "RUNNING", tree)
    time.sleep(2)  # so that the node is seen to be down
    cluster.call("scontrol", "update", "nodename=node1", "state=resume")
    wait(lambda: begins_again(tree, "held", ["0", "1", "1", "1"]), tree)
    (tree.folder / "go").touch()
    assert ended(coordinator, tree) == 0, tree.log()
    assert len(tree.submitted("held")) == 1
    restarts = re.search(r"Restarts=(\d+)", cluster.call("scontrol", "show", "job", job["id"]))
    assert restarts and int(restarts[1]) >= 2  # one more after a launch that failed
    assert record(tree, "held")["status"] == "ok"


def test_what_is_tried_again_and_what_is_not(tree, data, cluster):
    """What ran out of time is, with more; a method that raises and a cancelled job are not."""
    rows = {
        "broken": {"file": "broken.py"},
        "cancelled": {"file": "held.py"},
        "limited": {"file": "held.py"},
    }
    tree.configure(rows)
    coordinator = tree.start("--config", f"data={data}")
    wait(lambda: tree.is_training("cancelled"), tree)
    cluster.call("scancel", tree.submitted("cancelled")[0]["id"])
    wait(lambda: tree.is_training("limited"), tree)
    cluster.call("scontrol", "update", f"jobid={tree.submitted('limited')[0]['id']}", "timelimit=1")
    wait(lambda: len(tree.submitted("limited")) == 2, tree)
    (tree.folder / "go").touch()
    assert ended(coordinator, tree) == 1
    assert [len(tree.submitted(name)) for name in rows] == [1, 1, 2]
    limits = [job["limit"] for job in tree.submitted("limited")]
    assert limits == ["1:00", "4:00:00"] and record(tree, "limited")["status"] == "ok"
    failure = json.loads((tree.cell("broken") / "failure.json").read_text())
    assert failure["transient"] is False and "never works" in failure["reason"]
    assert "is not tried again" in tree.log()


def test_a_job_of_several_cells_keeps_them_apart(tree, data):
    """One job, one broken cell: the others' results stay, and the next call takes them."""
    tree.configure({"linear": {}, "broken": {"file": "broken.py"}, "bias": {}})
    batch = ("--profile", str(ROOT / "workflow/profiles/slurm"))
    batch += ("--profile", str(ROOT / "workflow/profiles/batch"), "--config", f"data={data}")
    assert ended(tree.start(*batch), tree) == 1
    jobs = [j for j in tree.cluster.jobs() if j["folder"] == str(tree.folder)]
    assert len(jobs) == 1 and jobs[0]["cpus"] == "1"
    finished = {m: (tree.cell(m) / "finished.json").stat().st_mtime_ns for m in ("linear", "bias")}
    assert not (tree.cell("broken") / "finished.json").exists()
    again = (*batch, "allow_missing=true")
    assert ended(tree.start(*again), tree) == 0, tree.log()
    for method, written in finished.items():
        assert (tree.cell(method) / "finished.json").stat().st_mtime_ns == written


REFUSING = """\
#!/bin/sh
[ -e "$0.used" ] && exec {real} "$@"
touch "$0.used"
echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2
echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2
exit 1
"""


def test_a_refused_job_is_submitted_again_and_a_cancelled_one_of_several_cells_is_not(
    tree, data, cluster, monkeypatch
):
    tree.configure({"held": {"file": "held.py"}, "linear": {}})
    sbatch = tree.folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(REFUSING.format(real=shutil.which("sbatch")))
    sbatch.chmod(0o755)
    path = f"{sbatch.parent}{os.pathsep}{cluster.environment['PATH']}"
    monkeypatch.setitem(cluster.environment, "PATH", path)
    coordinator = tree.start(
        "--profile", str(ROOT / "workflow/profiles/slurm"),
        "--profile", str(ROOT / "workflow/profiles/batch"),
        "--config", f"data={data}", "--retries", "1",
    )  # fmt: skip
    wait(lambda: tree.is_training("held"), tree)
    assert "sbatch refuses jobs for now (QOSMaxSubmitJobPerUserLimit" in tree.log()
    (job,) = [j for j in cluster.jobs() if j["folder"] == str(tree.folder)]
    cluster.call("scancel", job["id"])
    assert ended(coordinator, tree) == 1
    assert f"A job of 2 cells is not tried again: SLURM job {job['id']} was cancelled" in tree.log()
    assert len([j for j in cluster.jobs() if j["folder"] == str(tree.folder)]) == 1


def test_a_profile_without_partition_is_one_line(tree, data):
    tree.configure({"linear": {}}, partition="")
    assert ended(tree.start("--config", f"data={data}"), tree) == 2
    (line,) = [x for x in tree.log().splitlines() if x.startswith("snella: ")]
    assert "SLURM has no default; set cluster.partition" in line and "cpu, gpu" in line
    assert "Traceback" not in tree.log()
