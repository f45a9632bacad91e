"""Budget schedules, Algorithm 1, importance scores."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from snella.equations.allocation import SCHEDULES, Importance, Schedule, allocate, allocate_released
from snella.errors import UserError

LAYERS = st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10_000)), min_size=1, max_size=12)
ANY_SCORE = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.just(0.0))


def algorithm_1(scores: list[float], sizes: list[int], budget: float) -> list[float]:
    """The paper's pseudocode, in real numbers, layers of zero importance left out."""
    granted = [0.0] * len(sizes)
    scores = list(scores)
    remaining = float(budget)
    while remaining > 1e-9 * max(1.0, budget) and sum(scores) > 0:
        total = sum(scores)
        for i, size in enumerate(sizes):
            share = scores[i] / total
            granted[i] = min(granted[i] + share * remaining, size)
        for i, size in enumerate(sizes):
            if granted[i] >= size:
                scores[i] = 0.0
        remaining = budget - sum(granted)
    return granted


@settings(max_examples=300, deadline=None)
@given(LAYERS, st.floats(0, 1))
def test_algorithm_1(layers: list[tuple[float, int]], share: float) -> None:
    scores, sizes = [s for s, _ in layers], [n for _, n in layers]
    # Brute force in floating point needs importances that do not differ by 300 orders.
    assume(all(s > 1e-6 for s in scores))
    budget = int(share * sum(sizes))
    granted = allocate(scores, sizes, budget)
    assert sum(granted) == budget
    for value, reference in zip(granted, algorithm_1(scores, sizes, budget), strict=True):
        assert abs(value - reference) <= 1 + 1e-6 * reference


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ANY_SCORE, st.integers(0, 5000)), min_size=1, max_size=9), st.data())
def test_any_scores_give_exact_feasible_budgets(
    layers: list[tuple[float, int]], data: st.DataObject
) -> None:
    scores, sizes = [s for s, _ in layers], [n for _, n in layers]
    budget = data.draw(st.integers(0, sum(sizes) + 10))
    granted = allocate(scores, sizes, budget)
    assert sum(granted) == min(budget, sum(sizes))
    assert all(0 <= g <= n for g, n in zip(granted, sizes, strict=True))
    released = allocate_released(scores, sizes, budget)
    assert all(0 <= g <= n for g, n in zip(released, sizes, strict=True))


def test_surplus_of_full_layers_goes_to_the_others_in_proportion() -> None:
    assert allocate([10, 1, 1], [100, 1000, 1000], 500) == [100, 200, 200]
    assert allocate([1, 1, 1], [10, 10, 10], 10) == [4, 3, 3]


def test_unusable_scores() -> None:
    assert allocate([math.nan, math.inf, 0.0], [100, 200, 300], 60) == [10, 20, 30]
    assert allocate([math.nan, 1.0, -math.inf], [100, 200, 300], 60) == [0, 60, 0]
    # What a single important layer cannot take still goes somewhere.
    assert allocate([0.0, 1.0], [100, 50], 80) == [30, 50]


def test_wrong_usage() -> None:
    with pytest.raises(UserError, match="2 scores for 1 layers"):
        allocate([1, 2], [3], 1)
    with pytest.raises(UserError, match="must not be negative"):
        allocate([1], [3], -1)
    with pytest.raises(UserError, match="Did you mean 'cubic'"):
        Schedule(1, 1, "cubik")
    with pytest.raises(UserError, match="interval must be at least 1"):
        Schedule(1, 1, interval=0)
    with pytest.raises(UserError, match="beta1 must lie in"):
        Importance(beta1=1.5)


@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize("reach_target", [True, False])
def test_schedules_fall_from_start_to_target(shape: str, reach_target: bool) -> None:
    schedule = Schedule(1000, 100, shape, warmup=2, cooldown=3, reach_target=reach_target)
    budgets = [schedule.budget(t, 20) for t in range(20)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == (100 if shape == "constant" else 1000)
    assert budgets[-1] == 100
    assert not schedule.reallocates(0, 20) and schedule.reallocates(19, 20)


def test_steeper_schedules_prune_earlier() -> None:
    budgets = [Schedule(1000, 0, s).budget(5, 11) for s in ("linear", "quadratic", "cubic")]
    assert budgets == [500, 250, 125]


def test_only_reach_target_ends_at_the_target_without_cooldown() -> None:
    assert Schedule(1000, 100).budget(9, 10) == 100
    assert Schedule(1000, 100, "linear", reach_target=False).budget(9, 10) == 190
    assert Schedule(1000, 100).budget(0, 1) == 1000


def steps(count: int, seed: int = 0) -> list[tuple[list[Tensor], list[Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 1, 3, 2), (2, 1, 4, 2)]

    def draw() -> list[Tensor]:
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    return [(draw(), draw()) for _ in range(count)]


def test_smoothing_follows_equations_8_to_11() -> None:
    importance = Importance(0.7, 0.6)
    sensitivity = uncertainty = None
    for factors, grads in steps(4):
        importance.update(factors, grads)
        current = (factors[0] * grads[0]).abs()
        if sensitivity is None:
            sensitivity, uncertainty = current, torch.zeros_like(current)
        else:
            sensitivity = 0.7 * sensitivity + 0.3 * current
            uncertainty = 0.6 * uncertainty + 0.4 * (sensitivity - current).abs()
    torch.testing.assert_close(importance.sensitivity[0], sensitivity)
    torch.testing.assert_close(importance.uncertainty[0], uncertainty)
    expected = (sensitivity * uncertainty).mean((1, 2, 3))
    torch.testing.assert_close(importance.scores()[0], expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_dropped_and_counted(bad: float) -> None:
    clean, disturbed = Importance(), Importance()
    for i, (factors, grads) in enumerate(steps(6)):
        if i in (0, 3):
            grads[1].view(-1)[2] = bad
        else:
            clean.update(factors, grads)
        disturbed.update(factors, grads)
    assert disturbed.skipped == 2 and clean.skipped == 0
    for a, b in zip(clean.scores(), disturbed.scores(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_zeroing_entries_keeps_the_rest_of_the_step(bad: float) -> None:
    importance = Importance(skip_nonfinite=False, from_first=False)
    for factors, grads in steps(3):
        grads[0].view(-1)[0] = bad
        importance.update(factors, grads)
    assert importance.skipped == 0
    assert float(importance.sensitivity[0].view(-1)[0]) == 0
    assert all(score.isfinite().all() and (score > 0).all() for score in importance.scores())


def test_resumed_averages_are_bit_identical() -> None:
    through, first, second = Importance(), Importance(), Importance()
    for factors, grads in steps(6):
        through.update(factors, grads)
    for factors, grads in steps(6)[:3]:
        first.update(factors, grads)
    second.load_state_dict(first.state_dict(), steps(1)[0][0])
    for factors, grads in steps(6)[3:]:
        second.update(factors, grads)
    for a, b in zip(through.scores(), second.scores(), strict=True):
        assert a.equal(b)
    fresh = Importance()
    assert fresh.state_dict() == {}
    second.load_state_dict({}, [])
    assert second.sensitivity == []
