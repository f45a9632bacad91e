"""A run can be trusted: deterministic, resumable after any kill, honest about divergence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from snella.data.prepared import Prepared, SealedTestLabels
from snella.errors import UserError
from snella.runs import execute as running
from snella.runs.evaluate import score_run
from snella.runs.execute import execute, load_run
from snella.tasks import Classification

METHODS = [
    ("full", {}),
    ("linear", {}),
    ("peft", {"method": "lora", "rank": 2}),
    ("peft", {"method": "adalora", "rank": 2}),
    ("snella", {"rank": 4, "target_sparsity": 0.5}),
    ("snella", {"rank": 4, "variant": "released"}),
]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def measured(record: dict) -> dict:
    """A record without what may differ between two identical runs: times and memory."""
    keep = ("identity", "status", "metrics", "parameters", "merge", "protocol", "digests", "run")
    return {key: record[key] for key in keep} | {"gflops": record["cost"]["gflops"]}


@pytest.mark.parametrize("method,hyperparameters", METHODS)
def test_same_settings_give_the_bit_identical_adapter(settings, tmp_path, method, hyperparameters):
    chosen = settings(method, hyperparameters)
    first = execute(chosen, tmp_path / "a")
    second = execute(chosen, tmp_path / "b")
    assert first["status"] == "ok"
    assert measured(first) == measured(second)
    assert same(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


def test_another_seed_gives_another_adapter(settings, tmp_path):
    chosen = settings()
    execute(chosen, tmp_path / "a")
    execute({**chosen, "seed": 1}, tmp_path / "b")
    assert not same(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


@pytest.mark.parametrize("method,hyperparameters", METHODS)
@pytest.mark.parametrize("ema", [None, 0.9])
def test_resumes_to_the_bit_identical_result(settings, tmp_path, method, hyperparameters, ema):
    chosen = settings(method, hyperparameters, ema_decay=ema)
    whole = execute(chosen, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill_after_first_epoch(row, epochs):
        if row["epoch"] == 0:
            raise Killed

    with pytest.raises(Killed):
        execute(chosen, tmp_path / "killed", kill_after_first_epoch)
    seen = []
    resumed = execute(chosen, tmp_path / "killed", lambda row, epochs: seen.append(row["epoch"]))
    assert seen == [1, 2]
    assert measured(whole) == measured(resumed)
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))


def test_kill_dash_nine_at_any_moment_resumes_exactly(settings, tmp_path):
    chosen = settings(epochs=12)
    whole = execute(chosen, tmp_path / "whole")
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "snella.cli", "execute", "--settings", json.dumps(chosen)]
    process = subprocess.Popen([*command, "--folder", str(killed)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "record.json").exists()
    resumed = execute(chosen, killed)
    assert measured(whole) == measured(resumed)
    assert same(adapter(tmp_path / "whole"), adapter(killed))
    assert not (killed / "checkpoint.pt").exists()


def test_a_checkpoint_of_other_settings_is_not_resumed(settings, tmp_path):
    stop = pytest.raises(KeyboardInterrupt)
    with stop:
        execute(settings(lr=1e-2), tmp_path / "x", _interrupt)
    execute(settings(), tmp_path / "x")
    execute(settings(), tmp_path / "y")
    assert same(adapter(tmp_path / "x"), adapter(tmp_path / "y"))


def _interrupt(row, epochs):
    raise KeyboardInterrupt


def test_a_damaged_checkpoint_means_starting_again(settings, tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"half a fi")
    assert execute(settings(), folder)["status"] == "ok"


def test_nan_loss_is_a_status_with_a_reason_and_never_a_number(settings, tmp_path):
    record = execute(settings(lr=1e30, warmup_epochs=0), tmp_path / "x")
    assert record["status"] == "diverged"
    assert "epoch" in record["reason"] and "nan" in record["reason"]
    assert "metrics" not in record
    assert json.loads((tmp_path / "x" / "record.json").read_text())["status"] == "diverged"


def test_a_broken_run_is_retried_and_its_failure_forgotten(settings, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(running, "_cost", broken)
        record = execute(settings(), tmp_path / "x")
    assert (record["status"], record["reason"]) == ("failed", "RuntimeError: no luck")
    assert not (tmp_path / "x" / "record.json").exists()
    assert execute(settings(), tmp_path / "x")["status"] == "ok"
    assert not (tmp_path / "x" / "failure.json").exists()


def test_out_of_memory_is_told_from_other_failures(settings, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(running, "score_run", full)
    assert execute(settings(), tmp_path / "x")["status"] == "oom"


def test_a_time_limit_is_recorded(settings, tmp_path):
    def limit(row, epochs):
        os.kill(os.getpid(), signal.SIGTERM)

    record = execute(settings(), tmp_path / "x", limit)
    assert record["status"] == "timeout"
    assert "resume" in record["reason"]
    assert execute(settings(), tmp_path / "x")["status"] == "ok"


def test_all_selections_are_recorded_side_by_side(settings, tmp_path):
    metrics = execute(settings(), tmp_path / "x")["metrics"]
    assert set(metrics) == {"last", "val", "best-test"}
    assert metrics["last"]["epoch"] == 2
    assert metrics["best-test"]["top1"] >= max(metrics["last"]["top1"], metrics["val"]["top1"])


def test_no_val_selection_where_val_images_were_trained_on(settings, tmp_path):
    metrics = execute(settings(train_split="trainval"), tmp_path / "x")["metrics"]
    assert set(metrics) == {"last", "best-test"}


def test_selection_takes_the_epoch_that_its_own_split_prefers(tiny_data):
    data = Prepared.open(tiny_data)
    test = np.arange(24) % 4
    wrong = (test + 1) % 4
    val = np.arange(16) % 4
    predictions = {
        "test": {0: test, 1: wrong, 2: wrong},
        "val200": {0: (val + 1) % 4, 1: val, 2: (val + 1) % 4},
    }
    found = score_run(Classification, predictions, data.folder, data.labels("val200"))
    assert {rule: m["epoch"] for rule, m in found.items()} == {"last": 2, "best-test": 0, "val": 1}
    assert found["val"]["top1"] == 0.0 and found["best-test"]["top1"] == 1.0


def test_every_test_image_is_scored_exactly_once(tiny_data):
    data = Prepared.open(tiny_data)
    with pytest.raises(ValueError, match="23 predictions for 24"):
        score_run(Classification, {"test": {0: np.zeros(23)}}, data.folder, None)


def test_training_code_cannot_read_test_labels(settings):
    task = load_run(settings()).task
    with pytest.raises(SealedTestLabels):
        task.data.labels("test")


def test_fine_tuning_learns(settings, tmp_path):
    record = execute(settings(epochs=40, lr=3e-3), tmp_path / "x")
    assert record["metrics"]["last"]["top1"] > 0.8
    assert record["parameters"]["head"] == 4 * 24 + 4
    assert record["cost"]["train_seconds"] > 0 and record["cost"]["gflops"] > 0
    assert record["provenance"]["compiled_loops"] in (True, False)


def test_a_user_error_is_recorded_and_raised(settings, tmp_path):
    chosen = settings("full", {"ranc": 3})
    with pytest.raises(UserError, match="ranc"):
        execute(chosen, tmp_path / "x")
    assert json.loads((tmp_path / "x" / "failure.json").read_text())["status"] == "failed"


def test_two_processes_never_write_one_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "WAIT_SECONDS", 0)
    with running._exclusive(tmp_path), pytest.raises(UserError, match="Another process"):
        execute(settings(), tmp_path)
