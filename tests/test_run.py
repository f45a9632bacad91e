"""A run can be trusted: deterministic, resumable after any kill, honest about divergence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from snella.data.prepared import Prepared, SealedTargets
from snella.errors import UserError
from snella.files import OWN
from snella.runs import execute as running
from snella.runs.evaluate import evaluate
from snella.runs.train import load_run
from snella.runs.trainer import Trainer

METHODS = [
    ("full", {}),
    ("linear", {}),
    ("peft", {"method": "lora", "rank": 2}),
    ("peft", {"method": "adalora", "rank": 2}),
    ("snella", {"rank": 4, "target_sparsity": 0.5}),
    ("snella", {"rank": 4, "variant": "released"}),
]


def at(run, folder: Path):
    """The same run with its results below ``folder``."""
    return run.model_copy(update={"results": folder.as_posix()})


def execute(run, folder: Path, report=lambda row, epochs: None, **options) -> dict:
    return running.execute(at(run, folder), report, **options)


def file(folder: Path, name: str) -> Path:
    """A file of the one run below ``folder``, whether it exists or not."""
    (run,) = {p.parent for p in folder.glob("runs/*/*/*/*/seed*/.lock")}
    return run / name


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(file(folder, "adapter.safetensors"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def measured(record: dict) -> dict:
    """A record without what may differ between two identical runs: times and memory."""
    keep = ("identity", "status", "metrics", "parameters", "merge", "protocol", "files", "run")
    return {key: record[key] for key in keep} | {"gflops": record["cost"]["gflops"]}


@pytest.mark.parametrize("method,hyperparameters", METHODS)
def test_same_settings_give_the_bit_identical_adapter(make_run, tmp_path, method, hyperparameters):
    chosen = make_run(method, hyperparameters)
    first = execute(chosen, tmp_path / "a")
    second = execute(chosen, tmp_path / "b")
    assert first["status"] == "ok"
    assert measured(first) == measured(second)
    assert same(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


def test_another_seed_gives_another_adapter(make_run, tmp_path):
    chosen = make_run()
    execute(chosen, tmp_path / "a")
    execute(chosen.model_copy(update={"seed": 1}), tmp_path / "b")
    (tmp_path / "b/runs/test/tiny/tiny/full/seed1").rename(
        tmp_path / "b/runs/test/tiny/tiny/full/seed0"
    )
    assert not same(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


@pytest.mark.parametrize("method,hyperparameters", METHODS)
@pytest.mark.parametrize("ema", [None, 0.9])
def test_resumes_to_the_bit_identical_result(
    make_run, tmp_path, monkeypatch, method, hyperparameters, ema
):
    chosen = make_run(method, hyperparameters, ema_decay=ema)
    whole = execute(chosen, tmp_path / "whole")

    def kill_after_first_epoch(row, epochs):
        if row["epoch"] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(chosen, tmp_path / "killed", kill_after_first_epoch)
    begun = []
    monkeypatch.setattr(
        Trainer, "_step", lambda self, *a, step=Trainer._step: begun.append(1) or step(self, *a)
    )
    resumed = execute(chosen, tmp_path / "killed")
    assert len(begun) == 2 * 3  # of the second and third epoch
    assert measured(whole) == measured(resumed)
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))


def test_the_adapter_is_what_was_predicted_with(make_run, tmp_path):
    """Also where weights are averaged."""
    chosen = at(make_run(ema_decay=0.9, lr=1e-2), tmp_path)
    running.execute(chosen)
    loaded = load_run(chosen)
    loaded.method.load_state(loaded.model, load_file(chosen.folder / "adapter.safetensors"))
    (tmp_path / "again").mkdir()
    loaded.task.predict(loaded.model.eval(), "test", tmp_path / "again")
    first = chosen.folder / "predictions/epoch0002/test/top1.npy"
    assert np.array_equal(np.load(first), np.load(tmp_path / "again/top1.npy"))


def test_kill_dash_nine_at_any_moment_resumes_exactly(make_run, tmp_path):
    chosen = make_run(epochs=12)
    whole = execute(chosen, tmp_path / "whole")
    killed = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "snella.cli",
        "execute",
        "--settings",
        at(chosen, killed).to_json(),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(killed.rglob("checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(killed.rglob("checkpoint.pt"))
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(killed.rglob("record.json"))
    resumed = execute(chosen, killed)
    assert measured(whole) == measured(resumed)
    assert same(adapter(tmp_path / "whole"), adapter(killed))
    assert not list(killed.rglob("checkpoint.pt"))


def test_a_checkpoint_of_other_settings_is_not_resumed(make_run, tmp_path):
    stop = pytest.raises(KeyboardInterrupt)
    with stop:
        execute(make_run(lr=1e-2), tmp_path / "x", _interrupt)
    execute(make_run(), tmp_path / "x")
    execute(make_run(), tmp_path / "y")
    assert same(adapter(tmp_path / "x"), adapter(tmp_path / "y"))


def _interrupt(row, epochs):
    raise KeyboardInterrupt


def test_a_damaged_checkpoint_means_starting_again(make_run, tmp_path):
    run = at(make_run(), tmp_path / "x")
    run.folder.mkdir(parents=True)
    (run.folder / "checkpoint.pt").write_bytes(b"half a fi")
    assert running.execute(run)["status"] == "ok"


def test_nan_loss_is_a_status_with_a_reason_and_never_a_number(make_run, tmp_path):
    record = execute(make_run(lr=1e30, warmup_epochs=0), tmp_path / "x")
    assert record["status"] == "diverged"
    assert "epoch" in record["reason"] and "nan" in record["reason"]
    assert "metrics" not in record
    assert json.loads(file(tmp_path / "x", "record.json").read_text())["status"] == "diverged"


def test_a_broken_run_is_retried_and_its_failure_forgotten(make_run, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(running, "evaluate", broken)
        record = execute(make_run(), tmp_path / "x")
    assert (record["status"], record["reason"]) == (
        "failed",
        "RuntimeError: no luck (method full.py)",
    )
    assert not file(tmp_path / "x", "record.json").exists()
    assert execute(make_run(), tmp_path / "x")["status"] == "ok"
    assert not file(tmp_path / "x", "failure.json").exists()


def test_out_of_memory_is_told_from_other_failures(make_run, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(running, "evaluate", full)
    record = execute(make_run(), tmp_path / "x")
    assert record["status"] == "oom" and "gradient_checkpointing: true" in record["reason"]


def test_a_time_limit_is_recorded(make_run, tmp_path):
    def limit(row, epochs):
        os.kill(os.getpid(), signal.SIGTERM)

    record = execute(make_run(), tmp_path / "x", limit)
    assert record["status"] == "timeout"
    assert "resume" in record["reason"]
    assert execute(make_run(), tmp_path / "x")["status"] == "ok"


def test_all_selections_are_recorded_side_by_side(make_run, tmp_path):
    metrics = execute(make_run(), tmp_path / "x")["metrics"]
    assert set(metrics) == {"last", "val", "best-test"}
    assert metrics["last"]["epoch"] == 2
    assert metrics["best-test"]["top1"] >= max(metrics["last"]["top1"], metrics["val"]["top1"])


def test_no_val_selection_where_val_images_were_trained_on(make_run, tmp_path):
    metrics = execute(make_run(train_split="trainval"), tmp_path / "x")["metrics"]
    assert set(metrics) == {"last", "best-test"}


def predictions(folder: Path, **splits: np.ndarray) -> dict[str, Path]:
    for split, found in splits.items():
        (folder / split).mkdir(parents=True)
        np.save(folder / split / "top1.npy", found)
    return {split: folder / split for split in splits}


def test_selection_takes_the_epoch_that_its_own_split_prefers(make_run, tiny_data, tmp_path):
    test, val = np.arange(24) % 4, np.arange(16) % 4
    wrong, off = (test + 1) % 4, (val + 1) % 4
    looks = {
        0: predictions(tmp_path / "0", test=test, val=off),
        1: predictions(tmp_path / "1", test=wrong, val=val),
        2: predictions(tmp_path / "2", test=wrong, val=off),
    }
    found = evaluate(make_run(), Prepared.open(tiny_data), looks).metrics
    assert {rule: m["epoch"] for rule, m in found.items()} == {"last": 2, "best-test": 0, "val": 1}
    assert found["val"]["top1"] == 0.0 and found["best-test"]["top1"] == 1.0


def test_every_test_image_is_scored_exactly_once(make_run, tiny_data, tmp_path):
    looks = {0: predictions(tmp_path / "0", test=np.zeros(23))}
    with pytest.raises(UserError, match="23 predictions for 24"):
        evaluate(make_run(), Prepared.open(tiny_data), looks)


def test_training_code_cannot_read_test_labels(make_run):
    task = load_run(make_run()).task
    with pytest.raises(SealedTargets):
        task.data.labels("test")


def test_fine_tuning_learns(make_run, tmp_path):
    record = execute(make_run(epochs=40, lr=3e-3), tmp_path / "x")
    assert record["metrics"]["last"]["top1"] > 0.8
    assert record["parameters"]["head"] == 4 * 24 + 4
    assert record["cost"]["train_seconds"] > 0 and record["cost"]["gflops"] > 0
    assert record["provenance"]["compiled_loops"] in (True, False)


def test_a_user_error_is_recorded_and_raised(make_run, tmp_path):
    chosen = make_run("full", {"ranc": 3})
    with pytest.raises(UserError, match="ranc"):
        execute(chosen, tmp_path / "x")
    assert json.loads(file(tmp_path / "x", "failure.json").read_text())["status"] == "failed"


def test_what_a_killed_process_was_writing_is_removed_at_the_start(make_run, tmp_path):
    """Also where the run is finished and nothing is written any more."""
    chosen = make_run(epochs=1, warmup_epochs=0)
    execute(chosen, tmp_path)
    folder = file(tmp_path, ".lock").parent
    dead, alive = folder / f".checkpoint.pt.{OWN}4194305", folder / f".x.json.{OWN}{os.getpid()}"
    elsewhere = folder / ".checkpoint.pt.0123abcd-4194305"
    for path in (dead, alive, elsewhere):
        path.write_bytes(b"half")
    execute(chosen, tmp_path)
    assert not dead.exists() and alive.exists() and elsewhere.exists()


def test_a_second_process_waits_and_takes_what_the_first_finished(make_run, tmp_path, capsys):
    """A twin of a job whose workflow was killed: it neither writes nor trains."""
    run = at(make_run(), tmp_path)
    first = running.execute(run)
    written = (run.folder / "training.json").stat().st_mtime_ns
    second: list[dict] = []
    twin = threading.Thread(target=lambda: second.append(running.execute(run)))
    with running.exclusive(run.folder):
        twin.start()
        twin.join(timeout=0.7)
        assert twin.is_alive() and not second
    twin.join(timeout=60)
    assert second == [first]
    assert (run.folder / "training.json").stat().st_mtime_ns == written
    assert f"at work in process {os.getpid()} on " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error,transient",
    [
        (ValueError("the method is wrong"), False),
        (UserError("no such hyper-parameter"), False),
        (OSError(5, "Input/output error"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("no memory"), True),
        (running.Terminated("time limit"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
    ],
)
def test_only_what_the_machine_did_may_end_otherwise(error, transient):
    assert running.transient(error) is transient


def test_a_user_error_says_that_a_retry_does_not_help(make_run, tmp_path):
    with pytest.raises(UserError):
        execute(make_run("full", {"ranc": 3}), tmp_path / "x")
    assert json.loads(file(tmp_path / "x", "failure.json").read_text())["transient"] is False


def test_memory_that_is_lacking_on_the_cpu_is_worth_another_try():
    """PyTorch says so with a plain RuntimeError there."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**48)
    assert running.transient(error.value)
