"""Protocol: consistent settings, and learning-rate schedules that do what they say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from snella.runs.protocol import Protocol

GOLDEN = Path(__file__).parent / "golden" / "snella" / "lr_schedule.npz"


def test_released_schedule_meets_the_authors_code():
    golden = np.load(GOLDEN)
    for k, (base, epochs) in enumerate(zip(golden["base_lr"], golden["epochs"], strict=True)):
        protocol = Protocol(
            lr=float(base), epochs=int(epochs), schedule="released",
            warmup_epochs=int(golden["warmup_epochs"]), warmup_lr=float(golden["warmup_lr"]),
            min_lr=float(golden["min_lr"]),
        )  # fmt: skip
        ours = [protocol.lr * protocol.lr_factor(e, 0.5) for e in range(int(epochs))]
        np.testing.assert_allclose(ours, golden[f"lr_{k}"], rtol=1e-12)


def test_cosine_reaches_the_stated_rate_after_the_warm_up_and_the_floor_at_the_end():
    p = Protocol(lr=1e-3, epochs=100, warmup_epochs=10, warmup_lr=1e-6, min_lr=1e-5)
    assert p.lr_factor(0, 0.0) * p.lr == pytest.approx(1e-6)
    assert p.lr_factor(5, 0.0) * p.lr == pytest.approx((1e-6 + 1e-3) / 2)
    assert p.lr_factor(10, 0.0) == pytest.approx(1.0)
    assert p.lr_factor(55, 0.0) * p.lr == pytest.approx((1e-3 + 1e-5) / 2)
    assert p.lr_factor(99, 1.0) * p.lr == pytest.approx(1e-5)
    factors = [p.lr_factor(e, s / 4) for e in range(10, 100) for s in range(4)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "released", "linear", "constant"])
def test_a_rate_below_the_floor_is_never_raised(schedule):
    p = Protocol(lr=1e-7, epochs=20, warmup_epochs=2, schedule=schedule)
    rates = [p.lr_factor(e, 0.0) for e in range(20)]
    assert all(math.isfinite(f) and f <= 1 for f in rates)


def test_val_selection_needs_held_out_val_images():
    with pytest.raises(ValidationError, match="'train'"):
        Protocol(selection="val", train_split="trainval")
    Protocol(selection="val", train_split="train")


def test_the_last_epoch_is_always_evaluated():
    p = Protocol(epochs=7, warmup_epochs=0, evaluate_every=3)
    assert [e for e in range(7) if p.looks(e, 7)] == [2, 5, 6]


def test_warm_up_must_end():
    with pytest.raises(ValidationError, match="warmup_epochs"):
        Protocol(epochs=5, warmup_epochs=5)


def test_steps_decide_the_number_of_epochs():
    assert Protocol(steps=500).total_epochs(3) == 167
    assert Protocol(epochs=7, warmup_epochs=1).total_epochs(3) == 7


@pytest.mark.parametrize("field", ["lr", "weight_decay", "min_lr"])
def test_infinite_rates_are_refused(field):
    with pytest.raises(ValidationError, match=field):
        Protocol(**{field: math.inf})
