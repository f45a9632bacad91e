"""Warm workers run each job in a process of its own and end with the process that started them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snella.jobs import worker

COUNTING = """
from pathlib import Path
from snella.method import Method


class Counting(Method):
    head_only = True

    def adapt(self, model):
        pass

    def on_epoch_start(self, model, epoch, epochs):
        with Path({path!r}).open("a") as file:
            file.write(f"{{epoch}}\\n")
"""


@pytest.fixture
def environment(monkeypatch):
    """The environment of jobs; the address of a server is gone when the test ends."""
    monkeypatch.setenv(worker.PLACE, "/nowhere")
    return os.environ


@pytest.fixture(scope="module")
def shared():
    """A server that is ready, and its address."""
    before = os.environ.get(worker.PLACE)
    server = worker.start()
    assert server is not None and server.stdin is not None
    place = os.environ.pop(worker.PLACE)
    if before is not None:
        os.environ[worker.PLACE] = before
    yield place
    server.stdin.close()
    assert server.wait(timeout=60) == 0
    assert not Path(place).exists()


@pytest.fixture
def server(shared, monkeypatch):
    monkeypatch.setenv(worker.PLACE, shared)


def execute(run) -> list[str]:
    return ["execute", "--settings", run.to_json()]


def method_of(run, path: Path, source: str):
    """The run with a method of one's own."""
    path.write_text(source)
    return run.model_copy(update={"method": run.method.model_copy(update={"file": str(path)})})


def client(run) -> subprocess.Popen[str]:
    """``snella execute`` as the workflow calls it."""
    command = [sys.executable, "-m", "snella.cli", *execute(run)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_output_and_status_come_back(server, capfd):
    assert worker.call(["methods"]) == 0
    assert "snella-8" in capfd.readouterr().out
    assert worker.call(["run", "--method", "ful", "--dataset", "digits"]) == 2
    assert "Did you mean 'full'" in capfd.readouterr().err


def test_a_job_that_reads_its_input_finds_none(server, tmp_path, make_run, capfd):
    asking = method_of(make_run(), tmp_path / "asking.py", "input()\n")
    assert worker.call(execute(asking)) == 2
    assert "EOFError" in capfd.readouterr().err


@pytest.mark.parametrize("end", ["import ctypes; ctypes.string_at(0)", "os.kill(os.getpid(), 9)"])
def test_a_crash_is_said_and_harms_no_other_job(server, tmp_path, make_run, capfd, end):
    chosen = make_run()
    broken = method_of(chosen, tmp_path / "broken.py", f"import os\n{end}\n")
    assert worker.call(execute(broken)) == 1
    assert capfd.readouterr().err.startswith("snella: the run's process ended without a word")
    assert worker.call(execute(chosen)) == 0
    assert chosen.record.exists()


def test_a_job_ends_when_its_client_is_killed(server, make_run):
    chosen = make_run(epochs=100_000)
    with client(chosen) as process:
        wait_for(chosen.folder / "checkpoint.pt")
        process.kill()
    wait_for(chosen.folder / "failure.json")
    assert json.loads((chosen.folder / "failure.json").read_text())["status"] == "timeout"


def test_the_end_of_the_server_costs_no_second_training(environment, tmp_path, make_run):
    """It goes with Snakemake, also by kill -9; a job at work is finished."""
    epochs = tmp_path / "epochs"
    source = COUNTING.format(path=str(epochs))
    chosen = method_of(make_run(epochs=60), tmp_path / "counting.py", source)
    own = worker.start()
    with client(chosen) as process:
        wait_for(epochs)
        own.send_signal(signal.SIGKILL)
        own.wait()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert ": ok" in out
    assert epochs.read_text().split() == [str(epoch) for epoch in range(60)]
    assert worker.call(["methods"]) is None  # what comes later does its work itself


def test_a_server_that_ends_before_it_serves_takes_no_job(environment):
    server = worker.start()
    server.kill()
    server.wait()
    assert worker.call(["methods"]) is None


def test_what_a_killed_server_leaves_is_removed_at_the_next_start(shared, environment):
    killed = worker.start()
    left = Path(os.environ[worker.PLACE])
    killed.kill()
    killed.wait()
    assert left.exists()
    following = worker.start()
    assert not left.exists() and Path(shared).exists()
    following.stdin.close()
    following.wait()


def test_a_server_is_of_the_clients_own_package(environment, tmp_path, monkeypatch):
    """Also where the working directory holds another checkout, which `python -m` prefers."""
    (tmp_path / "snella").mkdir()
    (tmp_path / "snella" / "__init__.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    server = worker.start()
    assert worker.call(["methods"]) == 0
    server.stdin.close()
    server.wait()


def test_jobs_of_another_environment_find_no_server(server, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/other/python")
    assert worker.call(["methods"]) is None


def test_a_server_takes_no_job_after_an_edit_of_its_code(tmp_path):
    """What it has imported is not what the run's identity would say."""
    package = shutil.copytree(Path(worker.__file__).parents[1], tmp_path / "snella")
    edit = f"Path({str(package)!r}, 'seeds.py').touch()"
    script = "\n".join(
        (
            "from pathlib import Path",
            "from snella.jobs import worker",
            "server = worker.start()",
            "before = worker.call(['--version'])",
            edit,
            "assert (before, worker.call(['--version'])) == (0, None)",
        )
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)


def wait_for(path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
