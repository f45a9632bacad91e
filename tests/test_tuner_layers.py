"""Layers other than nn.Linear: the update is on the layer's own matrix, in every mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snella import SnellaConfig, convert_to_lora
from snella.errors import UserError
from snella.tuner import SnellaLayer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Quantised(nn.Linear):
    """Eight bits by rows, as a quantisation that PEFT knows would keep them."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (self.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


IDS = torch.arange(6).view(2, 3)
# name: the layer, its input, the matrix's shape (out, in), layers adapted
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[int, int], int]] = {
    "Conv1D": (lambda: Conv1D(6, 8), draw(2, 3, 8), (6, 8), 1),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), draw(2, 4, 8), (6, 12), 1),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), draw(2, 4, 8, 8), (6, 36), 1),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), draw(2, 4, 8, 8), (6, 18), 1),
    "Conv3d": (lambda: nn.Conv3d(2, 6, 2), draw(2, 2, 4, 4, 4), (6, 16), 1),
    "embedding": (lambda: nn.Embedding(10, 6), IDS, (6, 10), 1),
    "attention": (Attention, draw(2, 3, 8), (24, 8), 2),
}


@pytest.mark.parametrize("start", [False, True], ids=["paper", "identity"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:The module around")
def test_layers(name: str, dropout: float, start: bool) -> None:
    make, x, shape, count = LAYERS[name]
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": make()})
    target = "inner" if name == "attention" else "layer"
    config = SnellaConfig(
        rank=4, allocation=False, target_sparsity=0.4, target_modules=[target],
        dropout=dropout, drop_path=dropout, init_weights=start,
    )  # fmt: skip
    plain = copy.deepcopy(base)["layer"](x)
    model = get_peft_model(base, config)
    run = lambda m: m.get_base_model()["layer"](x)  # noqa: E731
    found = [m for m in model.modules() if isinstance(m, SnellaLayer)]
    assert len(found) == count
    assert found[0].get_delta_weight("default").shape == shape
    kept = (found[0].get_delta_weight("default") != 0).view(found[0].slices, -1).sum(1)
    if not start:
        assert kept.tolist() == found[0].snella_budget["default"].tolist()
    for step in range(3):
        run(model.train()).square().sum().backward()
        if step == 2:
            assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 1e-2 * p.grad / (p.grad.norm() + 1e-9)
                    p.grad = None
    with torch.enable_grad():
        expected = run(model.eval()).detach()
    assert not expected.allclose(plain, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(run(model), plain)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():  # unmerges, all parts of an attention
            torch.testing.assert_close(run(model), plain, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload()
        assert not any(isinstance(m, SnellaLayer) for m in merged.modules())
        torch.testing.assert_close(merged["layer"](x), expected, rtol=1e-4, atol=1e-5)


def test_attention_takes_several_adapters_and_respects_exclusions() -> None:
    make = lambda: nn.ModuleDict({"layer": Attention()})  # noqa: E731
    settings: dict[str, Any] = {"rank": 4, "allocation": False, "target_modules": ["inner"]}
    model = get_peft_model(make(), SnellaConfig(**settings))
    model.add_adapter("second", SnellaConfig(**settings))
    model.set_adapter("second")
    model.get_base_model()["layer"](draw(2, 3, 8)).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("second" in name), name
    model = get_peft_model(make(), SnellaConfig(**settings, exclude_modules=["out_proj"]))
    assert len([m for m in model.modules() if isinstance(m, SnellaLayer)]) == 1


@pytest.mark.parametrize("name", ["Conv1D", "Conv1d", "Conv2d", "Conv3d", "embedding"])
def test_lora_export_of_every_kind_of_layer(name: str, tmp_path: Path) -> None:
    """PEFT loads the export as LoRA of the same layer; the stated error is what is lost."""
    make, x, (outputs, inputs), _ = LAYERS[name]
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": make(), "extra": nn.Linear(2, 2)})
    fresh = copy.deepcopy(base)
    config = SnellaConfig(
        rank=4, allocation=False, target_modules=["layer"], modules_to_save=["extra"]
    )
    model = get_peft_model(base, config)
    layer = model.get_base_model()["layer"]
    with torch.no_grad():
        layer.snella_A["default"] *= 30
        model.get_base_model()["extra"].modules_to_save["default"].weight.fill_(7)
    delta, expected = layer.get_delta_weight("default").detach(), layer(x)
    singular = torch.linalg.svdvals(delta.double())
    rough, exact = convert_to_lora(model, 2), convert_to_lora(model, 99)
    assert rough.error == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-4)
    assert exact.error < 1e-6 and exact.config.r == min(outputs, inputs)
    exact.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora = PeftModel.from_pretrained(fresh, str(tmp_path)).get_base_model()
    torch.testing.assert_close(lora["layer"](x), expected, rtol=1e-4, atol=1e-5)
    assert lora["extra"].modules_to_save["default"].weight.eq(7).all()


def test_what_lora_cannot_hold_is_not_exported() -> None:
    for layer, reason in [(nn.Conv2d(4, 6, 3, groups=2), "knows no groups"),
                          (nn.MultiheadAttention(8, 2), "are one parameter")]:  # fmt: skip
        model = nn.ModuleDict({"layer": layer})
        model = get_peft_model(model, SnellaConfig(rank=4, target_modules=["layer"]))
        with pytest.raises(UserError, match=rf"'base_model.model.layer'.*{reason}"):
            convert_to_lora(model, 2)
    for rank in (0, 1.5, -1):
        with pytest.raises(UserError, match="rank is a whole number from 1"):
            convert_to_lora(model, rank)


def test_unknown_quantisations_are_refused() -> None:
    with pytest.raises(UserError, match="int8, by a quantisation that PEFT does not know"):
        get_peft_model(
            nn.ModuleDict({"q": Quantised()}), SnellaConfig(rank=4, target_modules=["q"])
        )
    with pytest.raises(UserError, match="changes its own weight"):
        get_peft_model(
            nn.ModuleDict({"q": nn.Embedding(4, 4, max_norm=1.0)}),
            SnellaConfig(rank=4, target_modules=["q"]),
        )


def test_quantised_layers_keep_the_update_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with bitsandbytes and others whose weights PEFT can read and write."""
    from peft.utils.quantization_utils import QuantizationBackend

    from snella.tuner import layers

    class Rows(QuantizationBackend):
        layer_type = "linear"
        backend_name = "rows"
        supports_merge = True

        def get_base_weight(self, base_layer: nn.Module) -> Tensor:
            return base_layer.weight * base_layer.scale

        def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
            base = peft_layer.get_base_layer()
            base.scale = weight_data.abs().amax(1, keepdim=True) / 127
            base.weight.data = (weight_data / base.scale).round().to(torch.int8)

    monkeypatch.setattr(layers, "resolve_quantization_backend", lambda module, **_: Rows())
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": Quantised()})
    x = draw(3, 8)
    plain = model["q"](x)
    model = get_peft_model(model, SnellaConfig(rank=4, allocation=False, target_modules=["q"]))
    layer = model.get_base_model()["q"]
    with torch.no_grad():
        layer.snella_A["default"] *= 30
    expected = plain + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.snella_A["default"].grad.any()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 96)
    kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
    settings = {"has_fp16_weights": False} if bits == 8 else {"compute_dtype": torch.float32}
    quantised = kind(64, 96, **settings)
    quantised.load_state_dict(plain.state_dict())
    model = nn.ModuleDict({"q": quantised.to("cpu")})
    x = draw(4, 64)
    base = model["q"](x)
    model = get_peft_model(model, SnellaConfig(rank=4, allocation=False, target_modules=["q"]))
    layer = model.get_base_model()["q"]
    with torch.no_grad():
        layer.snella_A["default"] *= 20
    expected = base + x @ layer.get_delta_weight("default").T
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.snella_A["default"].grad.any()
    with torch.no_grad():
        merged = copy.deepcopy(model).merge_and_unload()["q"]
        assert (merged(x) - expected).abs().max() < (0.05 if bits == 8 else 0.5)  # quantised again
        layer.eval()(x)
        if bits == 4:
            with pytest.raises(UserError, match="packed its weight for a CPU"):
                layer.merge()


def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(64, 96)})
    settings = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, settings)
    # As transformers does, for PEFT to quantise again after merging.
    own = SimpleNamespace(get_apply_tensor_subclass=lambda: settings)
    model.hf_quantizer = SimpleNamespace(quantization_config=own)
    x = draw(4, 64)
    base = model["q"](x)
    model = get_peft_model(model, SnellaConfig(rank=4, allocation=False, target_modules=["q"]))
    layer = model.get_base_model()["q"]
    with torch.no_grad():
        layer.snella_A["default"] *= 20
    expected = base + x @ layer.get_delta_weight("default").T
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert layer.snella_A["default"].grad.any()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload()["q"]
        assert (merged(x) - expected).abs().max() < 0.05  # quantised again
