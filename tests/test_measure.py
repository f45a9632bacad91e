"""Costs are counted as the papers count them."""

from __future__ import annotations

import pytest
import timm
import torch

from snella.runs.measure import PeakMemory, gflops


def test_gflops_of_vit_b_16_are_the_published_ones():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert gflops(model, torch.empty(1, 3, 224, 224)) == pytest.approx(17.58, abs=0.005)


def test_peak_memory_sees_what_is_gone_again():
    memory = PeakMemory(torch.device("cpu"))
    with memory.watch():
        pass
    small = memory.mib
    with memory.watch():
        torch.ones(64 * 2**20 // 4)
    if small is not None:
        assert memory.mib - small > 48
