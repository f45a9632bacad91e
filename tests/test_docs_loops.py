"""Every example of docs/snella_in_your_loop.md runs, and ends at the sparsity asked for."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "snella_in_your_loop.md"
EXAMPLES = dict(
    re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.M | re.S)
)


def test_the_page_has_its_examples() -> None:
    assert len(EXAMPLES) == 6


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snella.tuner import SnellaLayer

    if name == "Lightning":
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*SNELLA.*")
        exec(compile(EXAMPLES[name], name, "exec"), space)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    model = space.get("transformer", space.get("model"))
    layers = [m for m in model.modules() if isinstance(m, SnellaLayer)]
    if layers:  # timm's example unloads them
        kept = sum(sum(layer.snella_budget["default"].tolist()) for layer in layers)
        assert kept == int(0.3 * sum(layer.slice_size * layer.slices for layer in layers))


def test_lightning_resumes_exactly_in_mid_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)  # Lightning writes its last checkpoint where it is called
    classes, _, training = EXAMPLES["Lightning"].partition("dataset = ")
    space: dict[str, Any] = {}
    exec(classes, space)
    every = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1
    )  # two steps an epoch
    training = "dataset = " + training.replace("[Hooks()]", "[Hooks(), *others]")
    # Batches alike, as the data loader begins the epoch anew.
    training = training.replace("torch.randn(", "torch.ones(").replace("randint(3, ", "randint(1, ")
    states = []
    for others, checkpoint in (([every], None), ([], tmp_path / "step=3.ckpt")):
        torch.manual_seed(0)
        fit = training.replace("loader)\nmodel.save", "loader, ckpt_path=checkpoint)\nmodel.save")
        space |= {"others": others, "checkpoint": checkpoint}
        exec(fit.replace('"adapter"', f"{str(tmp_path / 'adapter')!r}"), space)
        assert space["trainer"].global_step == 6
        states.append(space["model"].state_dict())
    assert all(value.equal(states[1][name]) for name, value in states[0].items())
