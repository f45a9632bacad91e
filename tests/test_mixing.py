"""Mixup and cutmix: timm's formulas, and draws that depend on seed and batch alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from torch._subclasses import FakeTensorMode

from snella.data.mixing import apply_mix, draw_mix

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_and_targets(kind, smoothing):
    mix = draw_mix(0.8 * (kind == "mixup"), 1.0 * (kind == "cutmix"), 8, 3, 1)
    cut, share, top, bottom, left, right = mix.tolist()
    assert cut == (kind == "cutmix")
    images, targets = apply_mix(IMAGES, LABELS, 4, smoothing, mix)
    expected = mixup_target(LABELS, 4, share, smoothing)
    torch.testing.assert_close(targets, expected)
    if kind == "mixup":
        torch.testing.assert_close(images, share * IMAGES + (1 - share) * IMAGES.flip(0))
    else:
        other = (images != IMAGES).any(1).any(0)
        assert other.sum() <= (bottom - top) * (right - left)
        assert share == pytest.approx(1 - (bottom - top) * (right - left) / 64)


def test_both_are_drawn_and_every_draw_repeats():
    draws = [draw_mix(0.8, 1.0, 224, 7, i) for i in range(400)]
    cut = torch.stack([d[0] for d in draws]).mean()
    assert 0.4 < cut < 0.6
    shares = torch.stack([d[1] for d in draws])
    assert shares.min() >= 0 and shares.max() <= 1 and 0.35 < shares.mean() < 0.65
    assert all(torch.equal(d, draw_mix(0.8, 1.0, 224, 7, i)) for i, d in enumerate(draws))
    assert not torch.equal(draws[0], draw_mix(0.8, 1.0, 224, 8, 0))


def test_the_last_partial_batch_is_dropped_where_a_script_drops_it(make_run):
    from snella.runs.train import load_run

    sizes = {}
    for drop in (False, True):
        task = load_run(make_run("linear", batch_size=7, drop_last=drop)).task
        assert task.data.size("train") % 7
        batches = list(task.batches("train", 3))
        assert len(batches) == task.steps("train")
        sizes[drop] = [len(batch["label"]) for batch in batches]
    assert sizes[True] == sizes[False][:-1] and set(sizes[True]) == {7}
    tiny = load_run(make_run("linear", batch_size=512, drop_last=True)).task
    assert [len(b["label"]) for b in tiny.batches("train", 0)] == [tiny.data.size("train")]


def test_training_is_mixed_and_calibration_is_not(make_run):
    from snella.runs.train import load_run

    loaded = load_run(make_run("linear", mixup=0.8, cutmix=1.0, label_smoothing=0.1))
    task, model = loaded.task, loaded.model.eval()
    batch = next(iter(task.batches("train", 3)))
    plain = next(iter(task.plain_batches("train", 3)))
    assert torch.equal(batch["image"], plain["image"]) and "mix" not in plain
    images, targets = apply_mix(batch["image"], batch["label"], 4, 0.1, batch["mix"])
    expected = F.cross_entropy(model(images), targets)
    torch.testing.assert_close(task.loss(model, batch), expected)
    unmixed = F.cross_entropy(model(plain["image"]), plain["label"], label_smoothing=0.1)
    torch.testing.assert_close(task.loss(model, plain), unmixed)
    assert "mix" not in next(iter(task.batches("train", None)))


def test_mixing_on_a_gpu_reads_no_number():
    """Which the host would have to wait for; pretended tensors have none to read."""
    with FakeTensorMode():
        images = torch.empty(5, 3, 8, 8, device="cuda")
        labels = torch.empty(5, dtype=torch.int64, device="cuda")
        mix = torch.empty(6, dtype=torch.float64, device="cuda")
        mixed, targets = apply_mix(images, labels, 4, 0.1, mix)
    assert mixed.shape == images.shape and mixed.dtype == torch.float32
    assert targets.shape == (5, 4) and targets.device.type == "cuda"
