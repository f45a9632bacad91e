"""A signal ends a run after the step under way, and the run goes on from there, bit for bit."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from snella.runs import execute as running
from snella.runs import trainer
from snella.runs.run import Run
from snella.runs.stopping import Terminated, terminable, whole

AUGMENTED = {
    "augmentation": "timm", "auto_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0,
    "random_erasing": 0.5,
}  # fmt: skip
ACCUMULATED = {"batch_size": 4, "accumulation": 3, "ema_decay": 0.9}
RUNS = {
    "full, augmented": ("full", {}, AUGMENTED),
    "dropout": ("peft", {"method": "lora", "dropout": 0.3}, {}),
    "half precision": ("peft", {"method": "lora"}, {"precision": "bf16", "clip_grad": 1.0}),
    "AdaLoRA": ("peft", {"method": "adalora", "rank": 2}, ACCUMULATED),
    "SNELLA": ("snella", {"rank": 4, "target_sparsity": 0.5}, {}),
    "SNELLA, augmented": ("snella", {"rank": 4, "options": {"dropout": 0.3}},
                          AUGMENTED | ACCUMULATED),
    "SNELLA, released": ("snella", {"rank": 4, "variant": "released"}, {"checkpoint_every": 3}),
    "s2ft": ("s2ft", {"points": 20}, {}),
}  # fmt: skip


def stopped(
    chosen: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int, total: int
) -> None:
    """Run as a whole, and again with a signal in the middle of step ``after``; compare."""
    runs = [at(chosen, folder / name) for name in ("whole", "stopped")]
    complete = running.execute(runs[0])
    with monkeypatch.context() as patch:
        steps = count_steps(patch, lambda n: n == after and os.kill(os.getpid(), signal.SIGUSR1))
        record = running.execute(runs[1])
    assert (record["status"], steps) == ("timeout", [after])
    steps = count_steps(monkeypatch)
    resumed = running.execute(runs[1])
    assert steps == [total - after]
    for part in ("identity", "status", "metrics", "parameters", "merge", "files"):
        assert complete[part] == resumed[part], part
    assert same(runs[0], runs[1])


def at(run: Run, folder: Path) -> Run:
    return run.model_copy(update={"results": folder.as_posix()})


def count_steps(
    patch: pytest.MonkeyPatch, then: Callable[[int], object] = lambda n: None
) -> list[int]:
    """How many steps are taken from now on; ``then`` is called when each begins."""
    count, step = [0], trainer.train_step

    def counted(*arguments, **options):
        count[0] += 1
        then(count[0])
        return step(*arguments, **options)

    patch.setattr(trainer, "train_step", counted)
    return count


def same(a: Run, b: Run) -> bool:
    """Whether two runs have the same adapter and, but for seconds, the same history."""
    one, other = (load_file(run.folder / "adapter.safetensors") for run in (a, b))
    equal = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    return equal and history(a) == history(b)


def history(run: Run) -> list[dict[str, str]]:
    with open(run.folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


@pytest.mark.parametrize("name", RUNS)
def test_classification_goes_on_inside_the_epoch(make_run, tmp_path, monkeypatch, name):
    method, hyperparameters, protocol = RUNS[name]
    chosen = make_run(method, hyperparameters, **protocol)
    per_epoch = len(range(0, 40, chosen.protocol.batch_size * chosen.protocol.accumulation))
    stopped(chosen, tmp_path, monkeypatch, per_epoch + 2, 3 * per_epoch)


def test_segmentation_goes_on_inside_the_epoch(tmp_path, monkeypatch):
    """Also where threads have read ahead."""
    from snella.tasks.base import DatasetSpec
    from snella.tasks.segmentation import TASK, pixels
    from snella.tasks.segmentation.toy import SIZES

    monkeypatch.setattr(pixels, "SMALL", 0)
    folder = tmp_path / "prepared" / "polyps"
    TASK.prepare("polyps", DatasetSpec(kind="quick", task="segmentation"), folder)
    chosen = Run.model_validate({
        "suite": "test",
        "backbone": {"name": "tiny", "arch": "sam_vit", "kwargs": SIZES, "file": "random"},
        "dataset": {"name": "polyps", "task": "segmentation", "prepared": folder.as_posix()},
        "method": {"name": "snella", "file": (ROOT / "baselines" / "snella.py").as_posix(),
                   "hyperparameters": {"rank": 4, "options": {"dropout": 0.1}}},
        "protocol_name": "test",
        "protocol": {"epochs": 2, "batch_size": 24, "train_split": "train", "warmup_epochs": 0},
        "settings": {"image_size": 32},
        "results": "",
    })  # fmt: skip
    stopped(chosen, tmp_path, monkeypatch, 3, 12)


def test_generation_goes_on_inside_the_epoch(tmp_path, monkeypatch):
    from generation_support import make, workplace

    chosen = make(workplace(tmp_path / "place"), tmp_path, "snella", steps=5)
    chosen = chosen.model_copy(update={"settings": {**chosen.settings, "epoch_batches": 6}})
    stopped(chosen, tmp_path, monkeypatch, 2, 5)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_signal_while_predicting_costs_no_training(make_run, tmp_path, monkeypatch, ema):
    from snella.tasks.classification.task import Classification

    chosen = make_run(checkpoint_every=3, ema_decay=ema)
    runs = [at(chosen, tmp_path / name) for name in ("whole", "stopped")]
    complete, predict = running.execute(runs[0]), Classification.predict

    def signalled(self, model, split, folder):
        if "epoch0001" in folder.parts and split == "test":
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, model, split, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "predict", signalled)
        assert running.execute(runs[1])["status"] == "timeout"
    steps = count_steps(monkeypatch)
    assert running.execute(runs[1])["files"] == complete["files"]
    assert steps == [3]  # of the third epoch
    assert same(*runs)


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize(
    "method,protocol", [("full", {"ema_decay": 0.9}), ("snella", {"evaluate_every": 1})]
)
def test_a_kill_while_predicting_costs_no_step(
    make_run, tmp_path, monkeypatch, method, protocol, epoch
):
    from snella.tasks.classification.task import Classification

    chosen = make_run(method, **{"evaluate_every": 1, **protocol})
    runs = [at(chosen, tmp_path / name) for name in ("whole", "killed")]
    complete, predict = running.execute(runs[0]), Classification.predict

    def killed(self, model, split, folder):
        if f"epoch{epoch:04d}" in folder.parts and split == "test":
            raise KeyboardInterrupt  # after which nothing runs, as after a kill
        return predict(self, model, split, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "predict", killed)
        with pytest.raises(KeyboardInterrupt):
            running.execute(runs[1])
    steps = count_steps(monkeypatch)
    assert running.execute(runs[1])["files"] == complete["files"]
    assert steps == [3 * (2 - epoch)] and same(*runs)


def test_a_hook_that_changes_weights_is_not_called_again_after_a_kill(make_run, tmp_path):
    """Where an epoch's steps are done, it has begun already."""
    file = tmp_path / "halving.py"
    file.write_text(
        "from snella.method import Method\n"
        "class Halving(Method):\n"
        "    def adapt(self, model):\n        model.cls_token.requires_grad_(True)\n"
        "    def on_epoch_start(self, model, epoch, epochs):\n        model.cls_token.data /= 2\n"
    )
    chosen = make_run()
    chosen = chosen.model_copy(
        update={"method": chosen.method.model_copy(update={"file": str(file)})}
    )
    runs = [at(chosen, tmp_path / name) for name in ("whole", "killed")]
    running.execute(runs[0])

    def killed(row, epochs):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.execute(runs[1], killed)
    running.execute(runs[1])
    assert same(*runs)


def test_what_was_predicted_before_a_kill_is_kept(make_run, tmp_path, monkeypatch):
    """Also what the last epoch predicted; the time of a part is no time per image."""
    run = at(make_run(evaluate_every=10), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("snella.runs.train._write_adapter", lambda *arguments: 1 / 0)
        assert running.execute(run)["status"] == "failed"
    (file,) = (run.folder / "predictions/epoch0002/test").iterdir()
    written = file.stat().st_mtime_ns
    assert count_steps(monkeypatch) == [0]
    record = running.execute(run)
    assert record["status"] == "ok" and file.stat().st_mtime_ns == written
    assert record["cost"]["inference_seconds_per_image"] is None


def test_a_method_that_moves_frozen_weights_fails_however_often_it_is_tried(make_run, tmp_path):
    file = tmp_path / "mover.py"
    file.write_text(
        "from snella.method import Method\n"
        "class Mover(Method):\n"
        "    def adapt(self, model):\n        model.cls_token.requires_grad_(True)\n"
        "    def on_step_end(self, model):\n        model.pos_embed.data += 1\n"
    )
    run = at(make_run(), tmp_path)
    run = run.model_copy(update={"method": run.method.model_copy(update={"file": str(file)})})
    run = run.model_copy(update={"protocol": run.protocol.model_copy(update={"epochs": 1})})
    for _ in range(2):
        with pytest.raises(running.UserError, match="moves pos_embed"):
            running.execute(run)


def test_a_second_signal_does_not_disturb_the_checkpoint(make_run, tmp_path, monkeypatch):
    run = at(make_run(), tmp_path)
    with monkeypatch.context() as patch:
        write = trainer.Trainer._write_checkpoint

        def signalled(self, optimizer):
            if self.begun is not None:
                os.kill(os.getpid(), signal.SIGTERM)
            write(self, optimizer)

        patch.setattr(trainer.Trainer, "_write_checkpoint", signalled)
        count_steps(patch, lambda n: n == 2 and os.kill(os.getpid(), signal.SIGUSR1))
        running.execute(run)
    assert "SIGUSR1" in json.loads((run.folder / "failure.json").read_text())["reason"]
    assert count_steps(monkeypatch) == [0]
    assert running.execute(run)["status"] == "ok"


def test_what_goes_on_after_any_exception_does_not_go_on_after_a_signal():
    with pytest.raises(Terminated, match="SIGTERM"), terminable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("taken for a mere error")


def test_a_signal_waits_for_what_must_be_whole():
    done = []
    with pytest.raises(Terminated), terminable():
        with whole():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(1)
        done.append(2)
    assert done == [1]
    with terminable(), whole():  # the request is forgotten
        pass
