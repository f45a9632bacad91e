"""The benchmarks' own arithmetic: bytes counted, turns taken, other people's files imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))


def test_memory_is_what_a_step_adds() -> None:
    from measuring import trained_by_adamw

    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    model[0].requires_grad_(False)
    x = torch.randn(7, 3)
    memory = trained_by_adamw(model, lambda: model(x).pow(2).sum()).memory()
    assert memory["gradients"] == 4 * 10
    assert memory["optimizer_state"] == 4 * (2 * 10 + 1)  # two moments and a step counter
    # the input of the last layer, and the output that is squared
    assert memory["kept_for_backward"] == 4 * (7 * 5 + 7 * 2)


def test_actions_take_turns_and_the_first_round_is_not_counted() -> None:
    from measuring import Setup, interleaved

    calls: list[str] = []
    actions = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = interleaved(actions, 2, Setup())
    assert "".join(calls) == "abbaab"
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}


def test_authors_file_is_imported_without_leaving_traces(tmp_path: Path) -> None:
    from authors_code import imported

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vit.py").write_text(
        "from timm.models.layers.helpers import to_2tuple\n"
        "from timm.models.registry import register_model\n"
        "import ml_collections, ipdb\n"
        "print('not seen')\n"
        "@register_model\n"
        "def vit_tiny_patch16_224():\n"
        "    config = ml_collections.ConfigDict()\n"
        "    config.size = to_2tuple(3)\n"
        "    return config\n"
    )
    before, entry = dict(sys.modules), timm.models.model_entrypoint("vit_tiny_patch16_224")
    with imported(tmp_path, "models.vit") as code:
        assert code.vit_tiny_patch16_224()["size"] == (3, 3)
    assert timm.models.model_entrypoint("vit_tiny_patch16_224") is entry
    left = set(sys.modules) - set(before)
    assert not [name for name in left if name.startswith(("models", "ml_collections", "ipdb"))]
    assert str(tmp_path) not in sys.path


def test_peft_side_trains_the_same_parameters_in_the_same_memory() -> None:
    from library_models import library
    from measuring import Setup, configured_method, configured_row

    setup = Setup(arch="vit_tiny_patch16_224", batch=1, classes=3)
    ours = configured_row(configured_method("lora-fa"), setup)
    theirs = library(Path(), setup, ours)
    assert ours.trainable() == theirs.trainable()
    assert sum(ours.memory().values()) == sum(theirs.memory().values())


def test_every_comparison_names_a_row_and_a_repository() -> None:
    from library_models import LIBRARY
    from published_models import PUBLISHED, REPOSITORIES

    from snella.suite import config

    rows = config.load().methods
    assert {entry.row for entry in (PUBLISHED | LIBRARY).values()} <= set(rows)
    assert {entry.repository for entry in PUBLISHED.values()} == set(REPOSITORIES)


def test_both_sides_of_the_data_benchmark_see_every_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    import data

    output = tmp_path / "data.json"
    sizes = ["--images", "12", "--epochs", "2", "--workers", "0", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["data.py", *sizes, "--output", str(output)])
    data.main()
    found = json.loads(output.read_text())["over"]
    assert set(found) == {"fixed", "augmented"}
    assert all(len(side) == 2 for path in found.values() for side in path["seconds"].values())


def test_a_run_is_its_first_epoch_and_the_median_of_the_others() -> None:
    from data import run_seconds

    assert run_seconds([9.0, 1.0, 5.0, 2.0], 100) == 9.0 + 99 * 2.0


def test_the_cost_of_reading_and_scoring_masks_is_measured(tmp_path: Path, monkeypatch) -> None:
    import segmentation_data as bench

    for name, value in (("HEIGHT", 40), ("WIDTH", 48), ("SIDE", 32), ("MAP", 8)):
        monkeypatch.setattr(bench, name, value)
    milliseconds = bench.measure(tmp_path, 12)
    assert set(milliseconds) >= {"later epochs: kept bytes", "score a prediction"}
    assert all(value >= 0 for value in milliseconds.values())


def test_on_a_gpu_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    import json
    import time
    from functools import partial

    import gpu
    from step_time import DeviceLost, noted, write

    def good(figures, save):
        figures["x"] = 1

    def bad(figures, save):
        figures["failed"] = {}
        with noted(figures, "it"):
            raise RuntimeError("first line\nsecond")

    def lost(figures, save):
        raise DeviceLost("an illegal address")

    parts = {"bad": bad, "vit-b": good, "lost": lost, "loop": good}
    found = {"models": {}, "begun": []}
    path, end = tmp_path / "gpu.json", time.time() + 60
    assert gpu.run_all(found, parts, end, partial(write, found, path)) == gpu.LOST
    kept = json.loads(path.read_text())
    assert kept["bad"]["failed"] == {"it": "RuntimeError: first line"}
    assert kept["models"]["vit-b"] == {"x": 1} and kept["left_out"] == ["lost", "loop"]
    assert gpu.run_all(kept, parts, end, partial(write, kept, path)) == 0
    assert json.loads(path.read_text())["loop"] == {"x": 1} and kept["left_out"] == []
    late = {"models": {}, "begun": []}
    assert gpu.run_all(late, parts, time.time(), partial(write, late, path)) == 0
    assert late["left_out"] == list(parts)


def test_a_row_that_fails_is_noted_and_the_table_shows_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from argparse import Namespace

    import step_table
    import step_time
    from step_models import Case

    def build() -> nn.Module:
        return timm.create_model("test_vit", num_classes=3)

    def batch(device: str) -> dict[str, torch.Tensor]:
        return {"image": torch.randn(2, 3, 160, 160), "label": torch.tensor([0, 1])}

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["image"]), batch["label"])

    rows = ["full", "lora", "snella", "unknown"]
    found = {"rank": 8, "models": {"vit-b": {}}, "left_out": ["sam"]}
    figures = found["models"]["vit-b"]
    options = Namespace(device="cpu", repeats=1, seconds=1.0, profile=False)
    step_time.measure(Case("tiny", build, batch, loss), rows, options, figures)
    assert set(figures["eager"]) == {"full", "lora", "snella"}
    assert figures["failed"] == {"unknown": "KeyError: 'unknown'"}
    assert figures["memory_over_lora"]["lora"] == 1
    step_table.show(found)
    shown = capsys.readouterr().out
    assert "snella" in shown and "KeyError" in shown and "No time for sam" in shown
    step_table.plot(found["models"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()


def test_the_training_loop_and_the_plain_one_take_turns(tmp_path: Path, monkeypatch) -> None:
    import json

    import training_loop

    output = tmp_path / "loop.json"
    sizes = ["--arch", "test_vit", "--pixels", "160", "--images", "6", "--batch", "4"]
    sizes += ["--epochs", "3", "--rows", "snella-8", "--quick", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", ["training_loop.py", *sizes, "--output", str(output)])
    training_loop.main()
    found = json.loads(output.read_text())["loop"]
    assert not found["failed"]
    row = found["rows"]["snella-8"]
    assert {len(times) for times in row["epoch_seconds"].values()} == {3}
    assert row["repeats_exactly"] and row["over_plain"] > 0
