"""The number type of a step, and the optimizer that takes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from snella.errors import UserError
from snella.models.parameters import checkpoint_blocks
from snella.models.tiny import tiny_backbone
from snella.runs.optimizers import build_optimizer
from snella.runs.precision import autocast
from snella.suite import packages

CPU = torch.device("cpu")


def attention(precision: str, train: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 8) for _ in range(3))
    project = nn.Linear(8, 8)
    with torch.set_grad_enabled(train), autocast(precision, CPU):
        x = project(q)
        y = F.scaled_dot_product_attention(x, k.to(x.dtype), v.to(x.dtype))
    if not train:
        return y, None
    y.float().square().sum().backward()
    return y, project.weight.grad


@pytest.mark.parametrize("train", [True, False])
def test_half_precision_is_the_same_attention(train: bool) -> None:
    exact, gradient = attention("fp32", train)
    rounded, other = attention("bf16", train)
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.02)
    if gradient is not None and other is not None:
        assert F.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > 0.99


def test_training_in_half_precision_avoids_the_slow_fused_backward() -> None:
    """And prediction does not: there the fused kernel is the fast one."""
    with autocast("bf16", CPU):
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    with torch.no_grad(), autocast("bf16", CPU):
        assert torch.backends.cuda.flash_sdp_enabled()
    with autocast("fp32", CPU):
        assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adagrad"])
def test_fused_steps_are_the_plain_ones(name: str) -> None:
    steps = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(7, 5)
        optimizer = build_optimizer(name, [{"params": list(model.parameters())}], 0.1)
        assert optimizer.defaults["fused"]
        for group in optimizer.param_groups:
            group["fused"] = fused
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 7)).square().sum().backward()
            optimizer.step()
        steps.append(model.weight.detach().clone())
    torch.testing.assert_close(*steps)


def test_parameters_that_cannot_be_fused_are_stepped_plainly() -> None:
    meta = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = build_optimizer("adamw", [{"params": [meta]}], 0.1)
    assert not optimizer.defaults["fused"]
    real = [{"params": [nn.Parameter(torch.zeros(3))]}]
    assert not build_optimizer("adamw", real, 0.1, fused=False).defaults["fused"]
    assert "fused" not in build_optimizer("rprop", [{"params": [meta]}], 0.1).defaults


def test_blocks_are_recomputed_with_the_attention_of_their_forward() -> None:
    """Backward comes after the forward's contexts."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = tiny_backbone("vit").train()
        if recompute:
            checkpoint_blocks(model)
        with autocast("bf16", CPU):
            loss = model(torch.randn(2, 3, 32, 32)).float().square().sum()
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["lbfgs", "sparseadam", "optimizer", "adamv"])
def test_optimizers_that_take_no_plain_step_are_unknown(name: str) -> None:
    with pytest.raises(UserError, match="adam"):
        build_optimizer(name, [{"params": [nn.Parameter(torch.zeros(3))]}], 0.1)
    assert name not in packages.optimizers() and "adamw" in packages.optimizers()
