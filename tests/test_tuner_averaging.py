"""Averages of adapted models: parameters are averaged, budgets are those of the live model."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_tuner import IMAGES, LABELS, adapted, backbone, budgets, layers, logits, trainable
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn


def averaged(model: nn.Module, **settings: Any) -> tuple[nn.Module, Callable[[], None]]:
    average = AveragedModel(model, **settings)
    return average.module, lambda: average.update_parameters(model)


def timm_ema(kind: Any, model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    average = kind(model, decay=0.5)
    return average.module, lambda: average.update(model)


def handwritten(
    mean: Callable[[Any, Any], Any], model: nn.Module
) -> tuple[nn.Module, Callable[[], None]]:
    """An average of whatever is in the state, as a script computes it."""
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
        for old, new in pairs:
            old.copy_(mean(old, new))

    return average, update


WRAPPERS: dict[str, Callable[[nn.Module], tuple[nn.Module, Callable[[], None]]]] = {
    "parameters": lambda m: averaged(m),
    "buffers": lambda m: averaged(m, use_buffers=True),
    "EMA": lambda m: averaged(m, use_buffers=True, avg_fn=get_ema_avg_fn(0.5)),
    "EMA of many": lambda m: averaged(m, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "floats": lambda m: handwritten(lambda a, b: a.float().mul(0.5).add(b.float(), alpha=0.5), m),
    "stack": lambda m: handwritten(lambda a, b: torch.stack([a * 0.5, b * 0.5]).sum(0), m),
    "out": lambda m: handwritten(lambda a, b: torch.lerp(a, b, 0.5, out=a), m),
    "timm v2": lambda m: timm_ema(ModelEmaV2, m),
    "timm v3": lambda m: timm_ema(ModelEmaV3, m),
}


def train(model: PeftModel, after_step: Callable[[], None] = lambda: None) -> None:
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for epoch in range(4):
        model.on_epoch_start(epoch, 4)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
            optimizer.step()
            model.on_step_end()
            after_step()


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_averages_keep_integer_budgets(wrapper: Any) -> None:
    model = adapted(target_sparsity=0.7)
    average, update = wrapper(model)
    train(model, update)
    assert budgets(average) == budgets(model)
    for layer in layers(average):
        kept = (layer.get_delta_weight("default").view(layer.slices, -1) != 0).sum(1)
        assert kept.tolist() == layer.snella_budget["default"].tolist()
    assert not logits(average).equal(logits(model))
    assert layers(average)[0].snella_A["default"].is_floating_point()


def test_budgets_are_plain_integers_elsewhere() -> None:
    model = adapted()
    snapshot = copy.deepcopy(model)
    train(model)
    assert budgets(snapshot) != budgets(model), "a copy is a copy"
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(type(value) is torch.Tensor for value in state.values())
    snapshot.load_state_dict(state)
    assert logits(snapshot).equal(logits(model))
    moved = copy.deepcopy(model).double().float()
    assert budgets(moved) == budgets(model)
    assert logits(moved).equal(logits(model))


def test_an_average_of_the_parameters_alone_is_reported(tmp_path: Path) -> None:
    """As in many a training script: its budgets are those of the moment when it was copied."""
    model = adapted(target_sparsity=0.7)
    average = copy.deepcopy(model)

    def update() -> None:
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(parameter.data, 0.5)

    train(model, update)
    with pytest.warns(UserWarning, match=r"keeps .* not the .*never called for it.*buffers\(\)"):
        average.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match=r"keeps .* not the .*never called for it.*buffers\(\)"):
        copy.deepcopy(average).merge_and_unload()
    for mine, budget in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(budget)
    assert budgets(average) == budgets(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average.save_pretrained(str(tmp_path))
        copy.deepcopy(average).merge_and_unload()
        PeftModel.from_pretrained(backbone(), str(tmp_path)).save_pretrained(str(tmp_path))
