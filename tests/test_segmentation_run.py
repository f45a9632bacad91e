"""Segmentation through the very code of every run, killed while it trains and while it predicts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from snella.runs.execute import execute
from snella.runs.run import Run
from snella.tasks.base import DatasetSpec
from snella.tasks.segmentation import TASK
from snella.tasks.segmentation.toy import SIZES

pytest.importorskip("segment_anything")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def polyps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "polyps"
    TASK.prepare("polyps", DatasetSpec(kind="quick", task="segmentation"), folder)
    return folder


def make(polyps: Path, results: Path) -> Run:
    return Run.model_validate({
        "suite": "test",
        "backbone": {"name": "tiny", "arch": "sam_vit", "kwargs": SIZES, "file": "random"},
        "dataset": {"name": "polyps", "task": "segmentation", "prepared": polyps.as_posix()},
        "method": {"name": "snella", "file": (ROOT / "baselines" / "snella.py").as_posix(),
                   "hyperparameters": {"rank": 4}},
        "protocol_name": "test",
        "protocol": {"epochs": 2, "batch_size": 24, "train_split": "train", "warmup_epochs": 0},
        "settings": {"image_size": 32, "threshold": "val"},
        "results": results.as_posix(),
    })  # fmt: skip


def begun(folder: Path) -> bool:
    return any(file.stat().st_size for file in folder.glob("predictions/*/test/masks.bin"))


@pytest.fixture(scope="module")
def whole(polyps: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make(polyps, tmp_path_factory.mktemp("whole"))
    assert execute(run)["status"] == "ok"
    return run


@pytest.mark.parametrize(
    "when",
    [pytest.param(lambda folder: (folder / "checkpoint.pt").exists(), id="training"),
     pytest.param(begun, id="prediction")],
)  # fmt: skip
def test_kill_dash_nine_resumes_exactly(
    whole: Run, polyps: Path, tmp_path: Path, when: Callable[[Path], bool]
) -> None:
    run = make(polyps, tmp_path)
    command = [sys.executable, "-m", "snella.cli", "execute", "--settings", run.to_json()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not when(run.folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert when(run.folder)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found, wanted = execute(run), execute(whole)
    for name in ("identity", "status", "metrics", "groups", "files", "warnings"):
        assert found[name] == wanted[name]
    for file in whole.folder.glob("predictions/*/*/masks.bin"):
        other = run.folder / file.relative_to(whole.folder)
        assert other.read_bytes() == file.read_bytes()
