"""A task family is one folder: a third one, outside the package, reaches a table untouched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from snella.cli import main
from snella.errors import UserError, one_line
from snella.runs.evaluate import _require
from snella.tasks import Metric, Score, find_task, task_names

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ROOT / "tests" / "families"
GUIDE = ROOT / "docs" / "add-a-task.md"


@pytest.fixture
def mine(tmp_path) -> list[str]:
    """The configuration that the guide shows, in a folder of its own."""
    (own,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.S)
    places = {"results": f"{tmp_path}/results", "data": f"{tmp_path}/data", "tasks": str(FAMILIES)}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(own), **places}))
    return ["--configfile", str(path)]


def test_the_guide_shows_the_family_as_it_is():
    for file in (FAMILIES / "regression").glob("*.py"):
        shown = f"`tasks/regression/{file.name}`\n\n```python\n{file.read_text()}```"
        assert shown in GUIDE.read_text(), file


def test_a_family_outside_the_package_reaches_a_table(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for method in ("full", "linear", "lora-8"):
        assert main(["run", "--method", method, "--dataset", "spots", *mine]) == 0
    assert main(["table", "spots", *mine]) == 0
    record = json.loads(
        (tmp_path / "results/runs/spots/vit-quick/spots/full/seed0/record.json").read_text()
    )
    metrics = record["metrics"]
    assert record["metric"] == "rmse" and record["task"] == "regression"
    # Lower is better: the best look at the test set has the smallest error.
    assert metrics["best-test"]["rmse"] <= min(metrics["last"]["rmse"], metrics["val"]["rmse"])
    assert metrics["last"]["rmse"] < 0.3 and 0 <= metrics["last"]["near"] <= 1
    assert "at chance level" not in record["warnings"]
    scores = np.load(tmp_path / "results/runs/spots/vit-quick/spots/full/seed0" / record["scores"])[
        "last/rmse"
    ]
    assert np.sqrt((scores.astype(float) ** 2).mean()) == pytest.approx(metrics["last"]["rmse"])
    text = (tmp_path / "results/spots.tex").read_text()
    assert "RMSE" in text and f"{metrics['last']['rmse']:.3f}"[:4] in text
    assert main(["report", *mine]) == 0
    page = (tmp_path / "results/report.html").read_text()
    assert "The first test image." in page and page.count("data:image/webp") == 4
    run = tmp_path / "results/runs/spots/vit-quick/spots/full/seed0"
    for file in run.rglob("places.npy"):
        file.unlink()
    assert main(["report", *mine]) == 0
    page = (tmp_path / "results/report.html").read_text()
    assert "examples, suite spots: FileNotFoundError" in page and "data:image" not in page


def test_the_workflow_takes_a_family_and_a_table_of_ones_own(mine):
    """Data that are rendered need no folder; braces of a caption are no wildcards."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "-n", *mine, "--", "{}.tex"]
    command[-1] = f"{yaml.safe_load(Path(mine[1]).read_text())['results']}/spots.tex"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == 0 and "No folder" not in told, told


def test_scores_that_a_record_cannot_hold_are_refused():
    metrics = (Metric("dice", "Dice"), Metric("mae", "MAE"))
    _require(metrics, {"dice": Score(1.0), "mae": Score(0.0), "more": Score(7.0)}, "mine")
    with pytest.raises(UserError, match=r"mine gives no 'mae' \(it gives dice\)"):
        _require(metrics, {"dice": Score(1.0)}, "mine")
    for value in (1.2, float("nan")):
        with pytest.raises(UserError, match=f"dice = {value}, outside of 0.0 to 1.0"):
            _require(metrics, {"dice": Score(value)}, "mine")


def test_a_class_that_a_description_misspells_is_one_line():
    info = find_task("regression", str(FAMILIES))
    for name in ("regression.task:Regresion", "regression.tsk:Regression"):
        with pytest.raises(UserError, match=f"no '{name}', which a TASK names"):
            replace(info, implementation=name).task_class()


def test_a_failure_names_the_line_of_the_task(tmp_path):
    file = tmp_path / "mine" / "task.py"
    file.parent.mkdir()
    file.write_text("def forward():\n    return {}['imag']\n")
    namespace = {}
    exec(compile(file.read_text(), str(file), "exec"), namespace)
    with pytest.raises(KeyError) as raised:
        namespace["forward"]()
    assert one_line(raised.value, tmp_path / "other.py", file.parent).endswith("(task.py, line 2)")


def test_settings_of_another_family_are_refused(mine, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    extra = ["--config", "protocols.spots.label_smoothing=0.1"]
    assert main(["run", "--method", "full", "--dataset", "spots", *mine, *extra]) == 2
    assert "'label_smoothing'" in capsys.readouterr().err


def test_families_are_found_like_methods(tmp_path):
    assert {"classification", "regression"} <= set(task_names(str(FAMILIES)))
    with pytest.raises(UserError, match="Did you mean 'classification'"):
        find_task("clasification")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("TASK = 1\n")
    with pytest.raises(UserError, match="must define TASK"):
        find_task("broken", str(tmp_path))
    (tmp_path / "worse").mkdir()
    (tmp_path / "worse" / "__init__.py").write_text("import nowhere_at_all\n")
    with pytest.raises(UserError, match=r"worse does not import: ModuleNotFoundError.*line 1"):
        find_task("worse", str(tmp_path))
