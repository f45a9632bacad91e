"""Whatever writes to a parameter, and however: the next forward uses what is there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from snella import SnellaConfig
from snella.tuner import SnellaLayer
from snella.tuner.fold import fingerprint

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3
    )
    settings = {"rank": 4, "allocation": False, "target_sparsity": 0.9} | settings
    return get_peft_model(model, SnellaConfig(**settings))


def layers(model: nn.Module) -> list[SnellaLayer]:
    return [module for module in model.modules() if isinstance(module, SnellaLayer)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def evaluate(model: nn.Module) -> Tensor:
    return model.eval()(IMAGES)


def from_scratch(model: nn.Module) -> Tensor:
    """The outputs of a copy that has never been called."""
    other = adapted()
    other.load_state_dict(model.state_dict())
    return evaluate(other)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW, loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "Adagrad, fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_seen(optimizer: str) -> None:
    model = adapted()
    steps = OPTIMIZERS[optimizer](trained(model))
    evaluate(model)  # from here on there are folded weights
    for _ in range(3):
        steps.zero_grad()
        model.train()(IMAGES).square().sum().backward()
        steps.step()
        with torch.no_grad():
            for layer in layers(model):
                delta = layer.get_delta_weight("default")
                kept = [int((part != 0).sum()) for part in delta.chunk(layer.slices)]
                assert kept == layer.snella_budget["default"].tolist()
        torch.testing.assert_close(evaluate(model), from_scratch(model), rtol=0, atol=0)
        # Without a graph, a training forward, as of checkpointing, computes the same.
        with torch.no_grad():
            torch.testing.assert_close(model.train()(IMAGES), evaluate(model))


def exchange(model: nn.Module, write: Callable[[Tensor, Tensor], Any]) -> None:
    for parameter in trained(model):
        write(parameter, parameter.detach() * 1.5)


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    exchange(model, lambda p, value: p.copy_(value))


def by_data(model: nn.Module) -> None:
    exchange(model, lambda p, value: p.data.copy_(value))


def replaced_data(model: nn.Module) -> None:
    exchange(model, lambda p, value: setattr(p, "data", value))


def by_numpy(model: nn.Module) -> None:
    for parameter in trained(model):
        parameter.detach().numpy()[...] *= 1.5


def loaded(model: nn.Module) -> None:
    state = {name: value * 1.5 for name, value in model.state_dict().items() if "snella_A" in name}
    model.load_state_dict(state, strict=False)


def foreach(model: nn.Module) -> None:
    torch._foreach_mul_([p.data for p in trained(model)], 1.5)


@torch.no_grad()
def other_storage(model: nn.Module) -> None:
    exchange(model, lambda p, value: p.set_(value))


def swapped(model: nn.Module) -> None:
    exchange(model, lambda p, value: torch.utils.swap_tensors(p, nn.Parameter(value)))


def one_vector(model: nn.Module) -> None:
    """Every parameter a stretch of the same memory, at an odd place."""
    vector = nn.utils.parameters_to_vector(trained(model)).detach() * 1.5
    nn.utils.vector_to_parameters(torch.cat([torch.zeros(1), vector])[1:], trained(model))


def assigned(model: nn.Module) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {name: value * 1.5 for name, value in state.items() if "snella_A" in name}
    model.load_state_dict(state, assign=True)


def one_entry(model: nn.Module) -> None:
    layers(model)[0].snella_A["default"].data.view(-1)[5] += 1


def base_weight(model: nn.Module) -> None:
    layers(model)[0].base_layer.weight.data[3, 4] += 1


def base_rows(model: nn.Module) -> None:
    weight = layers(model)[0].base_layer.weight
    weight.data[[0, 1]] = weight.data[[1, 0]]


def budgets(model: nn.Module) -> None:
    for layer in layers(model):
        layer.snella_budget["default"].data.fill_(3)


def scaled(model: nn.Module) -> None:
    for layer in layers(model):
        layer.set_scale("default", 0.3)


CHANGES = [
    *(in_place, by_data, replaced_data, by_numpy, loaded, one_entry),
    *(foreach, other_storage, swapped, one_vector, assigned),
    *(base_weight, base_rows, budgets, scaled),
]


@pytest.mark.parametrize("compiled", [None, False], ids=["loops", "tiles"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_write_is_seen(change: Callable[[nn.Module], None], compiled: bool | None) -> None:
    model = adapted(compile=compiled)
    before = evaluate(model).clone()
    assert evaluate(model).equal(before)
    change(model)
    after = evaluate(model)
    assert not after.allclose(before, atol=1e-6)
    expected = copy.deepcopy(model)
    for layer in layers(expected):
        layer._folded.clear()
    torch.testing.assert_close(after, evaluate(expected), rtol=0, atol=0)
    torch.testing.assert_close(after, model.train()(IMAGES), rtol=1e-4, atol=1e-5)


def test_averages_swapped_in_and_out() -> None:
    model = adapted()
    average = [p.detach().clone() for p in trained(model)]
    steps = torch.optim.AdamW(trained(model), lr=0.1, fused=True)
    model.train()(IMAGES).square().sum().backward()
    steps.step()
    after = evaluate(model).clone()
    own = [p.detach().clone() for p in trained(model)]
    for p, value in zip(trained(model), average, strict=True):  # diffusers' EMAModel.copy_to
        p.data.copy_(value)
    averaged = evaluate(model)
    torch.testing.assert_close(averaged, from_scratch(model), rtol=0, atol=0)
    for p, value in zip(trained(model), own, strict=True):  # EMAModel.restore
        p.data.copy_(value)
    assert evaluate(model).equal(after) and not averaged.allclose(after, atol=1e-4)


def test_several_adapters() -> None:
    model = adapted()
    model.add_adapter("second", SnellaConfig(rank=2, allocation=False, target_sparsity=0.5))
    outputs = []
    for names in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(names)
        outputs.append(evaluate(model).clone())
        for layer in layers(model):
            layer.snella_A["second"].data.mul_(1.5)
        changed = not evaluate(model).allclose(outputs[-1], atol=1e-6)
        assert changed == ("second" in names), names
    model.base_model.set_adapter("default")
    assert evaluate(model).equal(outputs[0])


def test_backward_keeps_the_entries_of_its_forward() -> None:
    """Two forwards before the first backward, with other budgets in between."""
    x = torch.randn(5, 24)
    gradients = []
    for between in (False, True):
        layer = layers(adapted())[0].train()
        y = layer(x)
        if between:
            layer.set_budget("default", [3] * layer.slices)
            layer(x)
        y.square().sum().backward()
        gradients.append(layer.snella_A["default"].grad)
    assert gradients[0].equal(gradients[1])


# Edits that a sum over neighbours may not tell: of signs in pairs, and of the order.
EDITS: list[Callable[[Tensor], Any]] = [
    lambda w: w[0, :2].neg_(),
    lambda w: w[0, 1:4:2].neg_(),
    lambda w: w[0, 3:8:4].neg_(),
    lambda w: w[5].neg_(),
    lambda w: w[:, 1].neg_(),
    lambda w: w[:8, :8].neg_(),
    lambda w: w[3].copy_(w[3].roll(8)),
    lambda w: w[:, 1].copy_(w[:, 1].roll(1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprints_tell_weights_apart(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((7, 9), (640, 96), (96, 1024), (20_000, 2)):
        weight = torch.randn(shape, dtype=dtype)
        expected = fingerprint(weight)
        assert fingerprint(weight.clone()).equal(expected)
        shifted = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(shape)
        assert fingerprint(shifted).equal(expected)
        for other in (weight.flip(0), weight.flip(1), weight * 2, -weight):
            assert not fingerprint(other).equal(expected)
        for edit in EDITS if shape == (640, 96) else ():
            other = weight.clone()
            edit(other)
            assert not fingerprint(other).equal(expected)
        for place in range(0, weight.numel(), weight.numel() // 20):
            other = weight.clone()
            other.view(-1)[place] += 1
            assert not fingerprint(other).equal(expected)
