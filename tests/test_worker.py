"""Warm workers run each job in a process of its own and never outlive their use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

import pytest

from snella.jobs import worker

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


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
def place(monkeypatch, tmp_path):  # pytest has made its own folder by now
    """A temporary folder whose path has room for a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: folder)
        yield folder


def code(place: str, last: str) -> str:
    """A program whose temporary folder is ``place``."""
    return f"import sys, tempfile; tempfile.gettempdir = lambda: {place!r}\n{last}"


@contextmanager
def serving(place: str, idle: int):
    """A server of a test's own that preloads nothing and ends when idle for ``idle`` seconds."""
    serve = (
        "from snella.jobs import worker\n"
        f"worker.IDLE_SECONDS, worker.PRELOAD = {idle}, ()\n"
        "from snella.cli import main\n"
        "worker.serve(main)"
    )
    process = subprocess.Popen([sys.executable, "-c", code(place, serve)])
    deadline = time.monotonic() + 30
    while (connection := worker._connect()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert connection is not None
    connection.close()
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def server(place):
    with serving(place, idle=600) as process:
        yield process


def test_a_job_runs_and_its_output_and_status_come_back(server, capfd):
    assert worker.call(["methods"]) == 0
    assert "snella-8" in capfd.readouterr().out
    assert worker.call(["run", "--method", "ful", "--dataset", "digits"]) == 2
    assert "Did you mean 'full'" in capfd.readouterr().err


def test_a_server_is_of_the_clients_own_package(place, tmp_path, monkeypatch):
    """Also where the working directory holds another checkout, which `python -m` prefers."""
    (tmp_path / "snella").mkdir()
    (tmp_path / "snella" / "__init__.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", place)
    spawned = worker._spawn()
    connection = worker._await(spawned)
    spawned.kill()
    spawned.wait()
    assert connection is not None
    connection.close()


def test_jobs_do_not_share_a_process(server, tmp_path, make_run):
    """A job that fails or changes global state leaves the next one untouched."""
    chosen = make_run()
    method = chosen.method.model_copy(update={"file": str(tmp_path / "broken.py")})
    broken = chosen.model_copy(update={"method": method, "seed": 1})
    (tmp_path / "broken.py").write_text("import os\nos._exit(7)\n")
    assert worker.call(["execute", "--settings", broken.to_json()]) == 7
    assert worker.call(["execute", "--settings", chosen.to_json()]) == 0
    assert chosen.record.exists()


def test_a_job_ends_when_its_client_is_killed(server, place, make_run):
    chosen = make_run(epochs=100_000)
    call = code(place, "from snella.jobs import worker; worker.call(sys.argv[1:])")
    folder = chosen.folder
    client = subprocess.Popen(
        [sys.executable, "-c", call, "execute", "--settings", chosen.to_json()]
    )  # fmt: skip
    wait_for(folder / "checkpoint.pt")
    client.kill()
    client.wait()
    wait_for(folder / "failure.json")
    assert json.loads((folder / "failure.json").read_text())["status"] == "timeout"


def test_an_idle_server_ends_and_removes_its_socket(place):
    with serving(place, idle=1) as server:
        assert server.wait(timeout=15) == 0
        assert not worker._address().exists()


def test_a_killed_server_costs_no_second_training(server, place, tmp_path, make_run):
    """The orphaned job goes on; its client waits for it and finds it finished."""
    chosen, epochs = make_run(epochs=60), tmp_path / "epochs"
    (tmp_path / "counting.py").write_text(COUNTING.format(path=str(epochs)))
    method = chosen.method.model_copy(update={"file": str(tmp_path / "counting.py")})
    chosen = chosen.model_copy(update={"method": method})
    main = code(place, "from snella.cli import main; raise SystemExit(main(sys.argv[1:]))")
    client = subprocess.Popen(
        [sys.executable, "-c", main, "execute", "--warm", "--settings", chosen.to_json()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(epochs)
    server.kill()
    out, err = client.communicate(timeout=120)
    assert client.returncode == 0, err
    assert ": ok" in out
    assert epochs.read_text().split() == [str(epoch) for epoch in range(60)]


def test_a_cluster_job_uses_a_server_of_its_own_only(server, monkeypatch):
    assert worker.available()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert not worker.available()  # the server's address is that of no job


@pytest.mark.parametrize("cells,started", [(["run:seed=0"], 0), (["run:seed=0", "run:seed=1"], 1)])
def test_a_job_of_several_cells_starts_a_server(monkeypatch, place, cells, started):
    spawned: list[int] = []
    monkeypatch.setattr(worker, "_spawn", lambda: spawned.append(1))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    command = ["snakemake", "--target-jobs", *cells, "--force"]
    worker.start_in_job(command)
    assert not spawned
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    worker.start_in_job(command)
    assert len(spawned) == started


def test_a_long_temporary_folder_leaves_room_for_the_socket(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(long))
    assert len(os.fsencode(worker._address())) < 107


def wait_for(path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize(("serving", "job", "started"), [(0, 0, 1), (1, 0, 0), (0, 1, 0)])
def test_a_server_is_started_early_once_and_not_in_a_cluster_job(
    monkeypatch, serving: int, job: int, started: int
) -> None:
    spawned: list[int] = []
    monkeypatch.setattr(worker, "_serving", lambda: bool(serving))
    monkeypatch.setattr(worker, "_spawn", lambda: spawned.append(1))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    worker.start_early()
    assert len(spawned) == started
