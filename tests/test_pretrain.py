"""Pre-training on formula-driven images: resumes exactly, and the shipped file is what it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from snella.quick import formula
from snella.quick.pretrain import ARCHITECTURE, PretrainConfig, augment, pretrain

TOY = PretrainConfig(
    architecture={**ARCHITECTURE, "embed_dim": 12, "depth": 1, "num_heads": 2},
    classes={"fractal": 1, "atom": 2, "grating": 2},
    instances=6,
    epochs=2,
    warmup_epochs=1,
    batch_size=15,
)
SHIPPED = Path(__file__).resolve().parents[1] / "workflow" / "resources" / "vit_quick.safetensors"


def test_stopped_and_resumed_gives_the_same_weights(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    record = pretrain(TOY, whole)
    assert pretrain(TOY, parts, stop_after=1) == {}
    assert not parts.exists()
    resumed = pretrain(TOY, parts)
    assert whole.read_bytes() == parts.read_bytes()
    assert resumed["history"] == record["history"]
    assert len(resumed["history"]) == TOY.epochs
    assert not list(tmp_path.glob("*.checkpoint*"))


def test_a_checkpoint_of_another_recipe_is_not_used(tmp_path: Path) -> None:
    from dataclasses import replace

    out = tmp_path / "w.safetensors"
    pretrain(replace(TOY, lr=0.5), out, stop_after=1)
    pretrain(TOY, tmp_path / "fresh.safetensors")
    pretrain(TOY, out)
    assert out.read_bytes() == (tmp_path / "fresh.safetensors").read_bytes()


def test_the_file_has_no_head_and_loads_into_timm(tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    record = pretrain(TOY, out)
    model = VisionTransformer(**record["architecture"], num_classes=3)
    result = model.load_state_dict(load_file(out), strict=False)
    assert set(result.missing_keys) == {"head.weight", "head.bias"}
    assert not result.unexpected_keys


def test_shipped_weights_match_their_record() -> None:
    record = json.loads(SHIPPED.with_suffix(".json").read_text(encoding="utf-8"))
    assert hashlib.sha256(SHIPPED.read_bytes()).hexdigest() == record["sha256"]
    assert SHIPPED.stat().st_size <= 4 * 2**20
    weights = load_file(SHIPPED)
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert all(bool(value.isfinite().all()) for value in weights.values())
    assert record["parameters"] == sum(value.numel() for value in weights.values())
    model = VisionTransformer(**record["architecture"], num_classes=2)
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []
    assert record["normalisation"] == {"mean": [0.5] * 3, "std": [0.5] * 3}


def test_the_shipped_recipe_is_the_default_one() -> None:
    record = json.loads(SHIPPED.with_suffix(".json").read_text(encoding="utf-8"))
    from dataclasses import asdict

    assert record["config"] == asdict(PretrainConfig())


@pytest.mark.parametrize("family", formula.FAMILIES)
def test_a_family_is_reproducible_and_its_classes_differ(family: str) -> None:
    images, labels = formula.render(5, {family: 2}, 4)
    again, _ = formula.render(5, {family: 2}, 4)
    assert images.shape == (8, formula.SIDE, formula.SIDE)
    assert np.array_equal(images, again)
    assert labels.tolist() == [0] * 4 + [1] * 4
    other, _ = formula.render(6, {family: 2}, 4)
    assert not np.array_equal(images, other)
    assert all(len({image.tobytes() for image in images[labels == k]}) == 4 for k in (0, 1))


def test_fractals_are_visible_and_not_solid() -> None:
    images = formula.fractals(np.random.default_rng(1), 5)
    assert 0.12 < (images > 40).mean() < 0.7


def test_augmented_images_are_normalised_and_vary() -> None:
    images, _ = formula.render(0, {"atom": 1}, 8)
    grey = torch.from_numpy(images).unsqueeze(1).float() / 255
    first = augment(grey, torch.Generator().manual_seed(0))
    assert first.shape == (8, 3, 32, 32)
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, augment(grey, torch.Generator().manual_seed(0)))
    assert not torch.equal(first, augment(grey, torch.Generator().manual_seed(1)))
