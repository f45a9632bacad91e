"""Adapter+ and AdaptFormer against their equations, since no vectors of their authors exist."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapters_support import adapted, images, labels, method, perturb, tiny
from torch import Tensor

from snella.method import trainable
from snella.methods.base import prepare_model


def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model.forward_head(model.norm(tokens))


def test_adapter_plus_equation() -> None:
    _, model = adapted("vit", "adapter_plus")
    perturb(model)
    x = model._pos_embed(model.patch_embed(images("vit")))
    for block in model.blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
        a = block.adapter
        x = x + a.scale * (F.gelu(x @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias)
    torch.testing.assert_close(model(images("vit")), _logits(model, x))


def test_adapter_plus_starts_with_houlsby_s_truncated_normal() -> None:
    model: Any = tiny("vit", embed_dim=192)
    prepare_model(method("adapter_plus", bottleneck=64), model)
    for block in model.blocks:
        for layer in (block.adapter.down, block.adapter.up):
            assert layer.weight.abs().max() <= 0.02
            # a normal cut at two standard deviations keeps 0.88 of its standard deviation
            assert layer.weight.std().item() == pytest.approx(0.0088, rel=0.05)
            assert layer.bias.abs().max() == 0
        assert torch.equal(block.adapter.scale, torch.ones(192))


def test_adaptformer_equation() -> None:
    _, model = adapted("vit", "adaptformer", bottleneck=8, scale=0.3)
    perturb(model)
    x = model._pos_embed(model.patch_embed(images("vit")))
    for block in model.blocks:
        z = x + block.attn(block.norm1(x))
        a = block.adapter
        branch = F.relu(z @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias
        x = z + block.mlp(block.norm2(z)) + 0.3 * branch
    torch.testing.assert_close(model(images("vit")), _logits(model, x))


@pytest.mark.parametrize(
    ("file", "kind"),
    [("vpt", "vit"), ("vpt", "swin"), ("adaptformer", "vit"), ("ssf", "convnext")],
)
def test_gradient_checkpointing_changes_nothing(file: str, kind: str) -> None:
    noise = {"dropout": 0.0} if file == "adaptformer" else {}
    _, model = adapted(kind, file, **noise)
    perturb(model)
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.train().set_grad_checkpointing(checkpointing)
        F.cross_entropy(model(images(kind).requires_grad_()), labels()).backward()
        found.append({name: p.grad for name, p in trainable(model).items()})
    torch.testing.assert_close(found[0], found[1])
