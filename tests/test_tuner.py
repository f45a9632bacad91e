"""SNELLA through PEFT's public API: training, saving, merging, adapters, wrong usage."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from snella import SnellaConfig
from snella.errors import UserError
from snella.tuner import (
    SnellaLayer,
    convert_to_lora,
    load_training_state,
    on_epoch_start,
    on_step_end,
    training_state,
)

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(4) % 3


def backbone(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3
    )


def adapted(**settings: Any) -> PeftModel:
    model = backbone()
    torch.manual_seed(1)
    return get_peft_model(
        model, SnellaConfig(**{"rank": 4, "modules_to_save": ["head"]} | settings)
    )


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(
    model: nn.Module, epochs: int = 3, steps: int = 2, start: int = 0, optimizer: Any = None
) -> Any:
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2)
    model.train()
    for epoch in range(start, epochs):
        on_epoch_start(model, epoch, epochs, steps)
        for step in range(steps):
            optimizer.zero_grad()
            images = IMAGES.roll(epoch * steps + step, 0)
            labels = LABELS.roll(epoch * steps + step, 0)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            on_step_end(model)
    return optimizer


def budgets(model: nn.Module) -> list[int]:
    return [b for n, v in model.named_buffers() if "snella_budget" in n for b in v.tolist()]


def layers(model: nn.Module) -> list[SnellaLayer]:
    return [m for m in model.modules() if isinstance(m, SnellaLayer)]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IMAGES).clone()


SETTINGS = {
    "paper": {},
    "released": {"variant": "released"},
    "SNELL": {"allocation": False, "kernel": "piecewise-linear", "target_sparsity": 0.9},
    "KLoRA": {"allocation": False, "kernel": "piecewise-linear", "sparsify": "none"},
    "linear": {"kernel": "linear"},
    "sigmoid": {"kernel": "sigmoid"},
    "rbf": {"kernel": "rbf"},
    "rbf-normalised": {"kernel": "rbf-normalised"},
    "per step": {"interval": "step", "schedule": "linear"},
    "constant": {"schedule": "constant"},
    "magnitude": {"score": "magnitude"},
    "weight-magnitude": {"score": "weight-magnitude"},
    "kept": {"keep_merged": True},
    "dropout": {"dropout": 0.2, "drop_path": 0.2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_trains_saves_and_merges(settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**settings)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = logits(model)
    train(model)
    if 0 not in budgets(model):  # a matrix without budget gets no gradient
        assert all(p.grad.any() for p in trainable(model))
    assert all(p.equal(frozen[n]) for n, p in model.named_parameters() if n in frozen)
    after = logits(model)
    assert not after.allclose(before, atol=1e-3)
    model.save_pretrained(str(tmp_path))
    reloaded = PeftModel.from_pretrained(backbone(), str(tmp_path))
    assert logits(reloaded).equal(after)
    assert budgets(reloaded) == budgets(model)
    with model.disable_adapter():
        assert logits(model).equal(logits(backbone()))
    assert logits(model).equal(after)
    merged = model.merge_and_unload()
    assert type(merged) is VisionTransformer and not layers(merged)
    torch.testing.assert_close(logits(merged), after, rtol=1e-5, atol=1e-6)


def test_uniform_sparsity_and_exact_totals() -> None:
    model = adapted(allocation=False, target_sparsity=0.75)
    train(model)
    sizes = [layer.slice_size for layer in layers(model) for _ in range(layer.slices)]
    assert budgets(model) == [size // 4 for size in sizes]
    for name, layer in model.named_modules():
        if isinstance(layer, SnellaLayer):
            delta = layer.get_delta_weight("default").view(layer.slices, -1)
            assert (delta != 0).sum(1).tolist() == [layer.slice_size // 4] * layer.slices, name
    model = adapted(target_sparsity=0.6)
    train(model)
    assert sum(budgets(model)) == int(0.4 * sum(sizes)), "the last epoch trains at the target"


def test_fused_qkv_has_one_kernel_and_budget_per_part() -> None:
    model = adapted()
    qkv = model.base_model.model.blocks[0].attn.qkv
    assert qkv.snella_A["default"].shape == (3, 2, 24, 2)
    assert qkv.snella_B["default"].shape == (3, 2, 24, 2)
    assert qkv.snella_budget["default"].tolist() == [24 * 24] * 3
    assert qkv.snella_budget["default"].dtype == torch.int64


def test_import_of_the_package_is_light() -> None:
    script = "import snella, sys; assert 'torch' not in sys.modules; snella.__version__"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_training_is_deterministic() -> None:
    runs = []
    for _ in range(2):
        model = adapted(variant="released")
        torch.manual_seed(3)
        train(model)
        runs.append((logits(model), budgets(model)))
    assert runs[0][0].equal(runs[1][0]) and runs[0][1] == runs[1][1]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_resumed_training_is_bit_identical(variant: str) -> None:
    settings = {"variant": variant, "dropout": 0.0, "drop_path": 0.0}
    through = adapted(**settings)
    train(through, epochs=4)
    model = adapted(**settings)
    optimizer = train_part(model, range(0, 2))
    state = copy.deepcopy((model.state_dict(), training_state(model), optimizer.state_dict()))
    resumed = adapted(**settings)
    optimizer = torch.optim.AdamW(trainable(resumed), lr=1e-2)
    resumed.load_state_dict(state[0])
    load_training_state(resumed, state[1])
    optimizer.load_state_dict(state[2])
    train_part(resumed, range(2, 4), optimizer)
    assert logits(resumed).equal(logits(through))
    assert budgets(resumed) == budgets(through)


def train_part(model: nn.Module, epochs: range, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2)
    model.train()
    for epoch in epochs:
        on_epoch_start(model, epoch, 4)
        for step in range(2):
            optimizer.zero_grad()
            images, labels = IMAGES.roll(epoch * 2 + step, 0), LABELS.roll(epoch * 2 + step, 0)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            on_step_end(model)
    return optimizer


def test_several_adapters() -> None:
    model = adapted()
    train(model)
    first = logits(model)
    torch.manual_seed(5)
    model.add_adapter("second", SnellaConfig(rank=8, kernel="piecewise-linear"))
    model.set_adapter("second")
    train(model)
    second = logits(model)
    assert not second.allclose(first)
    model.set_adapter("default")
    assert logits(model).equal(first)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    with torch.enable_grad():
        torch.testing.assert_close(model(IMAGES).detach(), both, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="same fused_parts"):
        model.add_adapter("third", SnellaConfig(rank=8, fused_parts={}))
    model.base_model.set_adapter(["default", "second"])
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert logits(model).equal(first)


def test_merge_and_unmerge() -> None:
    model = adapted()
    train(model)
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="not merged"):
        layers(model)[0].unmerge()
    with torch.no_grad():
        layers(model)[0].snella_A["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)


def test_scaling() -> None:
    model = adapted()
    layer = layers(model)[0]
    delta = layer.get_delta_weight("default")
    layer.set_scale("default", 2.0)
    layer.scale_layer(0.25)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta / 2)
    x = torch.randn(2, 24)
    expected = layer.base_layer(x) + x @ delta.T / 2
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    layer(x).square().sum().backward()
    layer.unscale_layer(0.25)
    assert layer.scaling["default"] == 2.0
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def test_lora_export_states_its_error(tmp_path: Path) -> None:
    model = adapted()
    train(model)
    expected = logits(model)
    exact, rough = convert_to_lora(model, 24), convert_to_lora(model, 4)
    assert exact.error < 1e-5 < rough.error < 1
    assert len(rough.errors) == 8 and max(rough.errors.values()) >= rough.error
    layer = model.base_model.model.blocks[0].attn.proj
    singular = torch.linalg.svdvals(layer.get_delta_weight("default").double())
    best = (singular[4:].norm() / singular.norm()).item()
    assert rough.errors["base_model.model.blocks.0.attn.proj"] == pytest.approx(best, rel=1e-3)
    exact.save(tmp_path)
    lora = PeftModel.from_pretrained(backbone(), str(tmp_path))
    torch.testing.assert_close(logits(lora), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="no SNELLA adapter called 'other'"):
        convert_to_lora(model, 4, "other")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, {"variant": "released"}, {"compile": True}])
def test_no_step_waits_for_the_device(settings: dict[str, Any]) -> None:
    model = adapted(**settings).cuda().train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    images = IMAGES.cuda()
    on_epoch_start(model, 0, 4)
    for step in range(4):
        optimizer.zero_grad()
        if step > 1:  # the first steps read the budgets and compile
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(images).square().mean()
            loss.backward()
            optimizer.step()
            on_step_end(model)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_bfloat16_autocast_and_weights() -> None:
    reference = adapted()
    train(reference)
    exact = logits(reference)
    with torch.autocast("cpu", torch.bfloat16):
        kept = [(layer.get_delta_weight("default") != 0).sum() for layer in layers(reference)]
        assert sum(map(int, kept)) == sum(budgets(reference))
        torch.testing.assert_close(logits(reference).float(), exact, rtol=0.1, atol=0.1)
        reference.train()
        reference(IMAGES).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in trainable(reference))
    model = backbone().bfloat16()
    model = get_peft_model(model, SnellaConfig(rank=4))
    layer = layers(model)[0]
    assert layer.snella_A["default"].dtype == torch.float32
    assert layer.snella_budget["default"].dtype == torch.int64
    model(IMAGES.bfloat16()).float().square().sum().backward()
    assert all(p.grad.any() and p.grad.isfinite().all() for p in trainable(model))


def test_dropout_spares_the_layer_after_attention_only() -> None:
    rates = {layer.key: layer._dropout_rate("default") for layer in layers(adapted(dropout=0.1))}
    assert {k.rpartition(".")[2]: v for k, v in rates.items()} == {
        "qkv": 0.1,
        "proj": 0.0,
        "fc1": 0.1,
        "fc2": 0.1,
    }


def test_torch_compile() -> None:
    model = adapted(allocation=False)
    expected = logits(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-5, atol=1e-6)
    compiled.train()(IMAGES).square().sum().backward()
    assert all(p.grad.any() for p in trainable(model))


def test_inference_mode_then_training() -> None:
    model = adapted()
    with torch.inference_mode():
        first = model.eval()(IMAGES).clone()
    assert model(IMAGES).detach().allclose(first, atol=1e-6)
    model.requires_grad_(False)
    images = IMAGES.clone().requires_grad_()
    model(images).sum().backward()
    assert images.grad.any()


def test_writing_parameters_through_data_is_seen_after_a_hook() -> None:
    model = adapted(allocation=False)
    on_epoch_start(model, 0, 1)
    before = logits(model)
    for parameter in trainable(model):
        parameter.data.mul_(1.5)
    on_step_end(model)
    assert not logits(model).allclose(before, atol=1e-4)


def without_hooks(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        model.train()(IMAGES).square().sum().backward()
        optimizer.step()


def test_forgotten_hooks_are_an_error() -> None:
    with pytest.raises(UserError, match=r"on_epoch_start\(epoch, epochs\) before every epoch"):
        without_hooks(adapted())
    without_hooks(adapted(allocation=False))
    model = adapted()
    with pytest.raises(UserError, match="Call on_epoch_start"):
        model.on_step_end()
    model.on_epoch_start(0, 3)
    with pytest.raises(UserError, match="found no gradients"):
        model.on_step_end()
    model = adapted()
    model.on_epoch_start(0, 3)
    with pytest.raises(UserError, match="saw no optimizer step"):
        model.on_epoch_start(1, 3)
    with pytest.raises(UserError, match=r"epoch must lie in \[0, 3\)"):
        model.on_epoch_start(3, 3)
    with pytest.raises(UserError, match="steps_per_epoch"):
        adapted(interval="step").on_epoch_start(0, 3)


def test_a_dropped_step_is_reported() -> None:
    model = adapted()
    model.on_epoch_start(0, 3)
    model(IMAGES).sum().backward()
    layers(model)[0].snella_A["default"].grad[0] = float("inf")
    model.on_step_end()
    with pytest.warns(UserWarning, match=r"left 1 step\(s\) out of the importance scores"):
        model.on_epoch_start(1, 3)
    assert sum(budgets(model)) > 0


WRONG = [
    ({"rank": 5}, "rank 5 is not divisible by pieces 2"),
    ({"target_sparsity": 1.2}, r"target_sparsity must lie in \[0, 1\], got 1.2"),
    ({"initial_sparsity": -0.1}, r"initial_sparsity must lie in \[0, 1\]"),
    ({"kernel": "mixk"}, "Unknown kernel 'mixk'. Did you mean 'mix-k'"),
    ({"schedule": "cubical"}, "Did you mean 'cubic'"),
    ({"variant": "released code"}, "Did you mean 'released'"),
    ({"sparsify": "hard"}, "Unknown sparsify"),
    ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ({"fused_parts": {"qkv": 0}}, "must be a positive integer"),
    ({"sparsify": "none"}, "also set allocation=False"),
    ({"layers_pattern": "blocks"}, "needs layers_to_transform"),
    ({"fused_parts": {"qkv": 5}}, "cannot cut into 5 equal parts"),
    ({"target_modules": ["norm1"]}, r"'blocks.0.norm1', LayerNorm: it is none of.*exclude_modules"),
    ({"target_modules": ["nothing"]}, "No modules were targeted for adaptation"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(s) for s, _ in WRONG])
def test_wrong_usage(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        adapted(**settings)


def test_nothing_to_adapt() -> None:
    with pytest.raises(UserError, match="No linear layers to adapt were recognised in Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), SnellaConfig())
    with pytest.raises(UserError, match="no SNELLA layer"):
        on_epoch_start(nn.Linear(3, 3), 0, 1)


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Iterator[Any]:
    from transformers import TrainingArguments

    yield TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )


def test_trainer_callback(quiet_trainer: Any) -> None:
    from transformers import Trainer, ViTConfig, ViTForImageClassification

    from snella import SnellaCallback

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    settings = SnellaConfig(rank=4, modules_to_save=["classifier"], target_sparsity=0.5)
    model = get_peft_model(ViTForImageClassification(config), settings)
    data = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(IMAGES, LABELS, strict=True)
    ]
    Trainer(model, quiet_trainer, train_dataset=data, callbacks=[SnellaCallback()]).train()
    sizes = [layer.slice_size for layer in layers(model)]
    assert sum(budgets(model)) == sum(sizes) // 2
