"""Backbones load from every published file format, and a wrong file is named."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from snella.errors import UserError
from snella.models.backbone_files import file_digest
from snella.models.backbones import build_backbone

KWARGS = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}


def entry(file=None, arch="vit_tiny_patch16_224", **kwargs):
    return {
        "arch": arch,
        "kwargs": {**KWARGS, **kwargs},
        "file": "random" if file is None else str(file),
    }


@pytest.fixture
def source():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **KWARGS, num_classes=21)


def same_backbone(model, source):
    own, other = model.state_dict(), source.state_dict()
    return all(torch.equal(own[k], other[k]) for k in other if not k.startswith("head."))


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "module."])
def test_torch_files_of_the_published_shapes(tmp_path, source, wrap):
    state = source.state_dict()
    content = {
        "plain": state,
        "model": {"model": state},
        "state_dict": {"state_dict": state, "epoch": 3},
        "module.": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }[wrap]
    torch.save(content, tmp_path / "weights.pth")
    model = build_backbone(entry(tmp_path / "weights.pth"), num_classes=5)
    assert same_backbone(model, source)
    assert model.head.out_features == 5


def test_safetensors(tmp_path, source):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert same_backbone(build_backbone(entry(tmp_path / "w.safetensors"), 5), source)


def flax(model) -> dict[str, np.ndarray]:
    """The original ViT release's layout of a timm ViT's weights."""
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    heads, width = KWARGS["num_heads"], KWARGS["embed_dim"]
    out = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "pre_logits/kernel": np.zeros((width, width), np.float32),
        "pre_logits/bias": np.zeros(width, np.float32),
    }
    for i in range(KWARGS["depth"]):
        to, of = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        attention = to + "MultiHeadDotProductAttention_1/"
        parts = zip(
            ("query", "key", "value"), np.split(state[of + "attn.qkv.weight"], 3),
            np.split(state[of + "attn.qkv.bias"], 3), strict=True,
        )  # fmt: skip
        for name, weight, bias in parts:
            out[f"{attention}{name}/kernel"] = weight.T.reshape(width, heads, -1)
            out[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        out[attention + "out/kernel"] = state[of + "attn.proj.weight"].T.reshape(heads, -1, width)
        out[attention + "out/bias"] = state[of + "attn.proj.bias"]
        for n, fc in enumerate(("fc1", "fc2")):
            out[f"{to}MlpBlock_3/Dense_{n}/kernel"] = state[f"{of}mlp.{fc}.weight"].T
            out[f"{to}MlpBlock_3/Dense_{n}/bias"] = state[f"{of}mlp.{fc}.bias"]
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{to}{theirs}/scale"] = state[f"{of}{ours}.weight"]
            out[f"{to}{theirs}/bias"] = state[f"{of}{ours}.bias"]
    return out


def test_the_original_flax_file(tmp_path, source):
    np.savez(tmp_path / "ViT-B_16.npz", **flax(source))
    assert same_backbone(build_backbone(entry(tmp_path / "ViT-B_16.npz"), 5), source)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.npz is missing"):
        build_backbone(entry(tmp_path / "nowhere.npz"), 5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_a_truncated_file_is_named(tmp_path, source, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    elif suffix == ".npz":
        np.savez(path, **flax(source))
    else:
        torch.save(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"w{suffix} is damaged"):
        build_backbone(entry(path), 5)


def test_weights_of_another_architecture_are_refused(tmp_path, source):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not fit VisionTransformer"):
        build_backbone(entry(tmp_path / "w.safetensors", embed_dim=96), 5)
    with pytest.raises(UserError, match=r"lacks blocks\.2"):
        build_backbone(entry(tmp_path / "w.safetensors", depth=3), 5)
    with pytest.raises(UserError, match=r"no place for blocks\.1\.\S+ and 11 more"):
        build_backbone(entry(tmp_path / "w.safetensors", depth=1), 5)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    torch.save({"model": Evil()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"holds objects .* not read \(builtins\.print\)"):
        build_backbone(entry(tmp_path / "w.pth"), 5)


def test_unknown_architecture_and_keyword():
    with pytest.raises(UserError, match="Did you mean 'vit_tiny_patch16_224'"):
        build_backbone({"arch": "vit_tiny_patch16_24", "kwargs": {}, "file": "random"}, 5)
    with pytest.raises(UserError, match="kwargs"):
        build_backbone(entry(colour="red"), 5)


def test_digest(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x").startswith("ba7816bf")
    assert file_digest(None) == ""
