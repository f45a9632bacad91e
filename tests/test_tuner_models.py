"""SNELLA is alive on every architecture it claims: all gradients flow, saving and merging agree."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from snella import SnellaConfig, convert_to_lora
from snella.errors import UserError
from snella.tuner import SnellaLayer

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
WINDOWS = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2)}
Forward = Callable[[nn.Module], Tensor]


def timm_model(name: str, **settings: Any) -> Callable[[], tuple[nn.Module, Forward]]:
    def make() -> tuple[nn.Module, Forward]:
        model = timm.create_model(name, num_classes=3, **settings)
        for key, parameter in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                nn.init.ones_(parameter)  # Swin v2 starts its residual branches at zero
        size = settings.get("img_size", 32)
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        return model, lambda m: m(images)

    return make


def transformers_vit() -> tuple[nn.Module, Forward]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return ViTForImageClassification(config), lambda m: m(images).logits


def diffusion_transformer() -> tuple[nn.Module, Forward]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=4,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.ones(2, 5, 16),
        "pooled_projections": torch.ones(2, 16),
        "timestep": torch.tensor([1, 2]),
    }
    return model, lambda m: m(**inputs).sample


def segment_anything() -> tuple[nn.Module, Forward]:
    from segment_anything.modeling import ImageEncoderViT

    model = ImageEncoderViT(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        out_chans=8,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    )
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model, lambda m: m(images)


def of_transformers(kind: str, inputs: str, **settings: Any) -> Any:
    """A tiny model of transformers; kind: its name without Config and Model."""

    def make() -> tuple[nn.Module, Forward]:
        import transformers

        common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = getattr(transformers, f"{kind}Config")(**{**common, **settings})
        model = getattr(transformers, f"{kind}Model")(config)
        if inputs == "images":
            images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
            return model, lambda m: m(images).last_hidden_state
        ids = torch.arange(8).view(2, 4) + 3
        if kind == "T5":
            return model, lambda m: m(input_ids=ids, decoder_input_ids=ids).last_hidden_state
        return model, lambda m: m(input_ids=ids).last_hidden_state

    return make


def open_clip_model() -> tuple[nn.Module, Forward]:
    from open_clip.model import CLIP

    vision = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}
    model = CLIP(8, vision, text)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(8).view(2, 4) + 3
    return model, lambda m: m.encode_image(images) + m.encode_text(ids)


def flux() -> tuple[nn.Module, Forward]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.ones(1, 3, 16),
        "pooled_projections": torch.ones(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return model, lambda m: m(**inputs).sample


CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}
BERT = {"intermediate_size": 32, "vocab_size": 20}
DINOV2 = {"image_size": 16, "patch_size": 8, "use_swiglu_ffn": True}
LLAMA = {"intermediate_size": 32, "vocab_size": 20, "num_key_value_heads": 2}
CLIP = {"image_size": 16, "patch_size": 8, "intermediate_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 20}

MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Forward]], int]] = {
    "ViT": (timm_model("vit_tiny_patch16_224", **TINY), 8),
    "DeiT3": (timm_model("deit3_small_patch16_224", **TINY), 8),
    "Swin": (timm_model("swin_tiny_patch4_window7_224", **WINDOWS), 12),
    "ConvNeXt": (timm_model("convnext_tiny", **CONVNEXT), 8),
    "DINOv2": (timm_model("vit_small_patch14_dinov2", **TINY), 8),
    "CLIP-ViT": (timm_model("vit_base_patch16_clip_224", **TINY), 8),
    "SAM in timm": (timm_model("samvit_base_patch16", **TINY, global_attn_indexes=(1,)), 8),
    # These three pass the weight of qkv to F.linear themselves; they get the merged weight.
    "BEiT": (timm_model("beit_base_patch16_224", **TINY), 8),
    "EVA02": (timm_model("eva02_tiny_patch14_224", **TINY), 8),
    "Swin v2": (timm_model("swinv2_tiny_window8_256", **WINDOWS), 12),
    "transformers ViT": (transformers_vit, 12),
    "SD3": (diffusion_transformer, 21),
    "segment-anything": (segment_anything, 8),
    # Its MLPs are convolutions of one pixel.
    "ConvNeXt by convolution": (timm_model("convnext_tiny", **CONVNEXT, conv_mlp=True), 8),
    "BERT": (of_transformers("Bert", "text", **BERT), 12),
    "CLIP": (of_transformers("CLIPVision", "images", **CLIP), 12),
    "DINOv2 with SwiGLU": (of_transformers("Dinov2", "images", **DINOV2), 14),
    "Llama": (of_transformers("Llama", "text", **LLAMA), 14),
    "GPT-2": (of_transformers("GPT2", "text", **GPT2), 8),
    "T5": (of_transformers("T5", "text", **T5, feed_forward_proj="gated-gelu"), 25),
    "Flux": (flux, 17),
    "open_clip": (open_clip_model, 16),
}
# The last block of SD3 drops its text stream, so the text queries have nothing to act on.
WITHOUT_EFFECT = {"SD3": "transformer_blocks.1.attn.add_q_proj"}


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("name", MODELS)
def test_alive(name: str, variant: str, tmp_path: Path) -> None:
    make, adapted_layers = MODELS[name]
    torch.manual_seed(0)
    backbone, forward = make()
    initial = {key: value.clone() for key, value in backbone.state_dict().items()}
    settings = SnellaConfig(rank=4, variant=variant, dropout=0.0, drop_path=0.0)
    model = get_peft_model(backbone, settings)
    assert sum(isinstance(m, SnellaLayer) for m in model.modules()) == adapted_layers
    model.on_epoch_start(0, 2)
    (forward(model.train()) ** 2).sum().backward()
    dead = WITHOUT_EFFECT.get(name, "nothing")
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (".snella_" in key)
        if parameter.requires_grad and dead not in key:
            assert parameter.grad is not None and parameter.grad.any(), key
            assert parameter.grad.isfinite().all(), key
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad.sign()
    model.on_step_end()
    model.on_epoch_start(1, 2)
    with torch.no_grad():
        expected = forward(model.eval())
        model.save_pretrained(str(tmp_path))
        fresh, _ = make()
        fresh.load_state_dict(initial)
        assert forward(PeftModel.from_pretrained(fresh, str(tmp_path)).eval()).equal(expected)
        merged = model.merge_and_unload()
        torch.testing.assert_close(forward(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == initial.keys()


RELOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import snella, torch
from pathlib import Path
from peft import PeftModel
from test_tuner_models import MODELS
different = []
for number, (name, (make, _)) in enumerate(MODELS.items()):
    folder = Path(sys.argv[2], str(number))
    saved = torch.load(folder / "check.pt", weights_only=True)
    model, forward = make()
    model.load_state_dict(saved["backbone"])
    with torch.no_grad():
        model = PeftModel.from_pretrained(model, folder).eval()
        same = forward(model).equal(saved["expected"])
        merged = forward(model.merge_and_unload())
        same &= merged.allclose(saved["expected"], rtol=1e-4, atol=1e-5)
    different += [] if same else [name]
sys.exit(", ".join(different) or None)
"""


def test_all_reload_in_a_fresh_process(tmp_path: Path) -> None:
    """The live model, the reloaded one and the merged one are the same function."""
    for number, (make, _) in enumerate(MODELS.values()):
        torch.manual_seed(number)
        backbone, forward = make()
        initial = {key: value.clone() for key, value in backbone.state_dict().items()}
        model = get_peft_model(backbone, SnellaConfig(rank=4))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
        for epoch in range(2):
            model.on_epoch_start(epoch, 2)
            forward(model.train()).square().sum().backward()
            optimizer.step()
            model.on_step_end()
            optimizer.zero_grad()
        with torch.no_grad():
            expected = forward(model.eval())
        model.save_pretrained(str(tmp_path / str(number)))
        torch.save({"backbone": initial, "expected": expected}, tmp_path / str(number) / "check.pt")
    command = [sys.executable, "-c", RELOAD, str(Path(__file__).parent), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]


def test_separate_and_fused_queries_agree() -> None:
    """q, k, v as three layers and as one fused layer are the same function of the same numbers."""
    torch.manual_seed(0)
    fused = nn.ModuleDict({"0": nn.ModuleDict({"qkv": nn.Linear(8, 24)})})
    fused = get_peft_model(fused, SnellaConfig(rank=4, allocation=False))
    layer = fused.base_model.model["0"]["qkv"]
    x = torch.randn(3, 8)
    outputs = []
    for s, part in enumerate(layer.base_layer.weight.detach().split(8)):
        single = nn.ModuleDict({"0": nn.ModuleDict({"q": nn.Linear(8, 8, bias=False)})})
        single["0"]["q"].weight.data.copy_(part)
        single = get_peft_model(single, SnellaConfig(rank=4, allocation=False))
        target = single.base_model.model["0"]["q"]
        with torch.no_grad():
            target.snella_A["default"].copy_(layer.snella_A["default"][s : s + 1])
            target.snella_B["default"].copy_(layer.snella_B["default"][s : s + 1])
        outputs.append(target(x))
    torch.testing.assert_close(layer(x) - layer.base_layer.bias, torch.cat(outputs, -1))


def test_transformers_native_adapter_calls(tmp_path: Path) -> None:
    model, forward = transformers_vit()
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    model.add_adapter(SnellaConfig(rank=4, allocation=False, target_modules=["q_proj", "fc1"]))
    with torch.no_grad():
        expected = forward(model.eval())
    model.save_pretrained(str(tmp_path))
    fresh, _ = transformers_vit()
    fresh.load_state_dict(initial)
    fresh.load_adapter(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(forward(fresh.eval()), expected)
        fresh.delete_adapter("default")


def test_diffusers_native_adapter_calls() -> None:
    model, forward = diffusion_transformer()
    with torch.no_grad():
        plain = forward(model.eval())
        model.add_adapter(SnellaConfig(rank=4, allocation=False, target_modules=["to_q", "to_v"]))
        adapted = forward(model)
        assert not adapted.allclose(plain, atol=1e-7)
        inputs = {"joint_attention_kwargs": {"scale": 0.0}}
        off = forward(lambda **kwargs: model(**kwargs, **inputs))
        torch.testing.assert_close(off, plain)
        assert forward(model).equal(adapted)


def test_lora_export_loads_in_diffusers(tmp_path: Path) -> None:
    model, forward = diffusion_transformer()
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    model = get_peft_model(model, SnellaConfig(rank=4, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        expected = forward(model.eval())
        export = convert_to_lora(model, 16)
        assert export.error < 1e-5
        export.save(tmp_path)
        fresh, _ = diffusion_transformer()
        fresh.load_state_dict(initial)
        lora = PeftModel.from_pretrained(fresh, str(tmp_path))
        torch.testing.assert_close(forward(lora.eval()), expected, rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_adapted_are_refused() -> None:
    model = nn.ModuleDict({"0": nn.ModuleDict({"fc1": nn.ConvTranspose2d(3, 3, 1)})})
    with pytest.raises(UserError, match="No linear layers to adapt were recognised in ModuleDict"):
        get_peft_model(model, SnellaConfig())
    with pytest.raises(UserError, match=r"'0.fc1', ConvTranspose2d: .*exclude_modules"):
        get_peft_model(model, SnellaConfig(target_modules=["fc1"]))


def test_what_the_default_leaves_out_is_said() -> None:
    block = nn.ModuleDict({"fc1": nn.Linear(4, 4), "norm_linear": nn.Linear(4, 4)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(copy.deepcopy(model), SnellaConfig(rank=2))
    block["novel"] = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match=r"1 linear layer\(s\).*blocks.0.novel"):
        get_peft_model(copy.deepcopy(model), SnellaConfig(rank=2))
    del block["novel"]
    block["mixture"] = nn.ParameterDict({"experts": nn.Parameter(torch.ones(3, 4, 4))})
    with pytest.warns(UserWarning, match=r"1 parameter\(s\).*blocks.0.mixture.experts. They stay"):
        get_peft_model(model, SnellaConfig(rank=2))


def test_modules_that_read_the_weight_themselves() -> None:
    """nn.MultiheadAttention never calls its out_proj; evaluation takes yet another fast path."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = get_peft_model(nn.Sequential(block), SnellaConfig(rank=4, allocation=False))
    adapted = [m for m in model.modules() if isinstance(m, SnellaLayer)]
    assert len(adapted) == 4
    x = torch.randn(2, 5, 16)
    trained = model.train()(x)
    trained.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert not model(x).allclose(trained, atol=1e-5)
    settings = SnellaConfig(rank=4, allocation=False, dropout=0.1)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    with pytest.warns(UserWarning, match="'0.self_attn.out_proj' reads its weight") as log:
        settings.no_dropout = []
        get_peft_model(nn.Sequential(block), settings).train()(x)
    assert len(log) == 2  # of the attention, and of its projection
