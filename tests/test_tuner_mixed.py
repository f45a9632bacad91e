"""Adapters of other methods around SNELLA's, and SNELLA's around theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from test_tuner import adapted, backbone, budgets, layers, logits, train, trainable
from torch import nn

from snella import SnellaConfig
from snella.errors import UserError

LORA = LoraConfig(r=2, target_modules=["qkv", "fc1"])


def both(method: Any = LORA) -> PeftModel:
    model = adapted(modules_to_save=None, target_sparsity=0.6)
    inject_adapter_in_model(method, model.get_base_model(), "lora")
    return model


def test_lora_around_snella(tmp_path: Path) -> None:
    """It trains with the hooks, is saved without LoRA, and merges with it."""
    model = both()
    train(model)
    total = sum(layer.slice_size * layer.slices for layer in layers(model))
    assert sum(budgets(model)) == int(0.4 * total)
    assert all(p.grad.abs().sum() > 0 for p in trainable(model))
    live = logits(model)
    model.save_pretrained(str(tmp_path))
    lora = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in lora:
        layer.enable_adapters(False)
    alone = logits(model)
    assert not alone.allclose(live, atol=1e-4)
    assert logits(PeftModel.from_pretrained(backbone(), str(tmp_path))).equal(alone)
    again = both()  # the same file, into layers that LoRA is around already
    set_peft_model_state_dict(again, load_file(tmp_path / "adapter_model.safetensors"))
    assert all(
        layer.snella_A["default"].equal(right.snella_A["default"])
        for layer, right in zip(layers(again), layers(model), strict=True)
    )
    for layer in lora:
        layer.enable_adapters(True)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), live)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), live)
    plain = model.merge_and_unload(safe_merge=True)
    assert not any(hasattr(module, "base_layer") for module in plain.modules())
    torch.testing.assert_close(logits(plain), live)


def test_in_a_model_of_transformers() -> None:
    from test_tuner_loops import classifier

    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def output(model: nn.Module) -> torch.Tensor:
        return model.eval()(images).logits

    model, plain = classifier(), output(classifier())
    model.add_adapter(SnellaConfig(rank=4, target_modules=["q_proj"]), "ours")
    first = output(model)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter(lora, "lora")
    second = output(model)
    model.set_adapter("ours")
    assert output(model).equal(first)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(".snella_" in name for name in names)
    model.set_adapter(["ours", "lora"])
    assert not output(model).equal(first) and not output(model).equal(second)
    model.disable_adapters()
    torch.testing.assert_close(output(model), plain)
    model.enable_adapters()
    model.delete_adapter("lora")
    model.set_adapter("ours")
    assert output(model).equal(first)


@pytest.mark.parametrize(
    "method",
    [
        LoHaConfig(r=2, target_modules=["qkv"]),
        IA3Config(target_modules=["qkv"], feedforward_modules=[]),
        LoraConfig(r=2, target_modules=["qkv"], use_dora=True),
    ],
    ids=["LoHa", "IA3", "DoRA"],
)
def test_what_is_no_sum_is_not_merged(method: Any) -> None:
    model = both(method)
    logits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UserError, match=r"'blocks.0.attn.qkv' also carries an adapter of peft"):
            call()
    assert not any(hasattr(module, "base_layer") for module in model.unload().modules())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapted().add_adapter("lora", LORA)
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(backbone(), SnellaConfig(), mixed=True)
    around = get_peft_model(backbone(), LORA)
    for model in (around, around.get_base_model()):
        with pytest.raises(UserError, match=r"qkv.*it carries an adapter of another method"):
            get_peft_model(model, SnellaConfig())
