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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from snella.backends import gpu
from snella.backends.update import Found, Update
from snella.equations import sparsify
from snella.equations.kernels import Kernel, initial_factor, merge
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
        blocks = dict.fromkeys(gpu.BLOCKS, (8, 16, 4)) | {"contract": (16, 16, 1)}
        monkeypatch.setattr(gpu, "BLOCKS", blocks)
        monkeypatch.setattr(gpu, "FLAT", 256)
    monkeypatch.setattr(gpu, "_broken", [])
    forget = (gpu.plan_of, gpu._say)
    for function in forget:
        function.cache_clear()
    gpu._counters.clear()
    yield
    for function in forget:
        function.cache_clear()


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


def by_autograd(
    update: Update, budgets: list[int], tensors: tuple[Tensor, ...], dense: Tensor
) -> tuple[Tensor, Any]:
    """(S, its gradients) in double precision, by ordinary operations and autograd."""
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    merged = merge(update.kernel, leaves[0], leaves[1], leaves[2].view(len(leaves[0]), -1))
    parts = [
        sparsify.sparsify(matrix, budget, update.form)
        for matrix, budget in zip(merged, budgets, strict=True)
    ]
    delta = torch.cat(parts) * update.scale
    gradients = torch.autograd.grad(delta, leaves, dense.double(), allow_unused=True)
    return delta.detach(), gradients


def forward(
    update: Update,
    budgets: list[int],
    weight: Tensor | None,
    *tensors: Tensor,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Found]:
    counts = torch.tensor(budgets, device=DEVICE)
    return gpu.effective_weight(update, weight, *tensors, counts, dtype)


def compare(
    update: Update,
    budgets: list[int],
    weight: Tensor | None,
    *tensors: Tensor,
    tolerance: float = 1e-4,
) -> Found:
    """Both directions against plain autograd, and against themselves; returns what was found."""
    a, b, _ = tensors
    dense = torch.randn(b.shape[0] * b.shape[2], a.shape[2], device=DEVICE).to(a.dtype)
    delta, references = by_autograd(update, budgets, tensors, dense)
    expected = delta if weight is None else weight + delta
    # The second time, compiled kernels are started on the short way; the interpreter has none.
    for _ in range(1 if INTERPRETED else 2):
        effective, found = forward(update, budgets, weight, *tensors)
        torch.testing.assert_close(effective.double(), expected, rtol=tolerance, atol=tolerance)
        again, gradients = gpu.contract(update, found, dense, weight, *tensors, True, torch.float32)
        assert torch.equal(effective, again), "other entries in backward"
        for gradient, reference, tensor in zip(gradients, references, tensors, strict=True):
            assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype
            if reference is not None and reference.numel():
                scale = tolerance * max(float(reference.abs().max()), 1e-3)
                torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=scale)
        _, repeated = gpu.contract(update, found, dense, weight, *tensors, False, torch.float32)
        assert all(torch.equal(*pair) for pair in zip(gradients, repeated, strict=True))
    return found


@on_device
@pytest.mark.parametrize("form", sparsify.FORMS)
@pytest.mark.parametrize(
    ("name", "temperature", "learned"),
    [("mix-k", True, True), ("mix-k", False, False), ("piecewise-linear", False, True)],
)
def test_equals_plain_autograd(name: str, temperature: bool, learned: bool, form: str) -> None:
    kernel = Kernel(name, 4, temperature=temperature, learnable_coefficients=learned)
    budgets = [0, 100] if learned else [180, 1]
    update = Update(kernel, form, scale=0.7 if learned else 1.0)
    compare(update, budgets, *problem(kernel, slices=2, inputs=20, outputs=9))


@on_device
def test_pieces_ranks_and_shapes() -> None:
    for pieces, rank, shape in [(1, 1, (1, 5, 3)), (3, 6, (1, 18, 9))]:
        kernel = Kernel("mix-k", rank, pieces, temperature=True)
        total = shape[1] * shape[2]
        tensors = problem(kernel, *shape)
        compare(Update(kernel, "paper"), [total // 3] * shape[0], None, *tensors[1:])
    kernel = Kernel("piecewise-linear", 2, learnable_coefficients=False)
    compare(Update(kernel, "paper"), [50, 60], *problem(kernel, 2))


@on_device
def test_nothing_kept() -> None:
    kernel = Kernel("mix-k", 4)
    weight, a, *rest = problem(kernel)
    a[0, 0, 0, 0] = torch.nan
    effective, found = forward(Update(kernel, "paper"), [0, 0, 0], weight, a, *rest)
    assert torch.equal(effective, weight)
    _, gradients = gpu.contract(
        Update(kernel, "paper"), found, weight, None, a, *rest, False, torch.float32
    )
    assert not any(gradient.any() for gradient in gradients)


@on_device
def test_half_precision_is_rounded_once() -> None:
    kernel, budgets = Kernel("mix-k", 4), [10, 100, 239]
    weight, *tensors = problem(kernel)
    tensors = [tensor.bfloat16() for tensor in tensors]
    update = Update(kernel, "released")
    base, dense = weight.bfloat16(), torch.randn_like(weight).bfloat16()
    exact, _ = forward(update, budgets, base, *tensors)
    rounded, found = forward(update, budgets, base, *tensors, dtype=torch.bfloat16)
    if INTERPRETED:  # it truncates
        torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0.0)
    else:
        assert torch.equal(rounded, exact.bfloat16())
    again, gradients = gpu.contract(update, found, dense, base, *tensors, True, torch.bfloat16)
    assert torch.equal(again, rounded)
    single = [tensor.float() for tensor in tensors]
    _, expected = gpu.contract(update, found, dense.float(), base, *single, True, torch.float32)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, reference.bfloat16(), rtol=0.01, atol=1e-6)


@on_device
@pytest.mark.parametrize("form", ["paper", "released"])
def test_ties_and_exact_budgets(form: str) -> None:
    kernel = Kernel("piecewise-linear", 2)
    weight, a, b, scalars = problem(kernel, slices=2)
    update = Update(kernel, form)
    found = compare(update, [100, 7], weight, a.sign() * 0.5, b.sign(), scalars)
    assert (found.selection[2] > 0).all()
    kernel = Kernel("mix-k", 4)
    _, *tensors = problem(kernel)
    delta, _ = forward(Update(kernel, form), [11, 100, 239], None, *tensors)
    assert [int((part != 0).sum()) for part in delta.chunk(3)] == [11, 100, 239]


@on_device
def test_large_logits_do_not_overflow() -> None:
    kernel = Kernel("mix-k", 4, temperature=True)
    weight, a, b, scalars = problem(kernel)
    tensors = weight, a * 1e3, b, scalars
    compare(Update(kernel, "paper"), [9, 50, 240], *tensors, tolerance=1e-3)
    scalars[2::5] = -0.02  # and the other way
    tensors = weight, a * 10, b, scalars
    compare(Update(kernel, "paper"), [9, 50, 240], *tensors, tolerance=1e-3)


@on_device
@pytest.mark.parametrize("name", ["piecewise-linear", "mix-k"])
def test_nan_is_passed_on(name: str) -> None:
    kernel = Kernel(name, 4)
    weight, a, b, scalars = problem(kernel)
    a[1, 0, 3, 0] = torch.nan
    update = Update(kernel, "paper")
    for _ in range(1 if INTERPRETED else 2):
        effective, found = forward(update, [5, 5, 5], weight, a, b, scalars)
        assert [bool(part.isnan().any()) for part in effective.chunk(3)] == [False, True, False]
    _, gradients = gpu.contract(update, found, weight, weight, a, b, scalars, True, torch.float32)
    assert gradients[0][1].isnan().any() and gradients[0][::2].isfinite().all()


@pytest.fixture
def long_rows(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of one row, in few blocks, as each costs the interpreter milliseconds."""
    if INTERPRETED:
        monkeypatch.setattr(gpu, "BLOCKS", dict.fromkeys(gpu.BLOCKS, (1, 512, 4)))
        monkeypatch.setattr(gpu, "FLAT", 512)


def points(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and scalars of one coordinate whose merged matrices are these: one row per slice."""
    slices, outputs, inputs = matrices.shape
    assert outputs == 1
    a = torch.zeros(slices, 1, inputs, 1)
    a[:, 0, :, 0] = matrices[:, 0]
    return a, torch.zeros(slices, 1, 1, 1), torch.ones(slices)


def select(matrices: Tensor, budgets: list[int]) -> tuple[Tensor, Tensor]:
    """(4, slices) and W · |W| of |matrices|."""
    update = Update(Kernel("piecewise-linear", 1, 1), "released")
    out, found = forward(update, budgets, None, *(t.to(DEVICE) for t in points(matrices)))
    return found.selection.cpu(), out.cpu()


def check_selection(values: Tensor, budgets: list[int]) -> None:
    """Against ``snella.equations.sparsify``."""
    matrices = values.flatten(1).unsqueeze(1)
    merged = distances(matrices)
    selection, out = select(matrices, budgets)
    rows = zip(merged.unbind(), budgets, selection.unbind(1), out, strict=True)
    for matrix, budget, (threshold, subtracted, cut, kept_entries), kept in rows:
        assert int(kept_entries) == budget
        if budget:
            expected = sparsify.select(matrix, budget)
            numbers = (
                float(threshold.view(torch.float32)) if threshold >= 0 else -1.0,
                int(cut),
                float(subtracted.view(torch.float32)),
            )
            assert numbers == (expected.threshold, expected.cut, expected.subtracted)
        else:
            assert int(cut) == -1
        reference = sparsify.sparsify(matrix, budget, "released")
        torch.testing.assert_close(kept[None], reference, rtol=0, atol=0, equal_nan=True)


def distances(matrices: Tensor) -> Tensor:
    """What the kernels make of ``points``: √x² of normal numbers, near |x|."""
    update = Update(Kernel("piecewise-linear", 1, 1), "none")
    out, _ = forward(update, [1] * len(matrices), None, *(t.to(DEVICE) for t in points(matrices)))
    return out.cpu().unsqueeze(1)


@on_device
def test_selection_of_random_matrices(long_rows: None) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(6, 13, 40)
    matrices[3:] = matrices[3:].round(decimals=1)
    check_selection(matrices, [0, 1, 519, 520, 200, 300])
    check_selection(matrices[2:] * 1e-10, [260, 7, 519, 0])
    check_selection(torch.tensor([[[0.0] * 300], [[1.5] * 300]]), [150, 1])
    check_selection(torch.tensor([[[torch.inf, 1.0, -torch.inf, 0.0]]]), [2])


@on_device
def test_selection_without_a_window_or_with_full_buckets(long_rows: None) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1, 1, 6000)
    for budget in (1, 3000, 5990):
        check_selection(matrix, [budget])
    check_selection((matrix * 3).round() / 3 + 1, [2500])  # few values: one bucket holds thousands
    for counter in gpu._counters.values():
        counter += 1  # as programs of another stream do: the window is chosen too early
    check_selection(matrix, [2000])


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
@pytest.mark.parametrize("kept", [1, 5999])
def test_few_entries_kept_or_dropped_need_no_search(
    kept: int, long_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that lose the competition keep few entries, in every step; a search takes long."""
    from snella.backends.triton import selection

    def search(*_: Any) -> None:
        raise AssertionError("searches the whole matrix")

    monkeypatch.setattr(selection, "_search", search)
    torch.manual_seed(0)
    check_selection(torch.randn(1, 1, 6000), [kept])


@on_device
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_selection_of_any_matrix(long_rows: None, data: Any) -> None:
    few = st.sampled_from([0.0, -1.0, 1.0, 1.0000001, -2.5, 1e-15, 1e15])
    number = few if data.draw(st.booleans()) else st.floats(-4, 4, width=32)
    inputs = data.draw(st.sampled_from([1, 3, 50]))
    values = data.draw(st.lists(number, min_size=inputs * 6, max_size=inputs * 6))
    budgets = [data.draw(st.integers(0, inputs * 3)) for _ in range(2)]
    gpu._counters.clear()
    check_selection(torch.tensor(values).view(2, 3, inputs), budgets)


@on_device
def test_a_failure_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("mix-k", 4)
    weight, *tensors = problem(kernel)
    update = Update(kernel, "paper")
    assert gpu.usable(update, tensors[0])
    monkeypatch.setattr(gpu, "_kernels", object)
    with (
        pytest.warns(UserWarning, match=r"without Triton kernels \(they failed here: ") as log,
        pytest.raises(gpu.Broken),
    ):
        forward(Update(kernel, "none"), [1, 2, 3], weight, *tensors)
    monkeypatch.setattr(gpu, "_kernels", lambda: None)
    assert len(log) == 1 and not gpu.usable(update, tensors[0])


def through_autograd(
    update: Update, budgets: list[int], weight: Tensor, *tensors: Tensor, broken: Any = None
) -> list[Tensor]:
    """Output and gradients of the tuner's operation; kernels may break before backward."""
    torch.manual_seed(1)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    x = torch.randn(5, weight.shape[1], device=DEVICE, requires_grad=True)
    y = merged_linear(x, weight, None, *leaves, torch.tensor(budgets, device=DEVICE), update)
    if broken is not None:
        broken()
    return [y, *torch.autograd.grad(y.square().sum(), [x, *leaves])]


@on_device
@pytest.mark.parametrize("when", ["never", "before backward", "at once"])
def test_default_of_the_tuner(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, budgets = Kernel("mix-k", 4), [10, 100, 239]
    tensors = problem(kernel)
    expected = through_autograd(Update(kernel, "paper", compile=False), budgets, *tensors)

    def fail() -> None:
        def call(*_: Any, **__: Any) -> None:
            raise gpu.Broken(gpu._break(RuntimeError("no driver")))

        monkeypatch.setattr(gpu.Launch, "__call__", call)

    update = Update(kernel, "paper")
    assert gpu.usable(update, tensors[1])
    if when == "never":
        actual = through_autograd(update, budgets, *tensors)
    elif when == "before backward":
        with pytest.warns(UserWarning, match="no driver"):
            actual = through_autograd(update, budgets, *tensors, broken=fail)
    else:
        fail()
        with pytest.warns(UserWarning, match="no driver"):
            actual = through_autograd(update, budgets, *tensors)
    for mine, reference in zip(actual, expected, strict=True):
        scale = 1e-4 * float(reference.detach().abs().max())
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=scale)


@on_device
def test_what_the_kernels_do_not_do_is_said_once() -> None:
    a = problem(Kernel("mix-k", 4))[1]
    assert gpu.usable(Update(Kernel("mix-k", 4), "paper"), a)
    assert not gpu.usable(Update(Kernel("mix-k", 4), "paper", compile=False), a)
    for update, parameter, reason in (
        (Update(Kernel("mix-k", 4), "paper"), a.double(), "double precision"),
        (Update(Kernel("sigmoid", 4), "paper"), a, "kernel 'sigmoid'"),
        (Update(Kernel("mix-k", 4), "paper", keep=True), a, "keep_merged"),
    ):
        with pytest.warns(UserWarning, match=reason) as log:
            assert not gpu.usable(update, parameter)
            assert not gpu.usable(update, parameter)
        assert len(log) == 1


def test_the_cpu_is_not_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", False)
    assert not gpu.usable(Update(Kernel("mix-k", 4), "paper"), torch.zeros(1, 2, 3, 2))


@on_gpu
@pytest.mark.parametrize(
    "shape", [(3, 768, 768), (1, 768, 3072), (1, 3072, 768), (1, 1280, 5120), (2, 200, 331)]
)
def test_layers_of_real_size(shape: tuple[int, int, int]) -> None:
    kernel = Kernel("mix-k", 8, temperature=True)
    slices, inputs, outputs = shape
    tensors = problem(kernel, slices, inputs, outputs)
    for share in (10, 2):
        budgets = [inputs * outputs // share] * slices
        if share == 10:
            compare(Update(kernel, "none"), budgets, *tensors, tolerance=1e-3)
        delta, _ = forward(Update(kernel, "paper"), budgets, None, *tensors[1:])
        assert [int((part != 0).sum()) for part in delta.chunk(slices)] == budgets


@on_gpu
def test_selection_of_many_entries() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 1, 2**22 + 12345)
    for budget in (2**21, 1000, 2**22):
        check_selection(matrices, [budget, budget // 3])
    check_selection(torch.randint(0, 50, (1, 1, 4097 * 4100)).float(), [2**24 - 12345])


@on_gpu
def test_no_waiting_and_graph_capture() -> None:
    kernel = Kernel("mix-k", 8)
    weight, *tensors = problem(kernel, 3, 96, 64)
    dense, update = torch.randn_like(weight), Update(kernel, "paper")
    budgets = torch.tensor([100, 0, 6144], device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        effective, found = gpu.effective_weight(update, weight, *tensors, budgets, torch.bfloat16)
        again, gradients = gpu.contract(
            update, found, dense, weight, *tensors, True, torch.bfloat16
        )
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
    budgets.copy_(torch.tensor([3000, 17, 0]))  # read on the device: no new capture
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))


def adapted_vit() -> Any:
    from peft import get_peft_model
    from timm.models.vision_transformer import VisionTransformer

    from snella import SnellaConfig

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=2, num_classes=5
    )
    config = SnellaConfig(rank=8, modules_to_save=["head"])
    return get_peft_model(model.to(DEVICE), config).to(DEVICE)


def train(model: Any, fused: bool = True) -> list[Tensor]:
    """A few steps of two epochs; the trained tensors."""
    torch.manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=fused)
    images = torch.randn(16, 3, 32, 32, device=DEVICE)
    labels = torch.arange(16, device=DEVICE) % 5
    model.train()
    for epoch in range(2):
        model.on_epoch_start(epoch, 2)
        for step in range(4):
            if step == 2 and epoch:
                torch.cuda.set_sync_debug_mode("error")
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            model.on_step_end()
        torch.cuda.set_sync_debug_mode("default")
    return [p.detach().clone() for p in trained]


@on_gpu
def test_training_is_deterministic_and_does_not_wait() -> None:
    try:
        first, second = train(adapted_vit()), train(adapted_vit())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@on_gpu
def test_hooks_before_the_move_to_the_gpu() -> None:
    model = adapted_vit().cpu()
    model.on_epoch_start(0, 2)
    train(model.to(DEVICE))


@on_gpu
@pytest.mark.parametrize("when", ["data", "fused"])
def test_evaluation_sees_every_write(when: str) -> None:
    model = adapted_vit()
    images = torch.randn(4, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        before = model.eval()(images).clone()
        assert model(images).equal(before)
    if when == "fused":
        train(model)
    else:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(1.5)
    other = adapted_vit()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        after = model.eval()(images)
        assert after.equal(other.eval()(images)) and not after.allclose(before, atol=1e-4)


@on_gpu
def test_compiled_by_torch() -> None:
    model = adapted_vit().train()
    model.on_epoch_start(0, 2)
    images = torch.randn(4, 3, 32, 32, device=DEVICE)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for function in (model, torch.compile(model, fullgraph=True)):
        y = function(images)
        results.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    for mine, reference in zip(*results, strict=True):
        scale = 1e-3 * float(reference.detach().abs().max())
        torch.testing.assert_close(mine, reference, rtol=1e-2, atol=scale)


TYPES = {"done": "*i32", "selection": "*i32", "budgets": "*i64"}
TYPES |= {"scale": "fp32"}
HALVES = ("out", "dense", "base", "a", "b", "scalars", "grad_a", "grad_b", "grad_scalars")
NUMBERS = {"inputs", "outputs", "height", "splits", "total"}
NUMBERS |= {"size_a", "size_b", "column_blocks", "row_blocks", "before"}
RECIPES = {
    "mix-k": {"PIECES": 2, "COORDINATES": 4, "MIXED": 1, "TEMPERATURE": 0, "LEARNED": 1},
    "released": {"PIECES": 2, "COORDINATES": 4, "MIXED": 1, "TEMPERATURE": 1, "LEARNED": 0},
    "linear": {"PIECES": 1, "COORDINATES": 9, "MIXED": 0, "TEMPERATURE": 0, "LEARNED": 1},
}
ABSENT = {"budgets": None, "done": None}


SMALL = {"ROWS": 16, "COLUMNS": 16}  # the code is the same, and compiled in less time


def combinations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every kernel with every set of absent arguments that gpu.py passes."""
    without_base: tuple[dict[str, Any], ...] = ({}, {"base": None})
    for name, recipe in RECIPES.items():
        mixed = bool(recipe["MIXED"])
        dense = {} if mixed else {"dense": None, "weighted": None}
        yield "prepare", recipe
        yield "merge", recipe | {"CAPACITY": 64}
        for form in ("released",) if name == "released" else ("paper", "none"):
            sparse = {"FORM": form} | ({"selection": None} if form == "none" else {})
            yield "contract", recipe | sparse
            for base in without_base:
                yield "apply", recipe | dense | sparse | {"work": None} | base
                if mixed:  # without ∂L/∂x
                    yield "apply", recipe | sparse | {"work": None, "out": None} | base
        if name == "released":  # differs in arithmetic only
            continue
        yield "prepare", recipe | ABSENT
        first = {"FORM": "none", "selection": None, "dense": None, "weighted": None}
        for base in without_base:
            yield "apply", recipe | first | base
    for base in without_base:
        yield "finish", {"BLOCK": 256, "FORM": "paper"} | base
    for selection in ({}, {"selection": None}):
        yield "gather", {"BLOCK": 64, "SCALARS": 4} | selection


def compiled(name: str, constants: dict[str, Any], capability: int, half: bool) -> Any:
    """For a GPU, without one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from snella.backends import triton as kernels

    function = getattr(kernels, name)
    types = TYPES | (dict.fromkeys(HALVES, "*bf16") if half else {})
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, "i32" if argument in NUMBERS else "*fp32")
        for argument in function.arg_names
    }
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, argument in enumerate(function.arg_names)
        if signature[argument] not in ("constexpr", "fp32") and argument != "splits"
    }
    source = ASTSource(function, signature, constants, aligned)
    warps = gpu.BLOCKS.get(name, (0, 0, 4))[2]
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


compiles = pytest.mark.skipif(
    INTERPRETED or find_spec("triton") is None, reason="needs Triton's compiler"
)


@compiles
@pytest.mark.parametrize("capability", [80, 90], ids=["A100", "H100"])
def test_kernels_compile_for_a_gpu(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In every combination of optional arguments."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for k, (name, constants) in enumerate(combinations()):
        blocks = {} if "BLOCK" in constants else SMALL
        kernel = compiled(name, constants | blocks, capability, half=k % 2 == 0)
        assert "cubin" in kernel.asm, name


@compiles
def test_kernels_compile_in_full_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    more = {"merge": {"CAPACITY": 2048}, "apply": {"work": None}}
    for name, (rows, columns, _) in gpu.BLOCKS.items():
        form = {"FORM": "paper"} if name in ("apply", "contract") else {}
        blocks = {"ROWS": rows, "COLUMNS": columns}
        constants = RECIPES["mix-k"] | form | more.get(name, {}) | blocks
        assert "cubin" in compiled(name, constants, 90, half=True).asm, name
