"""Adapter and SSF on the backbones of segmentation (SAM) and generation (SD3)."""

from typing import Any

import pytest
import torch
from adapters_support import method, perturb
from torch import Tensor, nn

from snella.method import trainable
from snella.methods.base import freeze


def _sam() -> tuple[nn.Module, dict[str, Tensor]]:
    encoder = pytest.importorskip("segment_anything.modeling.image_encoder")
    torch.manual_seed(0)
    model = encoder.ImageEncoderViT(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, out_chans=8, use_rel_pos=True
    )
    return model.eval(), {"x": torch.randn(2, 3, 32, 32)}


def _sd3() -> tuple[nn.Module, dict[str, Tensor]]:
    transformer = pytest.importorskip("diffusers.models.transformers.transformer_sd3")
    torch.manual_seed(0)
    model = transformer.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 3, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([10, 500]),
    }
    return model.eval(), inputs


def _output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.sample


@pytest.mark.parametrize(
    ("file", "build", "tensors"),
    [("adapter", _sam, 2 * 4), ("ssf", _sam, 2 * (1 + 2 * 6 + 2)), ("ssf", _sd3, 2 * 2 * 6)],
    ids=["adapter-sam", "ssf-sam", "ssf-sd3"],
)
def test_all_tensors_are_alive_and_frozen_ones_keep_still(
    file: str, build: Any, tensors: int
) -> None:
    model, inputs = build()
    freeze(model)
    chosen = method(file)
    chosen.check_supported(model)
    chosen.adapt(model)
    perturb(model)
    output = _output(model, inputs)
    output.square().mean().backward()
    assert len(trainable(model)) == tensors
    assert all(p.grad.abs().max() > 0 for p in trainable(model).values())
    if file == "ssf":
        chosen.merge(model)
        assert model.state_dict().keys() == build()[0].state_dict().keys()
        torch.testing.assert_close(_output(model, inputs), output, rtol=1e-4, atol=1e-5)
