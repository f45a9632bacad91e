"""What PEFT offers its users works with SNELLA, or is refused in one line; configuration faults."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from test_tuner import IMAGES, adapted, backbone, budgets, layers, logits, train
from torch import nn

from snella import SnellaConfig, save_adapter
from snella.errors import UserError

FRESH = """
import snella
from peft import PeftConfig, PeftModel, get_model_status
import torch
from timm.models.vision_transformer import VisionTransformer
config = PeftConfig.from_pretrained({folder!r})
assert type(config).__name__ == "SnellaConfig", config
sizes = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3)
model = VisionTransformer(**sizes)
saved = torch.load({folder!r} + "/check.pt", weights_only=True)
model.load_state_dict(saved["model"])
model = PeftModel.from_pretrained(model, {folder!r}).eval()
assert get_model_status(model).peft_types == {{"default": "SNELLA"}}
images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
with torch.no_grad():
    assert model(images).equal(saved["expected"])
"""


def test_a_fresh_process_needs_only_the_import(tmp_path: Path) -> None:
    """With SNELLA first; here, as in most programs, PEFT was first."""
    model = adapted()
    train(model)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    torch.save({"model": backbone().state_dict(), "expected": expected}, tmp_path / "check.pt")
    script = FRESH.format(folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    card = (tmp_path / "README.md").read_text()
    assert "import snella" in card and card.count("## Loading") == 1


def test_registered_as_peft_registers_its_own() -> None:
    assert PeftType("SNELLA") is PeftType.SNELLA and PeftType.SNELLA in list(PeftType)
    model = adapted()
    assert get_model_status(model).peft_types == {"default": "SNELLA"}
    assert {status.name.rpartition(".")[2] for status in get_layer_status(model)} >= {"qkv", "fc1"}


def test_one_configuration_for_several_models() -> None:
    config = SnellaConfig(rank=4, layers_to_transform=[1])
    first = get_peft_model(backbone(), config)
    assert config.target_modules is None
    assert all(layer.key.startswith("blocks.1.") for layer in layers(first)) and layers(first)
    blocks = [nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2)]
    other = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
    assert [layer.key for layer in layers(get_peft_model(other, config))] == ["layers.1.q"]
    everywhere = SnellaConfig(rank=4, target_modules="all-linear")
    get_peft_model(backbone(), everywhere)
    assert everywhere.target_modules == "all-linear"


SELECTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "all-linear": ({"target_modules": "all-linear"}, 9),
    "all-linear but a saved head": (
        {"target_modules": "all-linear", "modules_to_save": ["head"]},
        8,
    ),
    "regex": ({"target_modules": r".*blocks\.0\..*fc\d"}, 2),
    "excluded": ({"exclude_modules": ["fc1"]}, 6),
    "layers": ({"layers_to_transform": 0}, 4),
    "layers of a list": ({"target_modules": ["fc1"], "layers_to_transform": [0]}, 1),
    "pattern": (
        {"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        1,
    ),
}


@pytest.mark.parametrize(("settings", "count"), SELECTIONS.values(), ids=SELECTIONS)
def test_selections(settings: dict[str, Any], count: int) -> None:
    model = get_peft_model(backbone(), SnellaConfig(rank=4, allocation=False, **settings))
    assert len(layers(model)) == count
    model(IMAGES).square().sum().backward()


def test_ranks_by_pattern() -> None:
    model = adapted(rank_pattern={"fc1": 8, r"blocks\.1\.attn\.proj": 2})
    ranks = {layer.key: layer.snella_A["default"].shape[-1] * 2 for layer in layers(model)}
    assert ranks["blocks.0.mlp.fc1"] == 8 and ranks["blocks.0.attn.proj"] == 4
    assert ranks["blocks.1.attn.proj"] == 2
    with pytest.raises(UserError, match="rank 3 is not divisible"):
        SnellaConfig(rank_pattern={"fc1": 3})


@pytest.mark.parametrize(
    ("field", "words"),
    [("r", "called rank"), ("lora_alpha", "has no alpha"), ("bias", "modules_to_save"),
     ("target_sparsty", "Did you mean 'target_sparsity'")],
)  # fmt: skip
def test_fields_of_other_methods_are_refused(field: str, words: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{field}'.*{words}"):
        SnellaConfig(**{field: 1})


def test_files_of_later_versions_load(tmp_path: Path) -> None:
    SnellaConfig(rank=4).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 4, "novelty": 1'))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments.*novelty"):
        assert PeftConfig.from_pretrained(str(tmp_path)).rank == 4


def test_inference_mode() -> None:
    model = adapted(inference_mode=True)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "snella" in n)


def test_the_identity_start() -> None:
    model = adapted(init_weights=True, target_sparsity=0.5)
    expected = logits(backbone())
    assert logits(model).equal(expected) or torch.allclose(logits(model), expected, atol=1e-6)
    train(model, epochs=4, steps=4)
    assert all(p.grad.any() for n, p in model.named_parameters() if "snella" in n)
    after = logits(model)
    assert not after.allclose(expected, atol=1e-3)
    with torch.enable_grad():
        torch.testing.assert_close(model(IMAGES).detach(), after, rtol=1e-4, atol=1e-5)
    for layer in layers(model):
        kept = (layer.get_delta_weight("default").view(layer.slices, -1) != 0).sum(1)
        assert kept.tolist() == layer.snella_budget["default"].tolist()
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=1e-5)


def test_adapters_come_and_go(tmp_path: Path) -> None:
    model = adapted(modules_to_save=None)
    train(model)
    first = logits(model)
    model.save_pretrained(str(tmp_path))
    model.load_adapter(str(tmp_path), "again", low_cpu_mem_usage=True)
    model.set_adapter("again")
    assert logits(model).equal(first)
    model.delete_adapter("default")
    assert logits(model).equal(first)
    assert next(status.available_adapters for status in get_layer_status(model)) == ["again"]
    plain = model.unload()
    assert logits(plain).equal(logits(backbone()))


def test_what_is_not_offered_is_refused_in_one_line(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    model = adapted()
    model.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="no add_weighted_adapter") as error:
        model.add_weighted_adapter(["default"], [0.5], "sum")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no batches of mixed adapters"):
        model.eval()(IMAGES, adapter_names=["default"] * 4)
    with pytest.raises(ValueError, match=r"(?i)hotswapping only supports"):
        hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(ValueError, match=r"(?i)not compatible with the `PeftMixedModel`"):
        get_peft_model(backbone(), SnellaConfig(), mixed=True)


def test_adapters_of_models_adapted_in_place(tmp_path: Path) -> None:
    model = inject_adapter_in_model(SnellaConfig(rank=4, allocation=False), backbone(), "mine")
    expected = logits(model)
    save_adapter(model, tmp_path, "mine")
    assert logits(PeftModel.from_pretrained(backbone(), str(tmp_path))).equal(expected)
    with pytest.raises(UserError, match="no SNELLA adapter called 'other'"):
        save_adapter(model, tmp_path, "other")


def test_diffusers_does_not_write_it_as_lora(tmp_path: Path) -> None:
    from peft import LoraConfig
    from test_tuner_models import diffusion_transformer

    model, _ = diffusion_transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")
    model.add_adapter(SnellaConfig(rank=4, allocation=False, target_modules=["to_k"]), "snella")
    with pytest.raises(UserError, match="a LoRA file cannot hold"):
        model.save_lora_adapter(str(tmp_path), "snella")
    model.save_lora_adapter(str(tmp_path), "lora")
    save_adapter(copy.deepcopy(model), tmp_path / "snella", "snella")
    assert (tmp_path / "snella" / "adapter_model.safetensors").is_file()


def test_the_released_method_trains_the_class_token() -> None:
    from snella.methods.base import build_method

    file = Path(__file__).parents[1] / "baselines" / "snella.py"
    for variant in ("paper", "released"):
        method = build_method(file, {"variant": variant})
        model = backbone()
        model.requires_grad_(False)
        method.adapt(model)
        assert model.cls_token.requires_grad == (variant == "released")


def test_budgets_after_a_move_to_another_device_type() -> None:
    model = adapted().to("meta")
    assert layers(model)[0].snella_A["default"].is_meta
    assert budgets(adapted().half()) == budgets(adapted())
