"""LoRA as a starting point of SNELLA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_tuner import IMAGES, backbone, logits
from torch import nn

from snella import SnellaConfig, convert_from_lora
from snella.errors import UserError


def lora_model() -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(backbone(), LoraConfig(r=2, target_modules=["proj", "fc1"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


# Largest error that each may have.
STARTS: dict[str, tuple[dict[str, Any], float]] = {
    "default": ({}, 0.45),
    "high rank": ({"rank": 48}, 0.06),
    "released": ({"rank": 32, "variant": "released", "initial_sparsity": 0.0}, 0.2),
    "linear": ({"rank": 16, "kernel": "linear"}, 0.2),
    "KLoRA": (
        {"rank": 8, "kernel": "piecewise-linear", "sparsify": "none", "allocation": False},
        0.01,
    ),
}


@pytest.mark.parametrize(("settings", "bound"), STARTS.values(), ids=STARTS)
def test_the_error_is_stated_and_true(settings: dict[str, Any], bound: float) -> None:
    lora = lora_model()
    expected, plain = logits(lora), logits(backbone())
    deltas = {
        name: module.get_delta_weight("default").detach().flatten(1)
        for name, module in lora.get_base_model().named_modules()
        if "LoraLayer" in [c.__name__ for c in type(module).__mro__] and "default" in module.lora_A
    }
    config = SnellaConfig(**{"rank": 16} | settings)
    result = convert_from_lora(lora, config, steps=50)
    assert result.error < bound
    lost = total = 0.0
    for name, delta in deltas.items():
        layer = result.model.get_base_model().get_submodule(name)
        difference = (layer.get_delta_weight("default") - delta).square().sum()
        assert result.errors[name] == pytest.approx(float(difference / delta.square().sum()) ** 0.5)
        lost, total = lost + float(difference), total + float(delta.square().sum())
    assert result.error == pytest.approx((lost / total) ** 0.5)
    assert (logits(result.model) - expected).norm() < (plain - expected).norm()
    result.model.train()(IMAGES).square().sum().backward()
    for name, parameter in result.model.named_parameters():
        if parameter.requires_grad and "scalars" not in name:
            assert parameter.grad.any(), name
    assert config.target_modules is None


def test_what_has_no_start_is_refused() -> None:
    with pytest.raises(UserError, match="no LoRA adapter called 'other'"):
        convert_from_lora(lora_model(), adapter_name="other")
    with pytest.raises(UserError, match=r"'rbf' .*has no start near a LoRA adapter"):
        convert_from_lora(lora_model(), SnellaConfig(kernel="rbf"))
