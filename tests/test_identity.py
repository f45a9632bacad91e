"""What can move a number makes stale, and nothing else: by content, and by the imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from snella.runs import execute as running
from snella.runs import identity, train
from snella.runs.train import open_data, run_identity

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "snella": ("snella", {"rank": 4}),
    "gps": ("gps", {}),
    "lora": ("peft", {"method": "lora", "rank": 2}),
    "full": ("full", {}),
}
# Where one statement is added, and the rows whose number that can move.
EDITS = {
    "snella/equations/sparsify.py": {"snella"},
    "snella/tuner/allocator.py": {"snella"},
    "snella/backends/cpu.cpp": {"snella"},
    "snella/methods/calibration.py": {"snella", "gps", "lora", "full"},
    "snella/methods/step.py": {"snella", "gps", "lora", "full"},
    "snella/runs/trainer.py": {"snella", "gps", "lora", "full"},
    "snella/tasks/classification/task.py": {"snella", "gps", "lora", "full"},
    "snella/tasks/classification/prepare.py": set(),
    "snella/tasks/classification/toy.py": set(),
    "snella/tasks/classification/score.py": set(),
    "snella/quick/render.py": set(),
    "snella/report/latex.py": set(),
    "snella/check/contract.py": set(),
    "snella/errors.py": set(),
    "baselines/gps.py": {"gps"},
    "baselines/peft.py": {"lora"},
}
KEYS = """
import json, sys
from pathlib import Path
from snella.runs import identity
from snella.runs.run import Run
rows = json.loads(sys.argv[1])
root = Path(identity.__file__).parents[2]
assert root == Path.cwd(), root
print(json.dumps({
    name: [
        identity.training_key(run)["code"],
        identity.evaluation_key(run)["code"],
    ]
    for name, (file, hyperparameters) in rows.items()
    for run in [Run.model_validate({
        "suite": "s", "backbone": {"name": "b", "arch": "a"},
        "dataset": {"name": "d", "task": "classification", "prepared": "p"},
        "method": {"name": name, "file": f"baselines/{file}.py"}, "protocol_name": "p",
        "protocol": {}, "settings": {},
    })]
}))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copy of the code")
    for name in ("snella", "baselines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def keys(folder: Path) -> dict[str, list[str]]:
    """(training code, evaluation code) of each row, as a new process sees the files."""
    import json

    call = [sys.executable, "-c", KEYS, json.dumps(ROWS)]
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_edit_makes_exactly_the_runs_stale_that_it_can_move(copy):
    before = keys(copy)
    for name, stale in EDITS.items():
        file = copy / name
        original = file.read_bytes()
        comment = b"// moved\n" if name.endswith(".cpp") else b"\nMOVED = 1\n"
        file.write_bytes(original + comment)
        after = keys(copy)
        file.write_bytes(original)
        assert {row for row in ROWS if after[row][0] != before[row][0]} == stale, name
        scored = name.endswith("score.py")
        assert all((after[row][1] != before[row][1]) == scored for row in ROWS), name


def test_docstrings_and_comments_move_nothing(copy):
    before = keys(copy)
    for name in ("snella/equations/sparsify.py", "snella/runs/trainer.py", "baselines/gps.py"):
        file = copy / name
        text = file.read_text()
        start = text.index('"""') + 3
        file.write_text(text[:start] + "Another word. " + text[start:] + "\n\n# a remark\n")
    assert keys(copy) == before


def test_merge_belongs_to_the_time_after_training(tmp_path, make_run):
    file = tmp_path / "mine.py"
    source = (ROOT / "baselines" / "full.py").read_text()
    file.write_text(source)
    run = make_run()
    run = run.model_copy(update={"method": run.method.model_copy(update={"file": str(file)})})
    before = run_identity(run, open_data(run))
    file.write_text(source + "\n    def merge(self, model):\n        model.oops\n")
    identity._stage.cache_clear()
    after = run_identity(run, open_data(run))
    assert after["training"] == before["training"] and after["merge"] != before["merge"]


def test_a_broken_merge_costs_no_training_and_is_corrected_without_one(tmp_path, make_run):
    source = (ROOT / "baselines" / "full.py").read_text()
    head, _, _ = source.partition("    def merge")
    file = tmp_path / "mine.py"
    broken, right = ("model.oops()", "pass")
    body = head + "    def merge(self, model: nn.Module) -> None:\n        BODY\n"
    run = make_run()
    run = run.model_copy(update={"method": run.method.model_copy(update={"file": str(file)})})
    file.write_text(body.replace("BODY", broken))
    first = running.execute(run)
    assert first["status"] == "ok" and first["merge"]["failed"]
    assert "oops" in first["merge"]["reason"] and "merging failed" in first["warnings"][0]
    identity._stage.cache_clear()
    file.write_text(body.replace("BODY", right))
    epochs: list[int] = []
    second = running.execute(run, lambda row, n: epochs.append(int(row["epoch"])))
    assert not epochs and second["merge"]["merged"] and second["merge"]["max_difference"] == 0
    assert second["metrics"] == first["metrics"] and not second["warnings"]


def test_local_paths_and_labels_are_no_part_of_it(tmp_path, make_run):
    run = make_run()
    data = open_data(run)
    moved = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(data.folder, moved)
    shutil.copy(ROOT / "baselines" / "full.py", tmp_path / "full.py")
    other = run.model_copy(
        update={
            "suite": "another", "results": "/elsewhere", "protocol_name": "renamed",
            "method": run.method.model_copy(update={"file": f"{tmp_path}/full.py", "name": "row"}),
            "dataset": run.dataset.model_copy(update={"prepared": str(moved)}),
        }
    )  # fmt: skip
    assert run_identity(other, open_data(other)) == run_identity(run, data)


def test_settings_data_weights_and_threads_are_part_of_it(make_run):
    run = make_run()
    ids = [identity.identity(run, "data", "weights")["run"]]
    ids.append(identity.identity(run, "other data", "weights")["run"])
    ids.append(identity.identity(run, "data", "other weights")["run"])
    ids += [
        identity.identity(make_run(**change), "data", "weights")["run"]
        for change in ({"lr": 0.5}, {"threads": 2}, {"label_smoothing": 0.1}, {"epochs": 4})
    ]
    ids.append(identity.identity(make_run("full", {"x": 1}), "data", "weights")["run"])
    ids.append(identity.identity(run.model_copy(update={"seed": 1}), "data", "weights")["run"])
    assert len(set(ids)) == len(ids)
    same = make_run(train_split="train", selection="best-test")
    assert identity.identity(same, "data", "weights")["run"] == ids[0]


def test_a_finished_run_is_not_trained_again(make_run):
    run = make_run()
    first = running.execute(run)
    epochs: list[int] = []

    def report(row, n):
        epochs.append(int(row["epoch"]))

    assert running.execute(run, report) == first and not epochs
    run.record.unlink()  # as the workflow does before it runs a job again
    assert running.execute(run, report) == first and not epochs and run.record.exists()
    again = running.execute(run, report, again=True)
    assert epochs == [0, 1, 2] and again["metrics"] == first["metrics"]


def test_a_finished_result_survives_a_later_failure(make_run):
    run = make_run()
    first = running.execute(run)
    typo = run.model_copy(
        update={"method": run.method.model_copy(update={"hyperparameters": {"ranc": 1}})}
    )
    with pytest.raises(running.UserError):
        running.execute(typo)
    assert (run.folder / "failure.json").exists()
    assert running.execute(run) == first
    assert not (run.folder / "failure.json").exists()


def test_another_scorer_costs_no_training(make_run, monkeypatch):
    run = make_run()
    running.execute(run)
    real = identity.evaluation_key
    monkeypatch.setattr(identity, "evaluation_key", lambda run: {**real(run), "code": "new"})
    epochs: list[int] = []
    record = running.execute(run, lambda row, n: epochs.append(1))
    assert not epochs and record["status"] == "ok"


@pytest.mark.parametrize("name", ["adapter.safetensors", "predictions/epoch0002/test/top1.npy"])
def test_a_changed_adapter_or_prediction_is_no_finished_run(make_run, name):
    run = make_run()
    running.execute(run)
    file = run.folder / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    ids = run_identity(run, open_data(run))
    assert train.finished_training(run.folder, ids) is None
    assert running.finished(run.folder, ids) is None


def test_a_flipped_byte_in_the_data_stops_the_run(make_run):
    run = make_run()
    file = Path(run.dataset.prepared) / "train_image.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(running.UserError, match="has changed since it was prepared"):
        running.execute(run)
