"""RandAugment and random erasing: timm's own, on torch's seeds, and nothing else disturbed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from timm.data.auto_augment import rand_augment_transform

from snella.data.auto_augment import AutoAugment
from snella.data.erasing import KEY, draw_erasing, erase
from snella.data.pixels import PixelSettings
from snella.data.transforms import train_transform
from snella.runs.train import load_run

POLICY = "rand-m9-mstd0.5-inc1"
PICTURE = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
IMAGES = torch.zeros(200, 3, 16, 16)


def states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_policy_is_timms_under_torchs_seed():
    augment = AutoAugment(POLICY, 32, (0.5, 0.5, 0.5))
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        before = states()[:2]
        found.append(np.array(augment(PICTURE)))
        assert states()[:2] == before  # Python's and numpy's generators are as they were
        torch.manual_seed(seed)
        draw = int(torch.randint(2**31, ()))
        random.seed(draw), np.random.seed(draw)
        timm = rand_augment_transform(POLICY, {"translate_const": 14, "img_mean": (128,) * 3})
        assert np.array_equal(found[-1], np.array(timm(PICTURE)))
    assert len({image.tobytes() for image in found}) > 1


def test_a_policy_replaces_colour_jitter():
    plain = PixelSettings(image_size=16, augmentation="timm")
    names = [type(step).__name__ for step in train_transform(plain)._pipeline.transforms]
    chosen = plain.model_copy(update={"auto_augment": POLICY})
    others = [type(step).__name__ for step in train_transform(chosen)._pipeline.transforms]
    assert "ColorJitter" in names
    assert [n.replace("ColorJitter", "AutoAugment") for n in names] == others


@pytest.mark.parametrize(
    "wrong", [{"auto_augment": POLICY}, {"auto_augment": "x", "augmentation": "timm"},
              {"random_erasing": 1.5}],
)  # fmt: skip
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValidationError):
        PixelSettings(**wrong)


def test_erasing_depends_on_its_seed_alone():
    before = states()
    first = erase(IMAGES, 0.25, 5)
    assert states() == before and IMAGES.abs().sum() == 0
    torch.manual_seed(1), random.seed(1)
    assert torch.equal(first, erase(IMAGES, 0.25, 5))
    assert not torch.equal(first, erase(IMAGES, 0.25, 6))
    assert draw_erasing(1, 2) == draw_erasing(1, 2) != draw_erasing(1, 3)


def test_how_often_and_how_much_is_erased():
    changed = (erase(IMAGES, 0.25, 5) != 0).any(1)
    share = changed.flatten(1).float().mean(1)
    assert 0.15 < (share > 0).float().mean() < 0.35
    assert share.max() <= 0.36  # a third, and rounding
    assert not (erase(IMAGES, 0.0, 5) != 0).any() and (erase(IMAGES, 1.0, 5) != 0).any()


def test_training_erases_after_mixing_and_calibration_does_not(make_run):
    loaded = load_run(make_run("linear", random_erasing=1.0, label_smoothing=0.1))
    task, model = loaded.task, loaded.model.eval()
    batch = next(iter(task.batches("train", 3)))
    again = next(iter(task.batches("train", 3)))
    assert torch.equal(batch[KEY], again[KEY])
    images = erase(batch["image"], 1.0, int(batch[KEY]))
    expected = F.cross_entropy(model(images), batch["label"], label_smoothing=0.1)
    torch.testing.assert_close(task.loss(model, batch), expected)
    for plain in (task.plain_batches("train", 3), task.batches("train", None)):
        assert KEY not in next(iter(plain))
