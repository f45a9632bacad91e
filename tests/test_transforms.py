"""Transforms and batches: the published pixels, an order that depends on its seed alone."""

from __future__ import annotations

import pickle
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1

from snella.data.pixels import PixelSettings
from snella.data.prepared import Prepared
from snella.data.transforms import (
    NORMALISATIONS,
    Split,
    batches,
    community_jpeg,
    eval_transform,
    load_split,
    normalise,
    open_split,
    take,
    train_transform,
)
from snella.errors import UserError
from snella.tasks.classification.prepare import write_labelled
from snella.validation import validate


@dataclass(frozen=True)
class Settings:
    image_size: int = 32
    resize: str = "none"
    resize_size: int | None = None
    interpolation: str = "bicubic"
    crop_interpolation: str = "bicubic"
    normalisation: str = "imagenet"
    augmentation: str = "none"
    pixels: str = "as-is"
    auto_augment: str | None = None


VTAB = Settings(image_size=48, resize="square")
FGVC = Settings(48, "shorter-side", 56, "bilinear", augmentation="timm")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photographs(size):
    """Three photographs bundled with scikit-image, cut square and shrunk."""
    data = pytest.importorskip("skimage.data")
    for photograph in (data.astronaut(), data.coffee(), data.chelsea()):
        side = min(photograph.shape[:2])
        square = Image.fromarray(photograph[:side, :side])
        yield np.array(square.resize((size, size), Image.Resampling.BICUBIC))


def chw(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_vtab_pixels_are_pillows_square_bicubic():
    image = noise(40, 30, 3)
    expected = Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC)
    ours = eval_transform(VTAB)(image)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    assert torch.equal(ours, chw(expected))
    published = v1.Compose([v1.Resize((48, 48), interpolation=3), v1.CenterCrop(48)])
    assert torch.equal(ours, chw(published(Image.fromarray(image))))


@pytest.mark.parametrize("shape", [(80, 63, 3), (61, 90, 3)])
def test_fgvc_evaluation_is_shorter_side_then_centre_crop(shape):
    image = noise(*shape)
    published = v1.Compose([v1.Resize(56), v1.CenterCrop(48)])  # SNELL, VPT: bilinear
    assert torch.equal(eval_transform(FGVC)(image), chw(published(Image.fromarray(image))))


def test_square_then_crop():
    image = noise(40, 70, 3)
    published = v1.Compose([v1.Resize((56, 56), interpolation=3), v1.CenterCrop(48)])  # SPT
    ours = eval_transform(Settings(48, "square", 56))(image)
    assert torch.equal(ours, chw(published(Image.fromarray(image))))


@pytest.mark.parametrize("shape", [(40, 30, 3), (97, 61, 3), (48, 48, 3), (300, 200, 3)])
def test_tensorflows_resize_by_its_own_formula(shape):
    """tf.image.resize: source at (i + 0.5) scale - 0.5, two neighbours, no antialiasing."""
    image = noise(*shape)

    def along(values, size):
        source = (np.arange(size) + 0.5) * len(values) / size - 0.5
        low, high = np.floor(source), np.ceil(source)
        share = (source - low).reshape(-1, *[1] * (values.ndim - 1))
        low = np.maximum(low, 0).astype(int)
        high = np.minimum(high, len(values) - 1).astype(int)
        return values[low] * (1 - share) + values[high] * share

    expected = along(image.astype(np.float64), 48)
    expected = along(expected.transpose(1, 0, 2), 48).transpose(1, 0, 2)
    ours = eval_transform(Settings(48, "square", interpolation="tf-bilinear"))(image)
    assert (ours.permute(1, 2, 0).numpy() - expected).__abs__().max() <= 0.5 + 1e-3
    if shape == (300, 200, 3):  # noise that is averaged loses contrast, noise that is sampled not
        smooth = eval_transform(Settings(48, "square", interpolation="bilinear"))(image)
        assert ours.float().std() > 1.5 * smooth.float().std()


def test_random_interpolation_is_one_of_timms_two_for_each_image():
    image = noise(60, 80, 3)
    settings = replace(FGVC, augmentation="random-resized-crop", crop_interpolation="random")
    modes = (v1.InterpolationMode.BILINEAR, v1.InterpolationMode.BICUBIC)
    seen = []
    for seed in range(24):
        torch.manual_seed(seed)
        ours = train_transform(settings)(image)
        torch.manual_seed(seed)
        torch.multinomial(torch.tensor([0.5, 0.5]), 1)  # which one, drawn before the crop
        state = torch.get_rng_state()
        recipes = []
        for mode in modes:
            torch.set_rng_state(state)
            recipe = v1.Compose([v1.RandomResizedCrop(48, scale=(0.08, 1.0), interpolation=mode),
                                 v1.RandomHorizontalFlip()])  # fmt: skip
            recipes.append(chw(recipe(Image.fromarray(image))))
        same = [torch.equal(ours, recipe) for recipe in recipes]
        assert sum(same) == 1
        seen.append(same[0])
    assert 6 <= sum(seen) <= 18


def test_as_is():
    image = noise(32, 32, 3)
    assert torch.equal(eval_transform(Settings())(image), chw(image))
    with pytest.raises(UserError, match=r"resize 'none' needs images of 32x32 pixels.*32x40"):
        eval_transform(Settings())(noise(32, 40, 3))


def test_timm_augmentation_draws_as_the_published_recipe():
    image = noise(60, 80, 3)
    recipe = v1.Compose(
        [
            v1.RandomResizedCrop(48, scale=(0.08, 1.0), interpolation=v1.InterpolationMode.BICUBIC),
            v1.RandomHorizontalFlip(),
            v1.ColorJitter(0.4, 0.4, 0.4),
        ]
    )
    for seed in range(3):
        torch.manual_seed(seed)
        expected = chw(recipe(Image.fromarray(image)))
        torch.manual_seed(seed)
        assert torch.equal(train_transform(FGVC)(image), expected)


@pytest.mark.parametrize("augmentation", ["flip", "random-resized-crop", "timm"])
def test_randomness_comes_from_torch_alone(augmentation):
    settings = Settings(48, "shorter-side", 56, augmentation=augmentation)
    transform, image = train_transform(settings), noise(60, 80, 3)
    results = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        random.seed(len(results))
        np.random.seed(len(results))
        results.append(transform(image))
    assert all(result.shape == (3, 48, 48) for result in results)
    assert torch.equal(results[0], results[1])
    assert any(not torch.equal(results[0], other) for other in results[2:])


def test_flip_keeps_or_mirrors():
    image = noise(32, 32, 3)
    transform = train_transform(Settings(augmentation="flip"))
    seen = {transform(image).numpy().tobytes() for _ in range(32)}
    assert seen == {chw(image).numpy().tobytes(), chw(image).flip(2).numpy().tobytes()}


def test_no_augmentation_trains_as_it_evaluates():
    assert train_transform(VTAB) == eval_transform(VTAB)
    assert eval_transform(FGVC).deterministic
    assert not train_transform(FGVC).deterministic


def test_community_jpeg_is_what_pillow_writes_by_default(tmp_path):
    image = noise(32, 32, 3)
    Image.fromarray(image).save(tmp_path / "000000.jpg")
    assert np.array_equal(community_jpeg(image), np.array(Image.open(tmp_path / "000000.jpg")))


@pytest.mark.parametrize(("size", "low", "high"), [(32, 5, 11), (224, 3, 6)])
def test_community_jpeg_costs_small_images_several_grey_levels(size, low, high):
    """Measured on other photographs: 7.2 grey levels at 32 pixels, 4.1 at 224."""
    errors = [np.abs(community_jpeg(i).astype(float) - i).mean() for i in photographs(size)]
    assert low < np.mean(errors) < high


def test_jpeg_happens_once():
    image, settings = noise(32, 32, 3), Settings(pixels="community-jpeg")
    assert torch.equal(eval_transform(settings)(image), chw(community_jpeg(image)))
    assert torch.equal(eval_transform(settings, jpeg=True)(image), chw(image))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("inception", (0.5,) * 3, (0.5,) * 3),
        ("none", (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_normalisation_is_torchvisions(name, mean, std):
    batch = torch.from_numpy(noise(2, 3, 8, 8))
    before = batch.clone()
    ours = normalise(batch, Settings(normalisation=name))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, v1.functional.normalize(before.float() / 255, mean, std))
    assert torch.equal(batch, before)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"resize": "squared"}, "resize: .*'square'"),
        ({"interpolation": "cubic"}, "interpolation: .*'bicubic'"),
        ({"augmentation": "tim"}, "augmentation: .*'timm'"),
        ({"pixels": "jpeg"}, "pixels: .*'community-jpeg'"),
        ({"normalisation": "imagnet"}, "normalisation: .*'imagenet'"),
        ({"resize_size": 20}, "resize_size 20 is smaller than image_size 32"),
    ],
)
def test_unknown_settings(change, match):
    with pytest.raises(UserError, match=match):
        validate(PixelSettings, {"image_size": 32, **change}, "protocol")


@pytest.fixture
def stored(tmp_path):
    splits = {
        split: (noise(n, 32, 32, 3, seed=n), np.arange(n) % 3)
        for split, n in {"train": 8, "val": 4, "test": 6}.items()
    }
    write_labelled(tmp_path / "tiny", splits, {})
    return Prepared.open(tmp_path / "tiny")


def test_stored_arrays_are_mapped_and_protected(stored):
    split = load_split(stored.images("test"), eval_transform(Settings()))
    assert split.shape == (6, 3, 32, 32)
    assert split.stride() == (32 * 32 * 3, 1, 32 * 3, 3)  # the file's own layout: no copy
    assert torch.equal(split[4], chw(stored.image("test", 4)))
    split.zero_()
    stored.verify()


def test_load_split_of_every_kind_of_images(stored):
    for transform in (eval_transform(Settings()), eval_transform(VTAB)):
        images = stored.images("trainval")
        expected = torch.stack([transform(image) for image in images])
        assert torch.equal(load_split(images, transform), expected)
        assert torch.equal(load_split(np.stack(list(images)), transform), expected)
    with pytest.raises(UserError, match="needs images of 48x48"):
        load_split(stored.images("test"), eval_transform(Settings(48)))
    with pytest.raises(ValueError, match="random"):
        load_split(stored.images("test"), train_transform(FGVC))


def test_open_split_takes_the_form_that_fits(stored):
    images = stored.images("train")
    assert isinstance(open_split(images, eval_transform(VTAB)), torch.Tensor)
    assert isinstance(open_split(images, eval_transform(VTAB), max_bytes=10_000), Split)
    assert isinstance(open_split(images, eval_transform(Settings()), max_bytes=10), torch.Tensor)
    assert isinstance(open_split(images, train_transform(FGVC)), Split)


def epoch(split, labels=None, seed=None, **options):
    return list(batches(split, labels, 4, seed, **options))


def indices(parts):
    return torch.cat([part["index"] for part in parts]).tolist()


def test_every_image_once_and_the_last_batch_kept(stored):
    split = load_split(stored.images("trainval"), eval_transform(Settings()))[:11]
    labels = stored.labels("trainval")[:11]
    for seed in (None, 0):
        parts = epoch(split, labels, seed)
        assert [len(part["image"]) for part in parts] == [4, 4, 3]
        assert sorted(indices(parts)) == list(range(11))
        for part in parts:
            assert part["image"].dtype == torch.uint8
            assert part["image"].is_contiguous()
            assert torch.equal(part["image"], split[part["index"]])
            assert part["label"].tolist() == labels[part["index"].numpy()].tolist()
    assert indices(epoch(split)) == list(range(11))
    assert "label" not in epoch(split)[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_normalised_on_the_way_is_normalised_after(stored, threads, monkeypatch):
    """Bit for bit, whether image by image or whole batches."""
    from snella.data import transforms

    monkeypatch.setattr(transforms, "LARGE_NUMBERS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for split in (
        load_split(stored.images("trainval"), eval_transform(VTAB)),
        Split(stored.images("trainval"), train_transform(FGVC)),
    ):
        plain = epoch(split, stored.labels("trainval"), seed=4)
        done = epoch(split, stored.labels("trainval"), seed=4, settings=VTAB)
        for a, b in zip(plain, done, strict=True):
            mean, std = (torch.tensor(x).view(3, 1, 1) for x in NORMALISATIONS["imagenet"])
            assert torch.equal((a["image"].float() / 255 - mean) / std, b["image"])
            assert torch.equal(a["index"], b["index"]) and torch.equal(a["label"], b["label"])


def test_order_depends_on_the_seed_alone(stored):
    split = load_split(stored.images("trainval"), eval_transform(Settings()))
    first = indices(epoch(split, seed=5))
    torch.manual_seed(99)
    assert indices(epoch(split, seed=5)) == first
    assert indices(epoch(split, seed=6)) != first
    lazy = Split(stored.images("trainval"), train_transform(FGVC))
    assert indices(epoch(lazy, seed=5)) == first


def test_labels_must_fit(stored):
    with pytest.raises(ValueError, match="6 images but 4 labels"):
        batches(torch.zeros(6, 3, 2, 2), stored.labels("val"), 4)


def test_lazy_and_materialised_splits_agree(stored):
    transform = eval_transform(VTAB)
    images = stored.images("trainval")
    for a, b in zip(
        epoch(load_split(images, transform), seed=1),
        epoch(Split(images, transform), seed=1),
        strict=True,
    ):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["index"], b["index"])


def test_augmented_epoch_is_the_same_for_any_number_of_workers(stored):
    split = Split(stored.images("trainval"), train_transform(FGVC))
    torch.manual_seed(0)
    alone = epoch(split, seed=3, workers=0)
    after = torch.rand(1)
    torch.manual_seed(0)
    helped = epoch(split, seed=3, workers=2)
    assert torch.equal(torch.rand(1), after)
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a["image"], b["image"])
    other = epoch(split, seed=4)
    first = [part["image"][part["index"] == 0] for part in other if 0 in part["index"]]
    again = [part["image"][part["index"] == 0] for part in alone if 0 in part["index"]]
    assert not torch.equal(first[0], again[0])


def test_unshuffled_augmentation_follows_the_global_seed(stored):
    split = Split(stored.images("val"), train_transform(FGVC))
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(epoch(split)[0]["image"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_transforms_pickle_after_use():
    transform = train_transform(FGVC)
    image = noise(60, 80, 3)
    transform(image)
    again = pickle.loads(pickle.dumps(transform))
    torch.manual_seed(0)
    expected = transform(image)
    torch.manual_seed(0)
    assert torch.equal(again(image), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", list(NORMALISATIONS))
def test_large_images_are_normalised_alike(name, threads):
    settings = PixelSettings(normalisation=name)
    images = torch.randint(0, 256, (5, 3, 112, 112), dtype=torch.uint8)
    index = torch.tensor([3, 0, 3])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for given in (images, images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
            assert torch.equal(take(given, index, settings), normalise(given[index], settings))
    finally:
        torch.set_num_threads(before)
