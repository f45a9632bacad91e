"""Adapter and SSF on the backbones of segmentation (SAM) and generation (SD3)."""

import pytest
import torch
from adapters_support import method, perturb

from snella.method import trainable
from snella.methods.base import freeze
from snella.models.tiny import missing_extra, output, tiny_backbone


@pytest.mark.parametrize(
    ("file", "family", "tensors"),
    [("adapter", "sam", 2 * 4), ("ssf", "sam", 2 * (1 + 2 * 6 + 2)), ("ssf", "sd3", 2 * 2 * 6)],
)
def test_all_tensors_are_alive_and_frozen_ones_keep_still(
    file: str, family: str, tensors: int
) -> None:
    if extra := missing_extra(family):
        pytest.skip(f"needs snella[{extra}]")
    model, chosen = tiny_backbone(family).eval(), method(file)
    freeze(model)
    chosen.check_supported(model)
    chosen.adapt(model)
    perturb(model)
    answer = output(model)
    answer.square().mean().backward()
    assert len(trainable(model)) == tensors
    assert all(p.grad.abs().max() > 0 for p in trainable(model).values())
    if file == "ssf":
        chosen.merge(model)
        assert model.state_dict().keys() == tiny_backbone(family).state_dict().keys()
        torch.testing.assert_close(output(model), answer, rtol=1e-4, atol=1e-5)
