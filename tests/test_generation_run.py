"""Generation through the very code of every run: train, generate, score, and killed at each."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_support import make, measured, settings, workplace
from safetensors.torch import load_file, save_file

from snella.data.prepared import SealedTargets
from snella.errors import UserError
from snella.runs.execute import execute
from snella.runs.run import Run
from snella.runs.train import load_run
from snella.tasks.generation.score import SubjectScorer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("generation"))


@pytest.mark.parametrize("method", ["peft", "snella", "ssf", "full"])
def test_a_run_leaves_images_and_scores(place: Path, tmp_path: Path, method: str) -> None:
    run = make(place, tmp_path, method)
    record = execute(run)
    assert record["status"] == "ok" and record["metric"] == "clip_i"
    last = record["metrics"]["last"]
    assert {"clip_i", "vendi", "clip_t", "dino", "lpips", "drift"} < last.keys()
    assert len(record["groups"]["last"]["clip_i"]) == 2
    assert record["cost"]["gflops"] > 0 and record["cost"]["train_seconds"] > 0
    assert record["merge"]["merged"] and record["merge"]["max_difference"] < 1e-3
    images = sorted((run.folder / "predictions").rglob("*.png"))
    assert len(images) == 2 * (2 * 2 + 2)
    assert last["drift"] > 0  # the adapted model's images are not the unadapted one's


def test_scoring_is_a_stage_of_its_own(place: Path, tmp_path: Path) -> None:
    run = make(place, tmp_path)
    execute(run, stage="train")
    assert not run.record.exists() and (run.folder / "training.json").exists()
    weights = run.folder / "adapter.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert execute(run)["status"] == "ok"
    assert weights.stat().st_mtime_ns == stamp


def test_another_metric_costs_no_training(place: Path, tmp_path: Path) -> None:
    run = make(place, tmp_path)
    first = execute(run)
    other = run.model_copy(update={"settings": {**run.settings, "clip_batch": 2}})
    second = execute(other)
    same, differs = first["identity"], second["identity"]
    assert same["training"] == differs["training"] and same["run"] != differs["run"]
    assert first["provenance"]["started"] == second["provenance"]["started"]


def test_another_network_in_the_same_place_is_scored_anew(place: Path, tmp_path: Path) -> None:
    """What lies in a metric's file counts, not its name; and it costs no training."""
    vit = tmp_path / "vit.safetensors"
    shutil.copy(place / "vit.safetensors", vit)
    run = make(place, tmp_path)
    run = run.model_copy(update={"settings": {**run.settings, "dino_file": vit.as_posix()}})
    first = execute(run)
    save_file({name: 1.1 * value for name, value in load_file(vit).items()}, vit)
    second = execute(run)
    same, differs = first["identity"], second["identity"]
    assert same["training"] == differs["training"] and same["run"] != differs["run"]
    assert first["metrics"]["last"]["dino"] != second["metrics"]["last"]["dino"]
    assert first["provenance"]["started"] == second["provenance"]["started"]
    moved = vit.rename(tmp_path / "moved.safetensors")
    run = run.model_copy(update={"settings": {**run.settings, "dino_file": moved.as_posix()}})
    assert execute(run)["identity"] == differs


@pytest.mark.parametrize("method", ["peft", "snella", "ssf", "s2ft", "full"])
def test_half_precision_keeps_adapters_single(place: Path, tmp_path: Path, method: str) -> None:
    """bf16 weights under bf16 autocast: what trains is float32, and the images are finite."""
    run = make(place, tmp_path, method, precision="bf16", steps=2)
    chosen = {**run.settings, "weights": "bf16"}
    if method == "s2ft":
        file = run.method.model_copy(update={"hyperparameters": {"reference_width": None,
                                                                 "points": 20}})  # fmt: skip
        run = run.model_copy(update={"method": file})
    run = run.model_copy(update={"settings": chosen})
    loaded = load_run(run)
    dtypes = {p.requires_grad: p.dtype for p in loaded.model.parameters()}
    assert dtypes[True] == torch.float32
    assert method == "full" or dtypes[False] == torch.bfloat16
    assert execute(run)["status"] == "ok"


@pytest.mark.parametrize("method", ["peft", "snella", "s2ft"])
def test_a_finished_run_opens_again(place: Path, tmp_path: Path, method: str) -> None:
    """The reopened model generates the very images of the run."""
    from snella.jobs.export import open_run

    run = make(place, tmp_path, method)
    with pytest.raises(UserError, match="holds no trained run"):
        open_run(run.folder)
    execute(run, stage="train")
    _, model = open_run(run.folder)
    task = load_run(run).task
    task.predict(model, "test", tmp_path / "again")
    made = tmp_path / "again" / "images"
    first = next(run.folder.glob("predictions/*/test/images"))
    names = sorted(p.name for p in first.iterdir())
    assert [(made / n).read_bytes() for n in names] == [(first / n).read_bytes() for n in names]


def test_the_documented_export_of_a_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of docs/generation.md from a finished run to an adapter and a plain transformer."""
    from diffusers import SD3Transformer2DModel

    run = make(place, tmp_path, "snella")
    execute(run, stage="train")
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    (code,) = [b.partition("```")[0] for b in text.split("```python\n") if "open_run(" in b]
    path = code.partition('Path("')[2].partition('"')[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace(path, run.folder.as_posix()), names)
    assert (tmp_path / "dog-snella" / "adapter_config.json").is_file()
    plain = SD3Transformer2DModel.from_pretrained(tmp_path / "dog").eval()
    task = load_run(run).task
    batch = next(task.batches("trainval", None))
    with torch.inference_mode():
        expected = task.forward(names["model"], batch)
        torch.testing.assert_close(task.forward(plain, batch), expected)


def killed(run: Run, when: Callable[[Path], bool]) -> None:
    """Start the run in a process of its own and end it by SIGKILL once ``when`` its folder."""
    command = [sys.executable, "-m", "snella.cli", "execute", "--settings", run.to_json()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not when(run.folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert when(run.folder)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("moment", ["training", "generation", "evaluation"])
def test_kill_dash_nine_resumes_exactly(place: Path, tmp_path: Path, moment: str) -> None:
    long = {"steps": 60} if moment == "training" else {}
    whole = execute(make(place, tmp_path / "whole", **long))
    run = make(place, tmp_path / "killed", **long)
    signs: dict[str, Callable[[Path], bool]] = {
        "training": lambda folder: (folder / "checkpoint.pt").exists(),
        "generation": lambda folder: len(list(folder.rglob("images/*.png"))) > 1,
        "evaluation": lambda folder: (folder / "training.json").exists(),
    }
    killed(run, signs[moment])
    assert measured(execute(run)) == measured(whole)


def test_training_does_not_see_the_reference_images(place: Path, tmp_path: Path) -> None:
    from snella.data.prepared import Prepared

    data = Prepared.open(place / "data" / "prepared" / "thing")
    with pytest.raises(SealedTargets):
        data.column("test", "image")
    scorer = SubjectScorer(data, settings())
    assert len(scorer.data.targets("test", "image")) == 3


@pytest.mark.parametrize("installed", [True, False])
def test_eight_bit_adam_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, installed: bool
) -> None:
    """Otherwise AdamW: said once when runs are planned, and in every record."""
    from snella.suite import config as configuration
    from snella.suite import plan, settings

    found = importlib.machinery.ModuleSpec("bitsandbytes", None) if installed else None
    monkeypatch.setattr(settings, "find_spec", {"bitsandbytes": found}.__getitem__)
    runs = plan.plan(configuration.load(overrides={"suite": "dreambooth"}))
    note = "bitsandbytes is not installed: adamw in place of adamw8bit"
    wanted = ("adamw8bit", ()) if installed else ("adamw", (note,))
    assert {(run.protocol.optimizer, run.notes) for run in runs} == {wanted}
    assert [r.getMessage() for r in caplog.records] == ([] if installed else [f"{note}."])


REAL = Path(os.environ.get("SNELLA_DREAMBOOTH", ROOT / "data" / "dreambooth"))


@pytest.mark.skipif(not REAL.is_dir(), reason="DreamBooth's photographs are not here")
@pytest.mark.parametrize("name", ["dog6", "backpack", "teapot"])
def test_real_photographs_at_64_pixels(place: Path, tmp_path: Path, name: str) -> None:
    """The official data and the official pipeline structure (three text encoders, VAE), tiny."""
    from generation_support import official_pipeline

    from snella.tasks.base import DatasetSpec
    from snella.tasks.generation.prepare import prepare

    spec = DatasetSpec(kind="dreambooth", path=str(REAL), options={"subject": name})
    prepared = tmp_path / "data" / "prepared" / name
    assert len(prepare(name, spec, prepared)["prompts"]) == 25
    run = make(place, tmp_path, "snella")
    changes = {"image_size": 64, "max_sequence_length": 16, "prompts": 2}
    sd3 = official_pipeline(tmp_path / "sd3").as_posix()
    run = run.model_copy(update={
        "settings": {**run.settings, **changes},
        "backbone": run.backbone.model_copy(update={"file": sd3}),
        "dataset": run.dataset.model_copy(update={"prepared": prepared.as_posix()}),
    })  # fmt: skip
    record = execute(run)
    assert record["status"] == "ok"
    assert 0 < record["metrics"]["last"]["real_clip_i"] <= 1
