"""What can move a number makes stale, and nothing else: by content, and by the imports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from report_support import record

from snella.cli import main
from snella.jobs import budget, page, tables
from snella.jobs.prepare import prepare_dataset
from snella.records import write_record
from snella.runs import execute as running
from snella.runs import identity, sources, train
from snella.runs.train import load_run, open_data, run_identity
from snella.suite import plan, status
from snella.suite.config import load

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
    "snella/methods/calibration.py": {"gps"},
    "snella/tuner/export.py": set(),
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


def test_a_name_that_an_interface_hands_on_counts_for_those_who_import_it(copy):
    before = keys(copy)
    file = copy / "snella" / "method.py"
    original = file.read_text()
    more = original.replace('    "trainable",\n', '    "trainable",\n    "freeze",\n')
    file.write_text(more.replace("import count_parameters,", "import count_parameters, freeze,"))
    assert more != file.read_text() != original and keys(copy) == before
    file.write_text(original.replace("    slots,\n", "    block_paths as slots,\n"))
    after = keys(copy)
    file.write_text(original)
    assert {row for row in ROWS if after[row] != before[row]} == {"snella", "lora"}


@pytest.mark.parametrize(
    "statement,followed",
    [
        ("from snella import SnellaConfig", True),
        ("import snella", True),
        ("import snella.tuner.export", True),
        ("from snella.tuner import *", True),
        ("from snella.tuner import convert_to_lora", True),
        ("from snella.tuner import SnellaConfig", False),
        ("from snella.method import Method", False),
    ],
)
def test_names_of_the_package_lead_to_the_code_behind_them(tmp_path, make_run, statement, followed):
    file = tmp_path / "mine.py"
    file.write_text(statement)
    run = make_run()
    run = run.model_copy(update={"method": run.method.model_copy(update={"file": str(file)})})
    assert ("snella.tuner.export" in identity.training_sources(run).code) == followed


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


def test_another_selection_is_asked_of_a_finished_record(make_run):
    run = make_run(selection="last")
    first = running.execute(run)
    other = make_run(selection="best-test")
    assert status.state(other).name == "done"
    epochs: list[int] = []
    second = running.execute(other, lambda row, n: epochs.append(1))
    assert not epochs and second["protocol"]["selection"] == "best-test"
    assert status.state(other).record == second
    assert {**second, "protocol": 0, "digest": 0} == {**first, "protocol": 0, "digest": 0}


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


METHOD = '''"""A method."""
import beside_it
from snella.method import Method
TEXT = """two

paragraphs"""
def one(): "a word"; return 1
def merge(tokens):
    return tokens
class Mine(Method):
    """It."""
    def adapt(self, model):
        pass
    @property
    def merged(self):
        return beside_it.x
    def merge(self, model):
        """Fold."""
        pass
'''


@pytest.mark.parametrize(
    "old,new,training,merging",
    [
        ("paragraphs", "words", True, False),
        ("two\n\n", "two\n", True, False),
        ("return 1", "return 2", True, False),
        ("return tokens", "return 2 * tokens", True, False),  # called in training, maybe
        ('Fold."""\n        pass', 'Fold."""\n        model.x = 1', False, True),
        ("Fold.", "Add.", False, False),
        ("It.", "This.", False, False),
        ("A method.", "Another.", False, False),
        ("import beside_it", "import beside_it  # which lies there", False, False),
        ("import beside_it\nfrom snella", "import beside_it\n\nfrom snella", False, False),
        (
            "import beside_it\nfrom snella.method import Method\n",
            "from snella.method import Method\nimport beside_it\n",
            False,
            False,
        ),
        ("import Method\n", "import Method, trainable\n", True, False),
        ("class", "\f\n# a form feed is no end of a line\nclass", False, False),
    ],
)
def test_what_counts_of_a_method_file(tmp_path, make_run, old, new, training, merging):
    file = tmp_path / "mine.py"
    (tmp_path / "beside_it.py").write_text("x = 1\n")
    run = make_run()
    run = run.model_copy(update={"method": run.method.model_copy(update={"file": str(file)})})

    def keys(source: str) -> tuple[object, str]:
        file.write_text(source)
        identity._stage.cache_clear()
        sources._read.cache_clear()
        sources._merge_code.cache_clear()
        return identity.training_key(run)["code"], sources.merge_code(str(file))

    assert METHOD.count(old) >= 1
    before, after = keys(METHOD), keys(METHOD.replace(old, new, 1))
    assert (before[0] != after[0], before[1] != after[1]) == (training, merging)


def test_a_helper_beside_a_method_file_counts(tmp_path, make_run):
    file = tmp_path / "mine.py"
    run = make_run()
    run = run.model_copy(update={"method": run.method.model_copy(update={"file": str(file)})})
    file.write_text(METHOD)
    found = []
    for content in ("x = 1\n", "x = 2\n"):
        (tmp_path / "beside_it.py").write_text(content)
        identity._stage.cache_clear()
        sources._read.cache_clear()
        found.append(identity.training_sources(run))
    assert found[0].code["beside_it"] != found[1].code["beside_it"]
    assert found[0].libraries == found[1].libraries and "beside_it" not in found[0].libraries


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfX = 1\n", b"# -*- coding: latin-1 -*-\nX = '\xe9'\n", b"X = 1\r\n"]
)
def test_sources_in_other_encodings_are_read(tmp_path, content):
    file = tmp_path / "mine.py"
    file.write_bytes(content)
    assert sources._read(file, 0, True).text.startswith("X = ")


FAMILY = {
    "__init__": """
        from pathlib import Path
        from snella.tasks import Metric, TaskInfo, TaskSettings
        from {name}.drawing import draw
        def prepare(name, spec, folder):
            return draw()
        TASK = TaskInfo(
            name="{name}", title="Mine", metrics=(Metric("mae", "MAE", "", False),),
            settings=TaskSettings, prepare=prepare, sources=lambda spec: [],
            implementation="{name}.task:Mine", scorer="{name}.score:Mine",
        )
    """,
    "task": "from .parts import size\nclass Mine: pass\n",
    "parts": "from . import deep\nsize = 1\n",
    "deep": "x = 1\n",
    "score": "class Mine: pass\n",
    "drawing": "def draw(): pass\n",
}


def test_a_family_of_ones_own_is_followed_through_relative_imports(tmp_path, make_run):
    name = "relative_family"
    (tmp_path / name).mkdir()
    for module, text in FAMILY.items():
        text = textwrap.dedent(text).replace("{name}", name)
        (tmp_path / name / f"{module}.py").write_text(text)
    run = make_run()
    task = {"tasks": str(tmp_path), "dataset": run.dataset.model_copy(update={"task": name})}
    run = run.model_copy(update=task)
    assert {f"{name}.{m}" for m in ("task", "parts", "deep")} <= set(
        identity.training_sources(run).code
    )
    assert f"{name}.score" in identity.evaluation_sources(run).code

    def edited(module: str, key):
        before = key()
        file = tmp_path / name / f"{module}.py"
        file.write_text(file.read_text() + "MOVED = 1\n")
        sources._read.cache_clear()
        return key() != before

    assert edited("drawing", lambda: identity.prepare_key(run.task))
    assert not edited("score", lambda: identity.prepare_key(run.task))


def test_the_direction_of_a_metric_belongs_to_scoring(make_run, monkeypatch):
    run = make_run()
    before = identity.identity(run, "data", "weights")
    metric = replace(run.task.primary, higher_is_better=False)
    other = replace(run.task, metrics=(metric,))
    monkeypatch.setattr("snella.runs.run.find_task", lambda name, folder: other)
    after = identity.identity(run, "data", "weights")
    assert after["evaluation"] != before["evaluation"] and after["training"] == before["training"]


@pytest.mark.parametrize("large", [False, True])
def test_other_weights_are_no_current_record(make_run, tmp_path, monkeypatch, large):
    from safetensors.torch import save_file

    run = make_run()
    file = tmp_path / "weights.safetensors"
    save_file(load_run(run).model.state_dict(), file)
    backbone = run.backbone.model_copy(update={"file": str(file), "load": {"fresh": ["head"]}})
    run = run.model_copy(update={"backbone": backbone})
    running.execute(run)
    if large:
        monkeypatch.setattr(status, "LARGE", 1)
    assert status.state(run).name == "done"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert status.state(run).reason == "made with other weights"


@pytest.mark.parametrize("change", ["image", "image behind a link", "path", "nothing", "gone"])
def test_plan_notices_that_files_behind_prepared_data_changed(tmp_path, capsys, change):
    raw = tmp_path / "raw"
    folder_of_images(raw)
    if change == "image behind a link":
        (raw / "images").rename(tmp_path / "elsewhere")
        (raw / "images").symlink_to(tmp_path / "elsewhere")
    own = {
        "suite": "mine", "results": f"{tmp_path}/results", "data": f"{tmp_path}/data",
        "datasets": {"own": {"path": str(raw)}},
        "suites": {
            "mine": {"title": "M", "backbone": "vit-quick", "protocol": "quick",
                     "groups": {"natural": ["own"]}, "methods": ["full"]}
        },
        "tables": {
            "t": {"caption": "C", "rows": [{"methods": ["full"]}],
                  "columns": [{"datasets_of": "natural"}]}
        },
    }  # fmt: skip
    path = tmp_path / "mine.yaml"

    def planned() -> str:
        path.write_text(yaml.safe_dump(own))
        assert main(["plan", "t", "--configfile", str(path), "--json"]) == 0
        (run,) = json.loads(capsys.readouterr().out)["list"]
        return f"{run['state']} {run['reason']}".strip()

    path.write_text(yaml.safe_dump(own))
    config = load(path)
    prepare_dataset(config, "own")
    (run,) = plan.plan(config)
    ids = run_identity(run, open_data(run))
    write_record(run.folder, record("full", "own", 0.5, suite="mine") | {"identity": ids})
    assert planned() == "done"
    ours = {"protocols": {"quick": {"selection": "best-test"}}}
    table = tables.build(load(path, ours), "t")
    assert table.results.selection == "best-test"
    if change.startswith("image"):
        shutil.copy(raw / "images/train800_1.png", raw / "images/train800_0.png")
    elif change == "path":
        shutil.copytree(raw, tmp_path / "other")
        own["datasets"]["own"]["path"] = str(tmp_path / "other")
    elif change == "gone":
        shutil.rmtree(raw)
    moved = "stale made with other data"
    expected = "done" if change in ("nothing", "gone") else moved
    assert planned() == expected
    (shown,) = page.content(load(path)).runs.values()
    assert shown.state == expected.split()[0]
    assert budget.budget(load(path), [run], "mine", {}).done == (expected == "done")


def folder_of_images(raw: Path) -> None:
    rng = np.random.default_rng(0)
    (raw / "images").mkdir(parents=True)
    for split, count in (("train800", 6), ("val200", 3), ("test", 3)):
        names = [f"images/{split}_{i}.png" for i in range(count)]
        for name in names:
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(raw / name)
        lines = [f"{name} {i % 3}" for i, name in enumerate(names)]
        (raw / f"{split}.txt").write_text("\n".join(lines) + "\n")
