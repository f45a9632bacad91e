"""What happens within one training step, in the loops of others: the numbers stay right."""

from __future__ import annotations

import copy
import importlib
import threading
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_tuner import IMAGES, adapted, layers, logits, train, trainable
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snella.errors import UserError

OTHERS = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
KINDS = {
    "loops": {},
    "tiles": {"compile": False},
    "kept": {"keep_merged": True},
    "gate": {"init_weights": True},
}


def moved(**settings: Any) -> PeftModel:
    """An adapter as if it had been trained."""
    model = adapted(**settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in trainable(model)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_several_forwards_before_one_backward(settings: dict[str, Any]) -> None:
    """Two views of a batch, and passes of a teacher or a sampler between them."""
    model = moved(**settings).train()
    model(IMAGES).square().mean().backward()
    model(OTHERS).square().mean().backward()
    expected = gradients(model)
    first = model(IMAGES)
    model.eval()
    with torch.no_grad():
        model(OTHERS)
    with torch.inference_mode():
        model(OTHERS)
    with model.disable_adapter(), torch.no_grad():
        model(OTHERS)
    second = model.train()(OTHERS)
    with torch.no_grad():
        model(IMAGES)
    (first.square().mean() + second.square().mean()).backward()
    for found, right in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("training", [True, False])
def test_the_backbone_trains_beside_a_frozen_adapter(training: bool) -> None:
    model = moved().train(training).requires_grad_(True)
    weight = layers(model)[0].base_layer.weight
    model(IMAGES).square().mean().backward()
    expected = weight.grad.clone()
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("snella_" not in name)
    model(IMAGES).square().mean().backward()
    torch.testing.assert_close(weight.grad, expected)


def test_a_gate_alone_trains() -> None:
    model = moved(init_weights=True).eval().requires_grad_(False)
    gate = layers(model)[0].snella_gate["default"].requires_grad_(True)
    model(IMAGES).square().mean().backward()
    assert gate.grad is not None and gate.grad.abs().sum() > 0


def test_double_precision_stays_under_autocast() -> None:
    """As torch's own layers do; others compute in the type of autocast."""
    layer = layers(moved().double())[0]
    x = torch.randn(3, 24, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).equal(expected)
        assert layer.float()(x.float()).dtype == torch.bfloat16


def test_called_with_other_parameters() -> None:
    """``torch.func.functional_call``, also with parameters that depend on others."""
    model = moved()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter *= 1.3 if "snella_" in name else 1.0
    factor = torch.tensor(1.3, requires_grad=True)
    state = {n: p * factor if "snella_" in n else p for n, p in model.named_parameters()}
    for training in (True, False):
        expected = other.train(training)(IMAGES).detach()
        output = torch.func.functional_call(model.train(training), state, IMAGES)
        torch.testing.assert_close(output.detach(), expected)
        with torch.no_grad():
            for _ in range(2):
                again = torch.func.functional_call(model, state, IMAGES)
                torch.testing.assert_close(again, expected)
    output.square().mean().backward()
    assert factor.grad is not None and factor.grad.abs() > 0


def test_parameters_are_swapped_on_conversion() -> None:
    """``torch.__future__.set_swap_module_params_on_conversion``, in the middle of training."""
    model = adapted()
    train(model, epochs=2)
    model.zero_grad()
    expected = logits(model).double()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        with torch.no_grad():
            torch.testing.assert_close(
                model.eval()(IMAGES.double()), expected, rtol=1e-3, atol=1e-4
            )
        train(model.float(), start=2)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def in_threads(models: list[nn.Module], batches: list[Tensor]) -> Tensor:
    """As ``torch.nn.parallel.parallel_apply``, which wants devices."""
    outputs: list[Any] = [None] * len(models)
    recording = torch.is_grad_enabled()

    def work(i: int) -> None:
        with torch.set_grad_enabled(recording):
            outputs[i] = models[i](batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(outputs)


def test_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replicas of ``nn.DataParallel``, made on one CPU."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    model = moved().train()
    model(IMAGES).square().mean().backward()
    expected = gradients(model)
    update = torch.optim.SGD(trainable(model), lr=1e-3)
    model.on_epoch_start(0, 2)
    output = in_threads(replicate.replicate(model, [0, 1]), list(IMAGES.chunk(2)))
    output.square().mean().backward()
    update.step()
    model.on_step_end()
    for found, right in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, right)
    live = logits(model)
    with torch.no_grad():
        output = in_threads(replicate.replicate(model, [0, 1], True), list(IMAGES.chunk(2)))
    torch.testing.assert_close(output, live)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_weight_that_came_under_a_parametrization_takes_no_update_in() -> None:
    model = moved()
    expected = logits(model)
    parametrize.register_parametrization(layers(model)[0].base_layer, "weight", Halved())
    torch.testing.assert_close(logits(model), expected)
    with pytest.raises(UserError, match=r"qkv: its weight has come under a parametrization"):
        model.merge_adapter()
