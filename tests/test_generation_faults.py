"""What goes wrong in a run of generation is one clear line, and costs nothing that was finished."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_support import make, measured, workplace
from PIL import Image

from snella.errors import UserError
from snella.records import read_failure
from snella.runs.execute import execute
from snella.tasks.generation import sample
from snella.tasks.generation.task import Generation


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("generation"))


def test_errors_of_a_run_are_one_line(place: Path, tmp_path: Path) -> None:
    run = make(place, tmp_path)
    file = run.backbone.model_copy(update={"file": (place / "clip").as_posix()})
    with pytest.raises(UserError, match=r"has no model_index.json: it is not a pipeline folder"):
        execute(run.model_copy(update={"backbone": file}))
    weights = {**run.settings, "clip_model": "local-dir:nowhere"}
    with pytest.raises(UserError, match="needs `clip_model: nowhere`, which does not exist"):
        execute(run.model_copy(update={"settings": weights}))
    unset = {**run.settings, "lpips_net": "alex"}
    with pytest.raises(UserError, match=r"Scoring generation needs `lpips_file:`, a local file"):
        execute(run.model_copy(update={"settings": unset}))
    assert not (run.folder / "training.json").exists()  # said before any training


def test_nan_in_training_is_a_value(place: Path, tmp_path: Path) -> None:
    """Half precision overflows; the run ends as diverged, at a step that is named."""
    record = execute(make(place, tmp_path, "full", precision="fp16", lr=1e30))
    assert record["status"] == "diverged"
    assert record["reason"].startswith("the loss became nan in epoch 1, step 0")


def test_nan_in_generation_names_the_precision(place: Path, tmp_path: Path) -> None:
    run = make(place, tmp_path, "full", steps=1, lr=1e30)
    with pytest.raises(UserError, match=r"generates NaN: half precision \(fp16\).*lower `lr`"):
        execute(run)
    failure = read_failure(run.folder)
    assert failure is not None and "The model generates NaN" in failure["reason"]


def test_out_of_memory_says_what_to_lower(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(Generation, "loss", full)
        record = execute(make(place, tmp_path))
    assert record["status"] == "oom"
    assert "lower `batch_size`" in record["reason"] and "\n" not in record["reason"]
    with monkeypatch.context() as patch:
        patch.setattr(sample, "decode", full)
        record = execute(make(place, tmp_path))
    assert record["status"] == "oom"
    assert "while generating 3 images of 32 pixels at a time; lower `generat" in record["reason"]
    assert "batch_size" not in record["reason"]
    assert execute(make(place, tmp_path))["status"] == "ok"


def test_a_full_disk_costs_no_image(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written stays; with room again the rest comes out as if nothing had happened."""
    whole = execute(make(place, tmp_path / "whole"))
    run = make(place, tmp_path / "full")
    save, written = Image.Image.save, []

    def fails_at_the_third(image: Image.Image, *arguments: Any, **options: Any) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(save(image, *arguments, **options))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fails_at_the_third)
        with pytest.raises(UserError, match=r"Cannot write .*p001_s0.png: No space left on device"):
            execute(run)
    kept = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*.png")}
    assert len(kept) == 2
    assert measured(execute(run)) == measured(whole)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
