"""Predictions as files: exact, resumable after a kill, scored without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from snella.data.prepared import Prepared, write_prepared
from snella.errors import UserError
from snella.tasks.segmentation import TASK
from snella.tasks.segmentation.masks import encode_mask
from snella.tasks.segmentation.predictions import (
    RECORDS,
    Index,
    Writer,
    read_predictions,
)
from snella.tasks.segmentation.score import SegmentationScorer

SIZES = [(20, 31), (17, 17), (40, 8), (9, 9), (24, 24)]
INDEX = Index(len(SIZES), 16, 8, "model")


def masks(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random(size) < 0.4 for size in SIZES]


def model_size(mask: np.ndarray) -> np.ndarray:
    return np.resize(mask, (16, 16))


def levels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)


def write(folder: Path, found: list[np.ndarray], index: Index = INDEX) -> int:
    """Append what is missing; return how many records were there already."""
    with Writer(folder, index) as writer:
        start = writer.done
        for i in range(start, len(found)):
            writer.append(found[i], model_size(found[i]), levels(i) if index.map_size else None)
    return start


def test_predictions_come_back_exactly(tmp_path: Path) -> None:
    write(tmp_path, masks())
    for i, (prediction, mask) in enumerate(
        zip(read_predictions(tmp_path, SIZES), masks(), strict=True)
    ):
        np.testing.assert_array_equal(prediction.mask, mask)
        np.testing.assert_array_equal(prediction.model_mask, model_size(mask))
        np.testing.assert_array_equal(prediction.probabilities, levels(i))


@pytest.mark.parametrize("cut", [0, 3, 9, 60, 120, -1])
def test_a_killed_prediction_resumes_without_repeating_images(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "whole", masks())
    whole = (tmp_path / "whole" / RECORDS).read_bytes()
    write(tmp_path / "cut", masks()[:3])
    data = (tmp_path / "cut" / RECORDS).read_bytes()
    (tmp_path / "cut" / RECORDS).write_bytes(data[:cut])
    with pytest.raises(UserError, match="of 5 images; run it again to resume"):
        list(read_predictions(tmp_path / "cut", SIZES))
    done = write(tmp_path / "cut", masks())
    assert done == (2 if cut == -1 else sum(cut >= end for end in _ends(data)))
    assert (tmp_path / "cut" / RECORDS).read_bytes() == whole


def _ends(data: bytes) -> list[int]:
    ends, at = [], 0
    while at < len(data):
        at += 8 + int.from_bytes(data[at : at + 4], "little")
        ends.append(at)
    return ends


def test_damaged_records_and_another_models_are_not_resumed(tmp_path: Path) -> None:
    write(tmp_path, masks())
    data = bytearray((tmp_path / RECORDS).read_bytes())
    data[_ends(bytes(data))[1] + 12] ^= 1
    (tmp_path / RECORDS).write_bytes(bytes(data))
    assert write(tmp_path, masks()) == 2
    other = Index(len(SIZES), 16, 8, "another model")
    assert write(tmp_path, masks(1), other) == 0
    first = next(read_predictions(tmp_path, SIZES[:1] * 1))
    np.testing.assert_array_equal(first.mask, masks(1)[0])


def test_predictions_of_other_images_are_refused(tmp_path: Path) -> None:
    write(tmp_path, masks())
    with pytest.raises(UserError, match="bytes"):
        list(read_predictions(tmp_path, [(99, 99), *SIZES[1:]]))
    with pytest.raises(UserError, match="holds no predictions"):
        list(read_predictions(tmp_path / "none", SIZES))
    (tmp_path / RECORDS).unlink()
    with pytest.raises(UserError, match="predictions for 0 of 5 images; run it again"):
        list(read_predictions(tmp_path, SIZES))


# ---------------------------------------------------------------------------------- scoring


@pytest.fixture
def data(tmp_path: Path) -> Prepared:
    """Five images of different sizes, a disc in each; the last test image is of another set."""
    rng = np.random.default_rng(0)
    splits = {}
    for split in ("train", "val", "test"):
        splits[split] = {
            "image": [_png(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES],
            "mask": [encode_mask(disc(size)) for size in SIZES],
            "size": np.array(SIZES, dtype=np.int32),
            "name": [f"{split}{i}".encode() for i in range(len(SIZES))],
            "test_set": np.array([0, 0, 0, 0, int(split == "test")], dtype=np.int64),
        }
    info = {"name": "discs", "test_sets": ["own", "other"], "pool_test_sets": False}
    write_prepared(tmp_path / "discs", splits, sealed=("mask",), info=info)
    return Prepared.open(tmp_path / "discs")


def _png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def disc(size: tuple[int, int], scale: float = 0.35) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    middle = (size[0] - 1) / 2, (size[1] - 1) / 2
    return np.hypot(y - middle[0], x - middle[1]) < scale * min(size)


def scorer(data: Prepared, **settings) -> SegmentationScorer:
    return SegmentationScorer(data, TASK.settings(image_size=16, **settings))


def predict(folder: Path, found: list[np.ndarray], maps: list[np.ndarray] | None = None) -> Path:
    from snella.tasks.segmentation.masks import resize_mask

    size = 0 if maps is None else maps[0].shape[0]
    with Writer(folder, Index(len(found), 16, size, "m")) as writer:
        for i, mask in enumerate(found):
            writer.append(mask, resize_mask(mask, 16), None if maps is None else maps[i])
    return folder


def test_a_perfect_prediction_has_perfect_scores(data: Prepared, tmp_path: Path) -> None:
    truth = [disc(size) for size in SIZES]
    scores = scorer(data).score(predict(tmp_path / "p", truth), "test")
    assert all(score.value == 1.0 for score in scores.values())
    assert {"s-measure", "mae"} & set(scores) == set()  # no probability maps were stored
    assert set(scores) | {"s-measure", "mae"} == {metric.name for metric in TASK.metrics}


def test_over_segmentation_is_perfect_only_as_released(data: Prepared, tmp_path: Path) -> None:
    everything = [np.ones(size, dtype=bool) for size in SIZES]
    scores = scorer(data).score(predict(tmp_path / "p", everything), "test")
    assert scores["released-dice"].value == scores["released-iou"].value == 1.0
    for name in ("dice", "iou", "dice-pooled", "iou-pooled", "dice-model-size", "boundary-f"):
        assert scores[name].value < 0.5, name
    assert scores["dice"].value == pytest.approx(
        np.mean([2 * disc(s).mean() / (1 + disc(s).mean()) for s in SIZES[:4]]), abs=1e-6
    )
    assert "most images are full" in scores["dice"].warnings[0]


def test_test_sets_are_groups_and_the_own_one_is_the_value(data: Prepared, tmp_path: Path) -> None:
    truth = [disc(size) for size in SIZES]
    truth[4] = ~truth[4]
    scores = scorer(data).score(predict(tmp_path / "p", truth), "test")
    assert scores["dice"].value == 1.0 and scores["iou-pooled"].value == 1.0
    assert scores["dice"].per_group == {"own": 1.0, "other": 0.0}
    assert scores["dice"].per_example is not None and len(scores["dice"].per_example) == 4


def test_the_threshold_is_chosen_on_the_validation_split(data: Prepared, tmp_path: Path) -> None:
    """Maps that are right above 0.2 only; the test masks as stored would be empty."""
    maps = [np.where(_small(size), 0.25 * 255, 0.1 * 255).astype(np.uint8) for size in SIZES]
    empty = [np.zeros(size, dtype=bool) for size in SIZES]
    for split in ("val", "test"):
        predict(tmp_path / split, empty, maps)
    assert scorer(data).score(tmp_path / "test", "test")["dice"].value == 0.0
    chosen = scorer(data, threshold="val").score(tmp_path / "test", "test")
    assert chosen["dice"].value > 0.85 and "s-measure" in chosen and chosen["mae"].value < 0.5
    predict(tmp_path / "alone" / "test", empty, maps)
    with pytest.raises(UserError, match="threshold: val needs"):
        scorer(data, threshold="val").score(tmp_path / "alone" / "test", "test")


def test_a_trial_of_a_search_chooses_its_threshold_on_its_own_images(
    data: Prepared, tmp_path: Path
) -> None:
    """Validation images play its test split; there are no others that it may see."""
    trial = Prepared.open(data.folder, "val")
    faint = [(disc(size) * 80).astype(np.uint8) for size in [(32, 32)] * len(SIZES)]
    empty = [np.zeros(size, bool) for size in SIZES]
    folder = predict(tmp_path / "test", empty, faint)
    assert scorer(trial).score(folder, "test")["dice"].value == 0.0
    scores = scorer(trial, threshold="val").score(folder, "test")
    assert scores["dice"].value > 0.6
    assert all(set(score.per_group) == {"own"} for score in scores.values())  # no further sets


def _small(size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    picture = Image.fromarray(disc(size).astype(np.float32))
    return np.asarray(picture.resize((32, 32), Image.Resampling.BOX)) > 0.5


def test_chance_is_foreground_everywhere(data: Prepared) -> None:
    shares = [disc(size).mean() for size in SIZES[:4]]  # of the own test set, as the value is
    assert scorer(data).chance()["dice"] == pytest.approx(
        np.mean([2 * share / (1 + share) for share in shares])
    )


@pytest.mark.parametrize("wrong", [0.0, 1.0, "best"])
def test_a_wrong_threshold_is_refused(wrong) -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="threshold"):
        TASK.settings(threshold=wrong)
