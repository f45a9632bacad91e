"""Kernels: formulas against plain loops, gradients, tiles against the formulas, expressivity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from snella.backends import tiles
from snella.backends.scratch import Scratch
from snella.equations.kernels import KERNELS, PIECEWISE, Kernel, initial_factor, merge
from snella.errors import UserError

CHOICES = [
    Kernel(name, 6, 3, learnable, temperature)
    for name, learnable, temperature in itertools.product(KERNELS, (True, False), (True, False))
    if name in PIECEWISE or (learnable and not temperature)
]


def label(kernel: Kernel) -> str:
    learnable = "learnable" if kernel.learnable_coefficients else "fixed"
    return f"{kernel.name}-{learnable}{'-temperature' * kernel.temperature}"


def draw(
    kernel: Kernel, slices: int = 2, inputs: int = 7, outputs: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Random A, B and scalars in double precision, away from their initial values."""
    generator = torch.Generator().manual_seed(0)
    shape = slices, kernel.pieces, inputs, kernel.coordinates
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    b = torch.randn((*shape[:2], outputs, shape[3]), generator=generator, dtype=torch.float64)
    initial = torch.tensor(list(kernel.scalars.values()), dtype=torch.float64)
    noise = torch.rand(slices, len(initial), generator=generator, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_(), (initial + 0.2 * noise).requires_grad_()


def by_loops(kernel: Kernel, a: Tensor, b: Tensor, scalars: Tensor) -> list[list[float]]:
    """Table 14 and Eq. 6 for one slice, one entry at a time."""
    names = dict(zip(kernel.scalars, scalars.tolist(), strict=True))
    inputs, outputs = a.shape[1], b.shape[1]

    def linear(o: int, i: int) -> float:
        total = 0.0
        for p, fixed in enumerate(kernel.coefficients):
            distance = math.dist(b[p, o].tolist(), a[p, i].tolist())
            total += names.get(f"coefficient_{p}", fixed) * distance
        return total

    def product(o: int, i: int) -> float:
        return float(b[0, o] @ a[0, i])

    def square(o: int, i: int) -> float:
        return math.dist(b[0, o].tolist(), a[0, i].tolist()) ** 2

    def entry(o: int, i: int) -> float:
        if kernel.name == "linear":
            return product(o, i)
        if kernel.name == "piecewise-linear":
            return linear(o, i)
        scale, offset = names["scale"], names["offset"]
        if kernel.name == "sigmoid":
            return scale / (1 + math.exp(-names["slope"] * product(o, i))) + offset
        if kernel.name == "rbf":
            return scale * math.exp(-names["slope"] * square(o, i)) + offset
        if kernel.name == "rbf-normalised":
            column = [math.exp(-names["slope"] * square(k, i)) for k in range(outputs)]
            return scale * column[o] / sum(column) + offset
        temperature = names.get("temperature", 1.0)
        column = [math.exp(linear(k, i) / temperature) for k in range(outputs)]
        return linear(o, i) + scale * column[o] / sum(column) + offset

    return [[entry(o, i) for i in range(inputs)] for o in range(outputs)]


@pytest.mark.parametrize("kernel", CHOICES, ids=label)
def test_formula_entry_by_entry(kernel: Kernel) -> None:
    a, b, scalars = draw(kernel)
    a, b, scalars = a.detach(), b.detach(), scalars.detach()
    merged = merge(kernel, a, b, scalars)
    for s in range(2):
        expected = torch.tensor(by_loops(kernel, a[s], b[s], scalars[s]), dtype=torch.float64)
        torch.testing.assert_close(merged[s], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", CHOICES, ids=label)
def test_gradients_by_finite_differences(kernel: Kernel) -> None:
    leaves = draw(kernel, slices=1, inputs=4, outputs=3)
    used = leaves if leaves[2].numel() else leaves[:2]
    assert torch.autograd.gradcheck(
        lambda *x: merge(kernel, *(x if len(x) == 3 else (*x, leaves[2]))), used
    )


@pytest.mark.parametrize("tile_size", [40, 10**6], ids=["tiled", "whole"])
@pytest.mark.parametrize("kernel", CHOICES, ids=label)
def test_tiles_equal_formula_and_its_autograd(
    kernel: Kernel, tile_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", tile_size)
    a, b, scalars = draw(kernel, inputs=37, outputs=11)
    check_tiles(kernel, a, b, scalars)


def check_tiles(kernel: Kernel, a: Tensor, b: Tensor, scalars: Tensor) -> None:
    expected = merge(kernel, a, b, scalars)
    upstream = torch.randn_like(expected)
    leaves = [leaf for leaf in (a, b, scalars) if leaf.numel()]
    gradients = torch.autograd.grad(expected, leaves, upstream)
    evaluator = tiles.tiles(kernel, a.detach(), b.detach(), scalars.detach())
    scratch = Scratch.like(a, a.dtype)
    for span in evaluator.spans():
        where = span.slices, slice(None), span.columns
        tile = evaluator.tile(span, scratch)
        torch.testing.assert_close(tile.merged, expected[where].detach(), rtol=1e-10, atol=1e-12)
        evaluator.backward(span, tile, upstream[where].clone())
    for actual, reference in zip(evaluator.gradients(), gradients, strict=False):
        torch.testing.assert_close(actual, reference, rtol=1e-8, atol=1e-10)


def test_large_logits_do_not_overflow() -> None:
    kernel = Kernel("mix-k", 4, 2, temperature=True)
    a, b, scalars = draw(kernel)
    with torch.no_grad():
        scalars[:, kernel.scalar_index["temperature"]] = 1e-4
    check_tiles(kernel, a, b, scalars)


@pytest.mark.parametrize("name", PIECEWISE)
def test_coincident_points_have_finite_gradients(name: str) -> None:
    kernel = Kernel(name, 4)
    a, b, scalars = draw(kernel)
    with torch.no_grad():
        b[:, :, 3] = a[:, :, 5]
        b[1].zero_()
        a[1].zero_()
    evaluator = tiles.tiles(kernel, a.detach(), b.detach(), scalars.detach())
    for span in evaluator.spans():
        tile = evaluator.tile(span, Scratch.like(a, a.dtype))
        torch.testing.assert_close(
            tile.merged, merge(kernel, a, b, scalars).detach(), atol=1e-6, rtol=0
        )
        evaluator.backward(span, tile, torch.ones_like(tile.merged))
    assert all(gradient.isfinite().all() for gradient in evaluator.gradients())


def test_softmax_normalises_every_input_over_outputs() -> None:
    kernel = Kernel("mix-k", 8, learnable_coefficients=False)
    a, b, _ = draw(kernel)
    with_softmax = merge(kernel, a, b, torch.tensor([[2.0, 0.0]] * 2, dtype=torch.float64))
    without = merge(kernel, a, b, torch.tensor([[0.0, 0.0]] * 2, dtype=torch.float64))
    torch.testing.assert_close((with_softmax - without).sum(1), torch.full((2, 7), 2.0).double())


def test_initial_factors_follow_the_released_bounds() -> None:
    factor = initial_factor(Kernel("mix-k", 32), 1, 768)
    assert factor.shape == (1, 2, 768, 16)
    assert float(factor.abs().max()) == pytest.approx(1 / math.sqrt(768 * 16), rel=1e-3)


def test_single_precision_stays_close_to_double() -> None:
    kernel = Kernel("mix-k", 8)
    a, b = initial_factor(kernel, 1, 64), initial_factor(kernel, 1, 48)
    scalars = torch.tensor([list(kernel.scalars.values())])
    evaluator = tiles.tiles(kernel, a, b, scalars)
    (span,) = evaluator.spans()
    tile = evaluator.tile(span, Scratch.like(a, a.dtype))
    exact = merge(kernel, a.double(), b.double(), scalars.double())
    assert float((tile.merged - exact).abs().max() / exact.abs().max()) < 1e-6


def test_reduced_matmul_precision_leaves_distances_alone() -> None:
    kernel = Kernel("mix-k", 8)
    a, b = initial_factor(kernel, 1, 64), initial_factor(kernel, 1, 48)
    evaluator = tiles.tiles(kernel, a, b, torch.tensor([list(kernel.scalars.values())]))
    (span,) = evaluator.spans()
    scratch = Scratch.like(a, a.dtype)
    expected = evaluator.tile(span, scratch).merged.clone()
    torch.set_float32_matmul_precision("medium")
    try:
        assert evaluator.tile(span, scratch).merged.equal(expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-6))


def test_merged_matrix_has_a_higher_rank_than_lora() -> None:
    """The premise of the paper: a nonlinear kernel turns rank r into (here) full rank."""
    for name, expected in (("linear", 4), ("piecewise-linear", 24), ("mix-k", 24)):
        kernel = Kernel(name, 4)
        a, b, scalars = draw(kernel, 1, 24, 24)
        assert rank(merge(kernel, a, b, scalars)[0].detach()) == expected


def fit(name: str, target: Tensor) -> float:
    """Mean squared error after fitting a random matrix by gradient descent (Figure 4b)."""
    kernel = Kernel(name, 4)
    torch.manual_seed(1)
    size = len(target)
    a, b = (torch.randn(1, kernel.pieces, size, kernel.coordinates) for _ in range(2))
    scalars = torch.tensor([list(kernel.scalars.values())])
    leaves = [leaf.requires_grad_() for leaf in (a, b, scalars) if leaf.numel()]
    optimizer = torch.optim.Adam(leaves, lr=0.05)
    for _ in range(200):
        loss = (merge(kernel, a, b, scalars)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_nonlinear_kernels_fit_random_matrices_better_than_lora() -> None:
    target = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    linear, mixed = fit("linear", target), fit("mix-k", target)
    assert mixed < linear < target.square().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixk", 8), "Did you mean 'mix-k'"),
        (("mix-k", 9), "rank 9 is not divisible by pieces 2"),
        (("mix-k", 0), "rank must be a positive integer"),
        (("piecewise-linear", 8, 3), "not divisible"),
    ],
)
def test_wrong_settings_say_what_to_do(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Kernel(*arguments)
