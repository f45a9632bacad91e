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
