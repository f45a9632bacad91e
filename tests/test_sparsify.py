"""Selection of exactly b entries, both sparse forms and their gradients."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from snella.equations import sparsify as module
from snella.equations.sparsify import (
    Region,
    budget_from_sparsity,
    factors,
    keep_mask,
    select,
    sparsify,
)
from snella.errors import UserError

# Integers give many ties, reals none.
VALUES = st.one_of(st.integers(-4, 4).map(float), st.floats(-1e6, 1e6, width=32))
MATRICES = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=VALUES)


def largest(matrix: Tensor, budget: int) -> Tensor:
    """Brute force: sort by magnitude, then by flat index, keep the first ``budget``."""
    magnitude = matrix.abs().flatten().tolist()
    order = sorted(range(len(magnitude)), key=lambda i: (-magnitude[i], i))
    mask = torch.zeros(len(magnitude), dtype=torch.bool)
    mask[order[:budget]] = True
    return mask.view_as(matrix)


@settings(max_examples=200, deadline=None)
@given(MATRICES, st.data())
def test_selection_equals_brute_force(values: np.ndarray, data: st.DataObject) -> None:
    matrix = torch.from_numpy(values)
    budget = data.draw(st.integers(0, matrix.numel()))
    selection = select(matrix, budget, data.draw(st.sampled_from([None, torch.empty_like(matrix)])))
    expected = largest(matrix, budget)
    assert keep_mask(matrix, selection).equal(expected)
    if 0 < budget < matrix.numel():
        on_device = module._select_on_device(matrix.abs().flatten(), budget)
        assert keep_mask(matrix, on_device).equal(expected)
        assert float(on_device.subtracted) == selection.subtracted


@settings(max_examples=100, deadline=None)
@given(MATRICES, st.data(), st.sampled_from(["paper", "released"]))
def test_exactly_b_nonzero_entries(values: np.ndarray, data: st.DataObject, form: str) -> None:
    matrix = torch.from_numpy(values)
    matrix[matrix.abs() < 1e-3] = 1.0  # neither zeros nor squares that underflow
    budget = data.draw(st.integers(0, matrix.numel()))
    kept = sparsify(matrix, budget, form)
    assert (kept != 0).equal(largest(matrix, budget))
    assert int((kept != 0).sum()) == budget


@settings(max_examples=100, deadline=None)
@given(MATRICES, st.data(), st.sampled_from(["paper", "released"]))
def test_factors_equal_definition_and_its_autograd(
    values: np.ndarray, data: st.DataObject, form: str
) -> None:
    matrix = torch.from_numpy(values).double().requires_grad_()
    budget = data.draw(st.integers(0, matrix.numel()))
    expected = sparsify(matrix, budget, form)
    (slope,) = torch.autograd.grad(expected.sum(), matrix)
    plain = matrix.detach()
    selection = select(plain, budget)
    rows, columns = plain.shape
    split = data.draw(st.integers(1, columns))
    for span in (slice(0, split), slice(split, columns)):
        part = plain[:, span].contiguous()
        if not part.numel():
            continue
        region = Region(slice(0, rows), span, columns)
        buffers = torch.empty_like(part), torch.empty_like(part)
        amount, actual_slope = factors(part, selection, form, *buffers, region)
        torch.testing.assert_close(part * amount, expected[:, span].detach())
        torch.testing.assert_close(actual_slope, slope[:, span])


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_keeps_exactly_b(dtype: torch.dtype, form: str) -> None:
    matrix = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    for budget in (0, 1, 1000, 3071, 3072):
        assert int(keep_mask(matrix, select(matrix, budget)).sum()) == budget
        assert int((sparsify(matrix, budget, form) != 0).sum()) == budget


def test_ties_are_broken_by_index() -> None:
    matrix = torch.tensor([[1.0, -2.0, 2.0], [2.0, -2.0, 0.5]])
    kept = sparsify(matrix, 2, "released")
    assert kept.tolist() == [[0.0, -4.0, 4.0], [0.0, 0.0, 0.0]]
    # All equal magnitudes at the threshold: the soft form measures from the next one below, 1.
    assert sparsify(matrix, 2, "paper").tolist() == [[0.0, -2.0, 2.0], [0.0, 0.0, 0.0]]


def test_more_than_two_to_the_24_entries() -> None:
    total = 2**24 + 11
    matrix = torch.arange(total, dtype=torch.float64).flip(0)
    for budget in (2, total // 3, total - 1):
        assert select(matrix, budget).threshold == total - budget - 1


def test_gradient_of_the_paper_form_by_finite_differences() -> None:
    """Where the threshold's own entry is not moved, Eq. 13 is smooth."""
    matrix = torch.linspace(-2, 3, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    threshold = select(matrix, 5).threshold
    mask = (matrix.detach().abs() != threshold).double()
    constant = matrix.detach() * (1 - mask)
    assert torch.autograd.gradcheck(lambda x: sparsify(x * mask + constant, 5, "paper"), matrix)


def test_released_form_has_half_of_the_true_derivative() -> None:
    matrix = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    sparsify(matrix, 30, "released").sum().backward()
    torch.testing.assert_close(matrix.grad, matrix.detach().abs())


def test_none_keeps_everything() -> None:
    matrix = torch.randn(3, 3)
    assert sparsify(matrix, 0, "none") is matrix


@pytest.mark.parametrize("rule", ["exact", "quantile"])
def test_budget_from_sparsity(rule: str) -> None:
    assert budget_from_sparsity(1.0, 1000, rule) == 0
    assert budget_from_sparsity(0.0, 1000, rule) == (1000 if rule == "exact" else 999)
    assert budget_from_sparsity(0.9, 1000, rule) == 100
    # 1 - b/N always gives b back, as in the released allocator.
    assert all(budget_from_sparsity(1 - b / 589, 589, rule) == b for b in range(1, 589))


def test_wrong_usage() -> None:
    matrix = torch.randn(3, 3)
    with pytest.raises(UserError, match=r"sparsity must lie in \[0, 1\], got 1.5"):
        budget_from_sparsity(1.5, 9)
    with pytest.raises(UserError, match="budget must lie in"):
        select(matrix, 10)
    with pytest.raises(UserError, match="Did you mean 'released'"):
        sparsify(matrix, 3, "release")
    with pytest.raises(UserError, match="Unknown budget rule"):
        budget_from_sparsity(0.5, 9, "round")


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_not_a_number_is_passed_on(share: float) -> None:
    """A diverged training must reach the loss as NaN, not end in the selection."""
    merged = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    merged.view(-1)[: int(share * merged.numel())] = float("nan")
    for form in ("paper", "released"):
        assert sparsify(merged, 300, form).isnan().any()
