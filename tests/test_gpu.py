"""Triton kernels: equal to plain autograd, exact in selection, and compiled for a GPU without one.

Checks of results run on the GPU if there is one, and always under Triton's interpreter, which takes
tensors on the CPU. It must be chosen before Triton is imported: hence a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snella.backends import gpu
from snella.backends.update import Update, effective_weight
from snella.equations import sparsify
from snella.equations.kernels import Kernel, initial_factor, merge
from snella.equations.sparsify import Selection
from snella.tuner.functional import merged_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or the interpreter"
)
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks under the interpreter, so that small matrices have several."""
    if INTERPRETED:
        monkeypatch.setattr(gpu, "interpreted", True)
        for name, size in {"ROWS": 8, "COLUMNS": 16, "NARROW": 16, "FLAT": 128}.items():
            monkeypatch.setattr(gpu, name, size)
    monkeypatch.setattr(gpu, "_broken", [])
    gpu._plan.cache_clear()
    yield
    gpu._plan.cache_clear()


def problem(
    kernel: Kernel, slices: int = 3, inputs: int = 20, outputs: int = 12
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, A, B and scalars."""
    torch.manual_seed(0)
    scalars = torch.tensor(list(kernel.scalars.values()) * slices)
    tensors = (
        torch.randn(slices * outputs, inputs),
        initial_factor(kernel, slices, inputs) * 20,
        initial_factor(kernel, slices, outputs) * 20,
        scalars + 0.1 * torch.rand(len(scalars)),
    )
    return tuple(tensor.to(DEVICE) for tensor in tensors)  # type: ignore[return-value]


def plain(update: Update, tensors: tuple[Tensor, ...], dense: Tensor) -> tuple[Tensor, Any]:
    """(S, its gradients) in double precision, by ordinary operations and autograd."""
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    merged = merge(update.kernel, leaves[0], leaves[1], leaves[2].view(len(leaves[0]), -1))
    parts = [
        sparsify.sparsify(matrix, budget, update.form)
        for matrix, budget in zip(merged, update.budgets, strict=True)
    ]
    delta = torch.cat(parts) * update.scale
    gradients = torch.autograd.grad(delta, leaves, dense.double(), allow_unused=True)
    return delta.detach(), gradients


def compare(
    update: Update, weight: Tensor | None, *tensors: Tensor, tolerance: float = 1e-4
) -> Tensor:
    """Both directions against plain autograd, and against themselves; returns W + S."""
    a, b, _ = tensors
    dense = torch.randn(b.shape[0] * b.shape[2], a.shape[2], device=DEVICE).to(a.dtype)
    delta, references = plain(update, tensors, dense)
    expected = delta if weight is None else weight + delta
    effective = gpu.effective_weight(update, weight, *tensors, torch.float32)
    torch.testing.assert_close(effective.double(), expected, rtol=tolerance, atol=tolerance)
    again, gradients = gpu.contract(update, dense, weight, *tensors, True, torch.float32)
    assert torch.equal(effective, again), "forward and backward keep the same entries"
    for gradient, reference, tensor in zip(gradients, references, tensors, strict=True):
        assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype
        if reference is not None and reference.numel():
            scale = tolerance * max(float(reference.abs().max()), 1e-3)
            torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=scale)
    _, repeated = gpu.contract(update, dense, weight, *tensors, False, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(gradients, repeated, strict=True))
    return effective


@on_device
@pytest.mark.parametrize("form", sparsify.FORMS)
@pytest.mark.parametrize(
    ("name", "temperature", "learned"),
    [("mix-k", True, True), ("mix-k", False, False), ("piecewise-linear", False, True)],
)
def test_equals_plain_autograd(name: str, temperature: bool, learned: bool, form: str) -> None:
    kernel = Kernel(name, 4, temperature=temperature, learnable_coefficients=learned)
    budgets = [0, 100] if learned else [180, 1]
    update = Update(kernel, form, budgets, scale=0.7 if learned else 1.0)
    compare(update, *problem(kernel, slices=2, inputs=20, outputs=9))
    if form != "none":
        assert update.selections is not None and update.constants.selections is update.selections


@on_device
def test_pieces_ranks_and_shapes() -> None:
    for pieces, rank, shape in [(1, 1, (1, 5, 3)), (3, 6, (1, 18, 9))]:
        kernel = Kernel("mix-k", rank, pieces, temperature=True)
        total = shape[1] * shape[2]
        tensors = problem(kernel, *shape)
        compare(Update(kernel, "paper", [total // 3] * shape[0]), None, *tensors[1:])
    kernel = Kernel("piecewise-linear", 2, learnable_coefficients=False)
    compare(Update(kernel, "paper", [50, 60]), *problem(kernel, 2))


@on_device
def test_nothing_kept_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("mix-k", 4)
    weight, *tensors = problem(kernel)
    monkeypatch.setattr(gpu, "_launch", None)
    update = Update(kernel, "paper", [0, 0, 0])
    assert torch.equal(gpu.effective_weight(update, weight, *tensors, torch.float32), weight)
    assert not gpu.effective_weight(update, None, *tensors, torch.bfloat16).any()
    effective, gradients = gpu.contract(update, weight, None, *tensors, False, torch.float32)
    assert effective is None and not any(gradient.any() for gradient in gradients)


@on_device
def test_half_precision_is_rounded_once() -> None:
    kernel = Kernel("mix-k", 4)
    weight, *tensors = problem(kernel)
    tensors = [tensor.bfloat16() for tensor in tensors]
    update = Update(kernel, "released", [10, 100, 239])
    base, dense = weight.bfloat16(), torch.randn_like(weight).bfloat16()
    exact = gpu.effective_weight(update, base, *tensors, torch.float32)
    rounded = gpu.effective_weight(update, base, *tensors, torch.bfloat16)
    if INTERPRETED:  # it truncates
        torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0.0)
    else:
        assert torch.equal(rounded, exact.bfloat16())
    again, gradients = gpu.contract(update, dense, base, *tensors, True, torch.bfloat16)
    assert torch.equal(again, rounded)
    single = [tensor.float() for tensor in tensors]
    _, expected = gpu.contract(update, dense.float(), base, *single, True, torch.float32)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, reference.bfloat16(), rtol=0.01, atol=1e-6)


@on_device
@pytest.mark.parametrize("form", ["paper", "released"])
def test_ties_and_exact_budgets(form: str) -> None:
    kernel = Kernel("piecewise-linear", 2)
    weight, a, b, scalars = problem(kernel, slices=2)
    update = Update(kernel, form, [100, 7])
    compare(update, weight, a.sign() * 0.5, b.sign(), scalars)
    assert update.selections is not None and all(s.cut > 0 for s in update.selections)
    kernel = Kernel("mix-k", 4)
    _, *tensors = problem(kernel)
    update = Update(kernel, form, [11, 100, 239])
    delta = gpu.effective_weight(update, None, *tensors, torch.float32)
    assert [int((part != 0).sum()) for part in delta.chunk(3)] == update.budgets


@on_device
def test_large_logits_do_not_overflow() -> None:
    kernel = Kernel("mix-k", 4, temperature=True)
    weight, a, b, scalars = problem(kernel)
    compare(Update(kernel, "paper", [9, 50, 240]), weight, a * 1e3, b, scalars, tolerance=1e-3)


@on_device
@pytest.mark.parametrize("name", ["piecewise-linear", "mix-k"])
def test_nan_is_passed_on(name: str) -> None:
    kernel = Kernel(name, 4)
    weight, a, b, scalars = problem(kernel)
    a[1, 0, 3, 0] = torch.nan
    update = Update(kernel, "paper", [5, 5, 5])
    for _ in range(2):
        effective = gpu.effective_weight(update, weight, a, b, scalars, torch.float32)
        assert [bool(part.isnan().any()) for part in effective.chunk(3)] == [False, True, False]
    _, gradients = gpu.contract(update, weight, weight, a, b, scalars, True, torch.float32)
    assert gradients[0][1].isnan().any() and gradients[0][::2].isfinite().all()


@on_device
def test_selections_found_elsewhere() -> None:
    kernel = Kernel("mix-k", 4)
    weight, *tensors = problem(kernel, slices=2)
    update = Update(kernel, "paper", [9, 50])
    expected = gpu.effective_weight(update, weight, *tensors, torch.float32)
    found = update.selections
    assert found is not None
    numbers = [Selection(float(s.threshold), int(s.cut), float(s.subtracted)) for s in found]
    for selections, constants in ((numbers, None), (list(found), update.constants)):
        other = Update(kernel, "paper", [9, 50], selections=selections, constants=constants)
        again, _ = gpu.contract(other, weight, weight, *tensors, True, torch.float32)
        assert torch.equal(again, expected)


def select(matrices: Tensor, budgets: list[int]) -> tuple[list[Selection], Tensor]:
    """Selections and W · |W| of given matrices, (slices, out, in), instead of merged ones."""
    kernel = Kernel("piecewise-linear", 2)
    slices, outputs, inputs = matrices.shape
    a, b = (torch.zeros(slices, 2, n, 1, device=DEVICE) for n in (inputs, outputs))
    update = Update(kernel, "released", budgets)
    layer = gpu._Layer(update, a, b, a.new_zeros(2 * slices))
    workspace = torch.zeros(slices, gpu.WORDS, dtype=torch.int32, device=DEVICE)
    digits = (matrices.flatten(1).view(torch.int32) & 0x7FFFFFFF) >> 23
    for row, values in zip(workspace, digits, strict=True):
        row[:256] = torch.bincount(values, minlength=256)
    out = torch.empty_like(matrices)
    constants = layer.prepare(None)
    layer.select(constants, matrices, workspace, None, out)
    assert constants.selections is not None
    return constants.selections, out


def check_selection(matrices: Tensor, budgets: list[int]) -> None:
    """Against ``snella.equations.sparsify``."""
    actual, out = select(matrices.to(DEVICE), budgets)
    total = matrices[0].numel()
    for matrix, budget, found, kept in zip(matrices, budgets, actual, out, strict=True):
        expected = sparsify.select(matrix, budget)
        if budget == 0:
            expected = sparsify.select_all_or_nothing(False, matrix)
        numbers = float(found.threshold), int(found.cut), float(found.subtracted)
        assert numbers == (expected.threshold, expected.cut, expected.subtracted), (budget, total)
        reference = sparsify.sparsify(matrix, budget, "released")
        torch.testing.assert_close(kept.cpu(), reference, rtol=0, atol=0, equal_nan=True)


@on_device
def test_selection_of_random_matrices() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(6, 13, 40)
    matrices[3:] = matrices[3:].round(decimals=1)
    check_selection(matrices, [0, 1, 519, 520, 200, 300])
    check_selection(matrices[2:] * 1e-30, [260, 7, 519, 0])
    check_selection(torch.tensor([[[0.0] * 300], [[1.5] * 300]]), [150, 1])
    infinite = torch.tensor([[[torch.inf, 1.0, -torch.inf, 0.0]]])
    check_selection(infinite, [1])


@on_device
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_selection_of_any_matrix(data: Any) -> None:
    few = st.sampled_from([0.0, -1.0, 1.0, 1.0000001, -2.5, 1e-40, 3e38])
    number = few if data.draw(st.booleans()) else st.floats(-4, 4, width=32)
    inputs = data.draw(st.sampled_from([1, 3, 50]))
    values = data.draw(st.lists(number, min_size=inputs * 6, max_size=inputs * 6))
    budgets = [data.draw(st.integers(0, inputs * 3)) for _ in range(2)]
    check_selection(torch.tensor(values).view(2, 3, inputs), budgets)


@on_device
def test_a_failure_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("mix-k", 4)
    weight, *tensors = problem(kernel)
    update = Update(kernel, "paper", [1, 2, 3])
    assert gpu.usable(update, tensors[0])
    monkeypatch.setattr(gpu, "_kernels", object)
    with (
        pytest.warns(UserWarning, match="runs without Triton kernels: they failed here") as log,
        pytest.raises(gpu.Broken),
    ):
        gpu.effective_weight(Update(kernel, "none", [1, 2, 3]), weight, *tensors, torch.float32)
    assert len(log) == 1 and not gpu.usable(update, tensors[0])


def through_autograd(update: Update, weight: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Output and gradients of the tuner's operation."""
    torch.manual_seed(1)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    x = torch.randn(5, weight.shape[1], device=DEVICE, requires_grad=True)
    y = merged_linear(x, weight, None, *leaves, update)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *leaves])]


@on_device
@pytest.mark.parametrize("broken", [False, True])
def test_served_to_the_tuner_if_asked_for(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, budgets = Kernel("mix-k", 4), [10, 100, 239]
    tensors = problem(kernel)
    expected = through_autograd(Update(kernel, "paper", budgets, compile=False), *tensors)
    update = Update(kernel, "paper", budgets, compile=True)
    effective_weight(update, *tensors)
    assert isinstance(update.constants, gpu.Constants)
    if broken:  # from here on; the forward that has been is not lost

        def fail(*_: Any, **__: Any) -> None:
            raise gpu.Broken(gpu._warn(RuntimeError("no driver")))

        monkeypatch.setattr(gpu, "_launch", fail)
        with pytest.warns(UserWarning, match="no driver"):
            actual = through_autograd(update, *tensors)
    else:
        actual = through_autograd(update, *tensors)
    for mine, reference in zip(actual, expected, strict=True):
        scale = 1e-4 * float(reference.detach().abs().max())
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=scale)


@on_device
def test_served_are_piecewise_kernels_in_single_precision() -> None:
    a = problem(Kernel("mix-k", 4))[1]
    assert gpu.usable(Update(Kernel("mix-k", 4), "paper", [1, 2, 3]), a)
    assert not gpu.usable(Update(Kernel("mix-k", 4), "paper", [1, 2, 3]), a.double())
    assert not gpu.usable(Update(Kernel("sigmoid", 4), "paper", [1, 2, 3]), a)


def test_the_cpu_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", False)
    assert not gpu.usable(Update(Kernel("mix-k", 4), "paper", [1]), torch.zeros(1, 2, 3, 2))


@on_gpu
def test_layers_of_real_size() -> None:
    kernel = Kernel("mix-k", 8, temperature=True)
    for slices, inputs, outputs in [(3, 768, 768), (1, 768, 3072), (1, 3072, 768)]:
        tensors = problem(kernel, slices, inputs, outputs)
        update = Update(kernel, "paper", [inputs * outputs // 10] * slices)
        compare(update, *tensors, tolerance=1e-3)


@on_gpu
def test_selection_beyond_the_integers_of_single_precision() -> None:
    torch.manual_seed(0)
    matrices = torch.randint(0, 50, (1, 4097, 4100)).float()
    check_selection(matrices, [2**24 - 12345])


@on_gpu
def test_no_waiting_and_graph_capture() -> None:
    kernel = Kernel("mix-k", 8)
    weight, *tensors = problem(kernel, 3, 96, 64)
    dense = torch.randn_like(weight)

    def step() -> tuple[Tensor, ...]:
        update = Update(kernel, "paper", [100, 0, 6144])
        effective = gpu.effective_weight(update, weight, *tensors, torch.bfloat16)
        again, gradients = gpu.contract(update, dense, weight, *tensors, True, torch.bfloat16)
        assert again is not None
        return effective, again, *gradients

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    tensors[0].mul_(1.5)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))


TYPES = {"ranks": "*i32", "workspace": "*i32", "cuts": "*i32", "counts": "*i32", "scale": "fp32"}
TYPES |= {"out": "*bf16", "dense": "*bf16"}
NUMBERS = {"words", "inputs", "outputs", "height", "splits", "total"}
NUMBERS |= {"size_a", "size_b", "column_blocks", "row_blocks"}
BLOCK, NARROW = {"ROWS": 64, "COLUMNS": 64}, {"ROWS": 64, "COLUMNS": 32}
FULL = {"PIECES": 2, "COORDINATES": 4, "MIXED": 1, "TEMPERATURE": 1, "LEARNED": 1}
LEAN = {"PIECES": 2, "COORDINATES": 5, "MIXED": 0, "TEMPERATURE": 0, "LEARNED": 0}
ABSENT = {"ranks": None, "softmax": None, "numbers": None, "cuts": None, "weighted": None}
COMPILED: list[tuple[str, dict[str, Any]]] = [
    ("prepare", FULL | NARROW),
    ("merge", FULL | BLOCK),
    ("second", {"BLOCK": 4096}),
    ("third", {"BLOCK": 4096}),
    ("select", {"BLOCK": 4096}),
    ("finish", {"BLOCK": 4096, "FORM": "paper"}),
    ("apply", FULL | NARROW | {"FORM": "paper", "COMBINE": False}),
    ("apply", FULL | NARROW | {"FORM": "released", "COMBINE": True, "dense": None}),
    (
        "apply",
        LEAN | NARROW | ABSENT | {"FORM": "none", "COMBINE": True, "dense": None, "base": None},
    ),
    ("contract", FULL | BLOCK | {"FORM": "paper"}),
    ("contract", LEAN | BLOCK | ABSENT | {"FORM": "none"}),
    ("gather", {"BLOCK": 64, "SCALARS": 5}),
]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_kernels_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For compute capability 9.0 (H100, H200), without one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from snella.backends import triton as gpu_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, constants in COMPILED:
        function = getattr(gpu_kernels, name)
        signature = {
            argument: "constexpr"
            if argument in constants
            else TYPES.get(argument, "i32" if argument in NUMBERS else "*fp32")
            for argument in function.arg_names
        }
        aligned = {
            (k,): [["tt.divisibility", 16]]
            for k, argument in enumerate(function.arg_names)
            if signature[argument] not in ("constexpr", "fp32") and argument != "splits"
        }
        source = ASTSource(function, signature, constants, aligned)
        options = {"num_warps": 8 if "BLOCK" in constants else 4, "enable_fp_fusion": False}
        kernel = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert "cubin" in kernel.asm, name
