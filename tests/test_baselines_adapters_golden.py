"""The adapter baselines against vectors computed with their authors' code, in double precision."""

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapters_support import assert_gradients, golden, golden_model, method, tiny
from torch import Tensor, nn

from snella.methods.base import prepare_model

_CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def _fill(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    assert parameters.keys() == values.keys()
    for name, value in values.items():
        parameters[name].data.copy_(value.reshape(parameters[name].shape))


def _check(model: nn.Module, data: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    logits = model(data["images"])
    torch.testing.assert_close(logits, data["logits"], **_CLOSE)
    loss = F.cross_entropy(logits, data["labels"])
    torch.testing.assert_close(loss, data["loss"], **_CLOSE)
    loss.backward()
    assert_gradients(_part(data, "grad/"), parameters)


def _part(data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in data.items() if k.startswith(prefix)}


def _head(model: Any) -> dict[str, nn.Parameter]:
    return {f"head.{name}": p for name, p in model.get_classifier().named_parameters()}


@pytest.mark.parametrize(("name", "depth"), [("vpt_shallow", 2), ("vpt_deep", 3)])
def test_vpt(name: str, depth: int) -> None:
    data = golden(name)
    model: Any = golden_model("vit", data, depth=depth)
    prepare_model(method("vpt", depth=name.removeprefix("vpt_"), prompts=4), model)
    first, *deep = [b.prompt for b in model.blocks if hasattr(b, "prompt")]
    first.data.copy_(data["prompt/prompt_embeddings"][0])
    for prompt, value in zip(deep, data.get("prompt/deep_prompt_embeddings", []), strict=True):
        prompt.data.copy_(value)
    tokens = []
    model.blocks[-1].register_forward_hook(
        lambda block, args, output: tokens.append(output), prepend=True
    )
    logits = model(data["images"])
    torch.testing.assert_close(logits, data["logits"], **_CLOSE)
    torch.testing.assert_close(model.norm(tokens[0]), data["tokens_final"], rtol=0, atol=1e-5)
    F.cross_entropy(logits, data["labels"]).backward()
    torch.testing.assert_close(first.grad[None], data["grad/prompt_embeddings"], **_CLOSE)
    if deep:
        gradient = torch.stack([prompt.grad for prompt in deep])
        torch.testing.assert_close(gradient, data["grad/deep_prompt_embeddings"], **_CLOSE)
    assert_gradients(
        {k: v for k, v in _part(data, "grad/").items() if k.startswith("head.")}, _head(model)
    )


def test_vpt_starts_within_the_authors_bound() -> None:
    model: Any = tiny("vit")
    prepare_model(method("vpt", prompts=200), model)
    bound = math.sqrt(6 / (3 * 8 * 8 + 48))
    for block in model.blocks:
        assert 0.9 * bound < block.prompt.abs().max() <= bound


def test_mlp3_head() -> None:
    data = golden("mlp3_head")
    model: Any = tiny("vit").double()
    prepare_model(method("mlp3"), model)
    last = model.get_classifier()
    torch.testing.assert_close(last.bias.detach(), data["initial_last_bias"])
    perceptron = nn.Sequential(OrderedDict(projection=model.head_drop[:-1], last_layer=last))
    perceptron.load_state_dict(_part(data, "w/"), strict=False)
    perceptron.eval()
    torch.testing.assert_close(perceptron(data["features"]), data["logits_eval"], **_CLOSE)
    perceptron.train()
    for module in perceptron.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    logits = perceptron(data["features"])
    torch.testing.assert_close(logits, data["logits_train_no_dropout"], **_CLOSE)


def test_adapter_of_noah() -> None:
    data = golden("adapter8_quickgelu")
    model: Any = tiny("vit").double()
    prepare_model(method("adapter", activation="quickgelu", initialisation="xavier"), model)
    adapter = model.blocks[0].mlp.adapter
    adapter.load_state_dict(_part(data, "w/"))
    torch.testing.assert_close(data["x"] + adapter(data["x"]), data["y"], **_CLOSE)


def test_adapter_of_vpt() -> None:
    data = golden("vpt_adapter")
    model: Any = golden_model("vit", data, depth=2)
    prepare_model(method("adapter", bottleneck=6, activation="gelu"), model)
    own = {
        f"blocks.{i}.{name}": p
        for i, block in enumerate(model.blocks)
        for name, p in block.mlp.adapter.named_parameters()
    }
    _fill(own, _part(data, "adapter/"))
    _check(model, data, own | _head(model))


_SSF_PLACES = {
    "patch_embed.proj": "patch_embed.1",
    "patch_embed.norm": "patch_embed.2",
    "attn.qkv": "attn.1",
    "attn.proj": "attn.2",
    "mlp.fc1": "mlp.1",
    "mlp.fc2": "mlp.2",
    "norm1": "1",
    "norm2": "2",
    "norm": "1",
}
_SSF_PLACES_CONVNEXT = {
    "stem.0": "stem.1",
    "stem.1": "stem.2",
    "conv_dw": "1",
    "norm": "2",
    "mlp.fc1": "mlp.1",
    "mlp.fc2": "mlp.2",
    "norm_pre": "1",
}


def _ssf_pairs(model: nn.Module, places: dict[str, str]) -> dict[str, nn.Parameter]:
    """All pairs under the names of the golden files; ``places`` maps our layers to theirs."""
    found = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "ssf_scale"):
            leaf = next(end for end in places if f".{path}".endswith(f".{end}"))
            parent, _, number = places[leaf].rpartition(".")
            theirs = path.removesuffix(leaf) + parent + "." * bool(parent)
            found[f"{theirs}ssf_scale_{number}"] = layer.ssf_scale
            found[f"{theirs}ssf_shift_{number}"] = layer.ssf_shift
    return found


def test_ssf_vit() -> None:
    data = golden("ssf_vit")
    model: Any = golden_model("vit", data, depth=2)
    prepare_model(method("ssf"), model)
    pairs = _ssf_pairs(model, _SSF_PLACES)
    _fill(pairs, _part(data, "ssf/"))
    tokens = model.forward_features(data["images"])
    torch.testing.assert_close(tokens, data["tokens_final"], rtol=0, atol=1e-5)
    _check(model, data, pairs | _head(model))


def test_ssf_swin() -> None:
    data = golden("ssf_swin")
    rename = {"head.": "head.fc.", "layers.0.downsample": "layers.1.downsample"}
    model: Any = golden_model("swin", data, rename)
    prepare_model(method("ssf"), model)
    pairs = _ssf_pairs(model, _SSF_PLACES)
    _fill(pairs, _part(data, "ssf/"))
    _check(model, data, pairs | _head(model))


def test_ssf_convnext() -> None:
    data = golden("ssf_convnext")
    rename = {
        "stem.proj": "stem.0",
        "stem.norm": "stem.1",
        "downsample.norm": "downsample.0",
        "downsample.proj": "downsample.1",
    }
    model: Any = golden_model("convnext", data, rename)
    prepare_model(method("ssf"), model)
    pairs = _ssf_pairs(model, _SSF_PLACES_CONVNEXT)
    _fill(pairs, _part(data, "ssf/"))
    model.head.requires_grad_(True)
    head = {f"head.{name}": p for name, p in model.head.named_parameters()}
    _check(model, data, pairs | head)
    for stage in model.stages[1:]:
        stage.downsample[0].forward = _unbiased(stage.downsample[0])
    torch.testing.assert_close(model(data["images"]), data["logits_unbiased_variance"], **_CLOSE)


def _unbiased(norm: Any) -> Any:
    """The timm of SSF's time divided by one channel less where memory was not contiguous."""

    def forward(x: Tensor) -> Tensor:
        deviation = (x.var(1, keepdim=True) + norm.eps).sqrt()
        normalised = (x - x.mean(1, keepdim=True)) / deviation
        return normalised * norm.weight[:, None, None] + norm.bias[:, None, None]

    return forward


def test_convpass_module() -> None:
    data = golden("convpass_module")
    model: Any = tiny("vit", img_size=224, patch_size=16, embed_dim=768, depth=1, num_heads=12)
    prepare_model(method("convpass"), model)
    bypass = model.blocks[0].mlp.bypass
    torch.testing.assert_close(
        bypass.conv.weight.detach(), data["initial_conv_weight"].float(), rtol=0, atol=0
    )
    bypass.double().eval().load_state_dict(_part(data, "w/"))
    y = bypass(data["x"])
    at = data["token_index"].long()
    torch.testing.assert_close(y[0, at], data["y_at_tokens"], rtol=0, atol=2e-6)
    torch.testing.assert_close(y[0].mean(1), data["y_token_mean"], **_CLOSE)
    torch.testing.assert_close(y[0].mean(0), data["y_channel_mean"], **_CLOSE)
    y[0, at].backward(data["grad_output_at_tokens"])
    assert_gradients(_part(data, "grad/"), dict(bypass.named_parameters()))
