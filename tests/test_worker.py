"""Warm workers run each job in a process of its own and never outlive their use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from snella.jobs import worker

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of this test's own that preloads nothing and is idle for a second at most."""
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    code = (
        f"import tempfile; tempfile.gettempdir = lambda: {str(tmp_path)!r}\n"
        "from snella.jobs import worker\n"
        "worker.IDLE_SECONDS, worker.PRELOAD = 1, ()\n"
        "from snella.cli import main\n"
        "worker.serve(main)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while (connection := worker._connect()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert connection is not None
    connection.close()
    yield process
    process.kill()
    process.wait()


def test_a_job_runs_and_its_output_and_status_come_back(server, capfd):
    assert worker.call(["methods"]) == 0
    assert "snella-8" in capfd.readouterr().out
    assert worker.call(["run", "--method", "ful", "--dataset", "digits"]) == 2
    assert "Did you mean 'full'" in capfd.readouterr().err


def test_jobs_do_not_share_a_process(server, tmp_path, make_run):
    """A job that fails or changes global state leaves the next one untouched."""
    chosen = make_run()
    method = chosen.method.model_copy(update={"file": str(tmp_path / "broken.py")})
    broken = chosen.model_copy(update={"method": method, "seed": 1})
    (tmp_path / "broken.py").write_text("import os\nos._exit(7)\n")
    assert worker.call(["execute", "--settings", broken.to_json()]) == 7
    assert worker.call(["execute", "--settings", chosen.to_json()]) == 0
    assert chosen.record.exists()


def test_a_job_ends_when_its_client_is_killed(server, tmp_path, make_run):
    chosen = make_run(epochs=100_000)
    code = (
        f"import sys, tempfile; tempfile.gettempdir = lambda: {str(tmp_path)!r}\n"
        "from snella.jobs import worker; worker.call(sys.argv[1:])"
    )
    folder = chosen.folder
    client = subprocess.Popen(
        [sys.executable, "-c", code, "execute", "--settings", chosen.to_json()]
    )  # fmt: skip
    wait_for(folder / "checkpoint.pt")
    client.kill()
    client.wait()
    wait_for(folder / "failure.json")
    assert json.loads((folder / "failure.json").read_text())["status"] == "timeout"


def test_an_idle_server_ends_and_removes_its_socket(server):
    assert server.wait(timeout=15) == 0
    assert not worker._address().exists()


def test_not_inside_a_cluster_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert not worker.available()


def wait_for(path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
