"""Segmentation metrics: the authors' golden values, maintained libraries, and edge cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from snella.models.sam import mask_loss
from snella.tasks.segmentation.collapse import collapsed
from snella.tasks.segmentation.metrics import (
    Counts,
    boundary_f,
    mean_absolute_error,
    s_measure,
)

GOLDEN = Path(__file__).parent / "golden" / "spt_gps"
ZERO = Counts(0, 0, 0)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "segmentation_metrics.npz", allow_pickle=False))


@pytest.fixture(scope="module")
def counts(golden: dict[str, np.ndarray]) -> list[Counts]:
    pairs = zip(golden["pred_binary"], golden["mask_binary"], strict=True)
    return [Counts.of(predicted, true) for predicted, true in pairs]


def test_released_metric_is_the_released_scripts(golden, counts) -> None:
    dice, iou = sum(counts, ZERO).foreground_recall
    assert dice == pytest.approx(float(golden["released_dice"]), rel=1e-12)
    assert iou == pytest.approx(float(golden["released_iou"]), rel=1e-12)
    single = np.array([c.foreground_recall for c in counts])
    np.testing.assert_allclose(single[:, 0], golden["released_dice_single_image"], rtol=1e-12)
    np.testing.assert_allclose(single[:, 1], golden["released_iou_single_image"], rtol=1e-12)


def test_dice_and_iou_are_the_released_function_without_ignored_pixels(golden, counts) -> None:
    pooled = sum(counts, ZERO)
    assert pooled.dice == pytest.approx(golden["no_ignore_dice_per_class"][1], rel=1e-12)
    assert pooled.iou == pytest.approx(golden["no_ignore_iou_per_class"][1], rel=1e-12)
    for got, name in (("dice", "dice"), ("iou", "iou")):
        expected = golden[f"no_ignore_{name}_single_image"]
        np.testing.assert_allclose([getattr(c, got) for c in counts], expected, rtol=1e-12)


def test_dice_and_iou_are_scikit_learns() -> None:
    from sklearn.metrics import f1_score, jaccard_score

    rng = np.random.default_rng(0)
    for share in (0.05, 0.5, 0.9):
        predicted, true = rng.random((2, 23, 17)) < share
        got = Counts.of(predicted, true)
        assert got.dice == pytest.approx(f1_score(true.ravel(), predicted.ravel()))
        assert got.iou == pytest.approx(jaccard_score(true.ravel(), predicted.ravel()))


def test_foreground_everywhere_is_perfect_as_released_and_below_half_by_ours(golden) -> None:
    """The released evaluation never counts a false positive."""
    everything = [Counts.of(np.ones_like(true), true) for true in golden["mask_binary"]]
    assert sum(everything, ZERO).foreground_recall == (1.0, 1.0)
    assert float(golden["released_dice_all_foreground"]) == 1.0
    assert sum(everything, ZERO).dice < 0.5 and sum(everything, ZERO).iou < 0.5
    assert np.mean([c.dice for c in everything]) < 0.5
    # and so for a prediction that merely paints too much
    true = np.zeros((40, 40), dtype=bool)
    true[15:25, 15:25] = True
    much = np.zeros_like(true)
    much[3:35, 3:35] = True
    assert Counts.of(much, true).foreground_recall == (1.0, 1.0)
    assert Counts.of(much, true).dice < 0.5


def test_empty_masks_have_a_definite_value() -> None:
    empty, some = np.zeros((4, 4), dtype=bool), np.eye(4, dtype=bool)
    assert (Counts.of(empty, empty).dice, Counts.of(empty, empty).iou) == (1.0, 1.0)
    assert Counts.of(some, empty).dice == Counts.of(empty, some).dice == 0.0
    assert np.isnan(Counts.of(some, empty).foreground_recall).all()
    assert boundary_f(empty, empty, 1) == 1.0 and boundary_f(some, empty, 1) == 0.0
    with pytest.raises(ValueError, match="differ in shape"):
        Counts.of(empty, np.zeros((4, 5), dtype=bool))


def test_salience_is_the_released_codes_after_its_normalisation(golden) -> None:
    """The released validation stretches each map to [0, 1] first; ours does not."""
    for expected, i in zip(
        golden["salience_s_e_wf_mae"], golden["salience_image_index"], strict=True
    ):
        level, true = golden["probabilities"][i].astype(np.float64), golden["mask_binary"][i]
        stretched = (level - level.min()) / (level.max() - level.min())
        assert s_measure(stretched, true) == pytest.approx(expected[0], abs=1e-7)
        assert mean_absolute_error(stretched, true) == pytest.approx(expected[3], abs=1e-7)


def test_salience_is_pysodmetrics() -> None:
    """Values of PySODMetrics 1.6.2 for eight maps of 256 levels."""
    stored = np.load(GOLDEN / "pysodmetrics.npz", allow_pickle=False)
    for levels, true, (s, mae) in zip(
        stored["maps"], stored["masks"], stored["s_mae"], strict=True
    ):
        assert s_measure(levels / 255, true) == pytest.approx(s, abs=1e-9)
        assert mean_absolute_error(levels / 255, true) == pytest.approx(mae, abs=1e-9)


def test_s_measure_without_foreground_and_with_nothing_else() -> None:
    level = np.full((5, 5), 0.25)
    assert s_measure(level, np.zeros((5, 5), dtype=bool)) == pytest.approx(0.75)
    assert s_measure(level, np.ones((5, 5), dtype=bool)) == pytest.approx(0.25)


def test_boundary_f_by_hand() -> None:
    true = np.zeros((30, 30), dtype=bool)
    true[10:20, 10:20] = True
    assert boundary_f(true, true, 1) == 1.0
    shifted = np.roll(true, 1, axis=0)
    assert boundary_f(shifted, true, 1) == 1.0
    far = np.roll(true, 3, axis=0)
    # 16 of the 36 boundary pixels of either square are within one pixel of the other's
    near = {tuple(p) for p in np.argwhere(_ring(far))}
    ring = {tuple(p) for p in np.argwhere(_ring(true))}
    within = sum(any(abs(a - c) + abs(b - d) <= 1 for c, d in ring) for a, b in near)
    assert boundary_f(far, true, 1) == pytest.approx(within / len(near))


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 2**0.5, 3.3, 10.0])
def test_boundary_f_is_that_of_a_distance_map(tolerance: float) -> None:
    """As DAVIS's evaluation finds it: the distance of every pixel to the other boundary."""
    from scipy.ndimage import binary_erosion, distance_transform_edt

    rng = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.7):
        ours, true = rng.random((2, 29, 41)) < share
        a, b = (mask & ~binary_erosion(mask, border_value=1) for mask in (ours, true))
        precision = (distance_transform_edt(~b)[a] <= tolerance).mean()
        recall = (distance_transform_edt(~a)[b] <= tolerance).mean()
        expected = 2 * precision * recall / (precision + recall)
        assert boundary_f(ours, true, tolerance) == pytest.approx(expected, rel=1e-12)


def _ring(mask: np.ndarray) -> np.ndarray:
    from scipy.ndimage import binary_erosion

    return mask & ~binary_erosion(mask)


def test_loss_is_the_released_training_loss(golden) -> None:
    logits = torch.tensor(golden["logits"], requires_grad=True)
    loss = mask_loss(logits, torch.tensor(golden["masks"]), reduce=False)
    np.testing.assert_allclose(loss.detach(), golden["loss_total"], rtol=1e-6)
    loss.sum().backward()
    np.testing.assert_allclose(logits.grad, golden["loss_total_grad"], atol=1e-9)


def test_an_empty_mask_that_nothing_is_predicted_for_has_a_finite_loss() -> None:
    logits = torch.full((1, 8, 8), -200.0, requires_grad=True)  # a sigmoid of exactly zero
    loss = mask_loss(logits, torch.zeros(1, 8, 8))
    loss.backward()
    assert loss.item() == 1.0 and torch.isfinite(logits.grad).all()


def test_collapse_is_empty_or_full_masks_for_most_images() -> None:
    for word, shares in (("empty", [0.0, 0.0005, 0.2]), ("full", [1.0, 0.97, 0.1])):
        pairs = [(share, 0.3) for share in shares]
        found = collapsed(pairs) or ""
        assert f"masks of most images are {word}" in found
        assert ";" not in found and found == collapsed(pairs[:2])  # a table counts equal ones
    assert collapsed([(0.0, 0.3), (0.2, 0.3), (0.3, 0.3)]) is None and collapsed([]) is None


def test_images_without_foreground_and_tiny_objects_are_no_collapse() -> None:
    assert collapsed([(0.0, 0.0), (0.0, 0.0), (0.3, 0.3)]) is None  # rightly empty
    assert collapsed([(0.0004, 0.0005), (0.0006, 0.0005)]) is None
    assert "empty" in (collapsed([(0.0, 0.0005), (0.0, 0.0008)]) or "")  # missed all the same
    assert collapsed([(1.0, 1.0), (0.99, 0.97)]) is None
