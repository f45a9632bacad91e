"""The autograd operation: equal to plain autograd, small in memory, nothing computed twice."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from peft import LoraConfig, PeftModel, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from snella import SnellaConfig
from snella.backends import cpu, plain, tiles
from snella.backends.dispatch import contract, effective_weight
from snella.backends.update import Update, from_spec
from snella.equations import sparsify as sparsify_module
from snella.equations.kernels import KERNELS, Kernel, initial_factor, merge
from snella.equations.sparsify import FORMS, Selection, sparsify
from snella.tuner.functional import merged_linear, merged_weight


def problem(
    kernel: Kernel, slices: int = 3, inputs: int = 20, outputs: int = 12, dtype: Any = torch.float64
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    scalars = torch.tensor(list(kernel.scalars.values()) * slices, dtype=dtype)
    values = {
        "x": torch.randn(2, 5, inputs, dtype=dtype),
        "weight": torch.randn(slices * outputs, inputs, dtype=dtype),
        "bias": torch.randn(slices * outputs, dtype=dtype),
        "a": initial_factor(kernel, slices, inputs).to(dtype) * 20,
        "b": initial_factor(kernel, slices, outputs).to(dtype) * 20,
        "scalars": scalars + 0.1 * torch.rand(len(scalars), dtype=dtype),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


class Case(NamedTuple):
    """An adapter's function and its budgets."""

    update: Update
    budgets: Tensor


def by_autograd(values: dict[str, Tensor], case: Case, weight: bool = True) -> Tensor:
    """The same function by ordinary operations and autograd."""
    update = case.update
    a, b = values["a"], values["b"]
    merged = merge(update.kernel, a, b, values["scalars"].view(len(a), -1))
    counts = case.budgets.tolist()
    parts = [sparsify(m, n, update.form) for m, n in zip(merged, counts, strict=True)]
    delta = torch.cat(parts) * update.scale
    if weight:
        return F.linear(values["x"], values["weight"] + delta, values["bias"])
    return F.linear(values["x"], delta)


def compare(
    values: dict[str, Tensor], case: Case, weight: bool = True, tolerance: float = 1e-8
) -> None:
    used = {n: v for n, v in values.items() if v.numel()}
    if not weight:
        used = {n: v for n, v in used.items() if n not in ("weight", "bias")}
    expected = by_autograd(values, case, weight)
    upstream = torch.randn_like(expected)
    references = torch.autograd.grad(expected, list(used.values()), upstream)
    arguments = [values["weight"], values["bias"]] if weight else [None, None]
    rest = [values[n] for n in ("a", "b", "scalars")]
    actual = merged_linear(values["x"], *arguments, *rest, case.budgets, case.update)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(actual, list(used.values()), upstream)
    for name, gradient, reference in zip(used, gradients, references, strict=True):
        scale = float(reference.abs().max())
        torch.testing.assert_close(
            gradient, reference, rtol=tolerance, atol=tolerance * scale, msg=name
        )


def tiled(kernel: Kernel, form: str, budgets: list[int], **settings: Any) -> Case:
    return Case(Update(kernel, form, compile=False, **settings), torch.tensor(budgets))


def loops(kernel: Kernel, form: str, budgets: list[int], **settings: Any) -> Case:
    return Case(Update(kernel, form, compile=True, **settings), torch.tensor(budgets))


@pytest.mark.parametrize("tile_size", [100, 10**6], ids=["tiled", "whole"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KERNELS)
def test_equals_plain_autograd(
    name: str, form: str, tile_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", tile_size)
    monkeypatch.setattr(plain, "CPU_TILE", tile_size)
    kernel = Kernel(name, 4, temperature=True)
    for budgets in ([0, 100, 240], [0, 0, 0], [240, 1, 17]):
        compare(problem(kernel), tiled(kernel, form, budgets))


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, cpu.COMPILERS)), reason="no C++ compiler"
)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled libraries are kept beside the temporary folders of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp().parent / "cache"))
        yield


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kernel",
    [
        Kernel("mix-k", 4),
        Kernel("mix-k", 6, pieces=3, temperature=True),
        Kernel("mix-k", 3, pieces=1, learnable_coefficients=False),
        Kernel("piecewise-linear", 4),
    ],
    ids=lambda kernel: f"{kernel.name}-{kernel.rank}-{kernel.pieces}",
)
def test_compiled_loops(kernel: Kernel, form: str) -> None:
    for budgets in ([0, 100, 240], [0, 0, 0], [240, 1, 17]):
        compare(problem(kernel), loops(kernel, form, budgets))
    budgets = [0, 1, 17]
    compare(problem(kernel), loops(kernel, form, budgets, scale=0.3))
    compare(problem(kernel), loops(kernel, form, budgets, scale=1.7), weight=False)
    wide = {"inputs": 300, "outputs": 37}  # more than a stretch of columns, fewer rows per part
    compare(problem(kernel, **wide), loops(kernel, form, [0, 5000, 11100]))
    large = problem(kernel)
    with torch.no_grad():
        large["a"].mul_(1e3)  # exp(D) would overflow
    compare(large, loops(kernel, form, budgets), tolerance=1e-6)
    assert cpu._library(kernel, form, "double") is not None and cpu.in_use()


def factors_of(values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and scalars."""
    return values["a"].detach(), values["b"].detach(), values["scalars"].detach()


def tied(kernel: Kernel, **shape: int) -> dict[str, Tensor]:
    """Magnitudes that occur many times, so that the cut decides."""
    values = problem(kernel, **shape)
    with torch.no_grad():
        for name in "ab":
            values[name].copy_(values[name].sign())
    return values


@needs_compiler
@pytest.mark.parametrize("form", ["paper", "released"])
def test_compiled_loops_break_ties(form: str) -> None:
    kernel = Kernel("piecewise-linear", 2)
    for budgets in ([100, 7], [239, 230]):
        case, values = loops(kernel, form, budgets), tied(kernel, slices=2)
        compare(values, case)
        _, found = effective_weight(case.update, None, *factors_of(values), case.budgets)
        assert (found.selection[2] > 0).all(), "of ties, those before the cut are kept"


@needs_compiler
@example_settings(max_examples=200, deadline=None)
@given(
    values=arrays(
        st.sampled_from([np.float32, np.float64]),
        array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.one_of(
            st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0])
        ),
    ),
    share=st.floats(0, 1),
)
def test_compiled_selection_is_the_same(values: np.ndarray, share: float) -> None:
    merged, budget = torch.from_numpy(values), max(1, round(share * values.size))
    a, b = (merged.new_zeros(1, 2, size, 1) for size in reversed(merged.shape))
    update, budgets = loops(Kernel("piecewise-linear", 2), "released", [budget])
    assert cpu.usable(update, a)
    layer = cpu._layer(update, (a, b, merged.new_zeros(2)), merged.new_zeros(1, 2, len(a)))
    found = torch.empty(3, dtype=torch.float64)
    addresses = (tensor.data_ptr() for tensor in (budgets, merged, found))
    cpu._loaded(update, a).snella_select(ctypes.byref(layer), *addresses)
    threshold, subtracted, cut = found.tolist()
    expected = sparsify_module.select(merged, budget)
    assert (threshold, cut, subtracted) == (expected.threshold, expected.cut, expected.subtracted)


@needs_compiler
@pytest.mark.parametrize("temperature", [True, False])
def test_compiled_loops_keep_the_same_entries_in_backward(temperature: bool) -> None:
    kernel = Kernel("mix-k", 8, temperature=temperature)
    values = problem(kernel, inputs=96, outputs=64, dtype=torch.float32)
    weight, tensors = values["weight"].detach(), factors_of(values)
    update, budgets = loops(kernel, "released", [1000, 2000, 3000])
    forward, found = effective_weight(update, None, *tensors, budgets)
    assert [(part != 0).sum() for part in forward.chunk(3)] == budgets.tolist()
    torch.testing.assert_close(
        forward.chunk(3)[1],
        sparsify_module.sparsify(
            merge(update.kernel, tensors[0], tensors[1], tensors[2].view(3, -1))[1],
            2000,
            "released",
        ),
    )
    again, _ = contract(update, found, weight, None, *tensors, needs_effective=True)
    assert torch.equal(again, forward)


@needs_compiler
def test_compiled_loops_do_not_depend_on_the_number_of_threads() -> None:
    kernel = Kernel("mix-k", 8)
    values = problem(kernel, inputs=96, outputs=64, dtype=torch.float32)
    weight, tensors = values["weight"].detach(), factors_of(values)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            update, budgets = loops(kernel, "paper", [1000, 2000, 3000])
            forward, found = effective_weight(update, weight, *tensors, budgets)
            _, gradients = contract(update, found, weight, None, *tensors, False)
            results.append((forward, *gradients))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@needs_compiler
def test_compiled_loops_pass_on_nan() -> None:
    kernel = Kernel("mix-k", 4)
    values = problem(kernel, dtype=torch.float32)
    with torch.no_grad():
        values["a"][0, 0, 3, 0] = torch.nan
    update, budgets = loops(kernel, "paper", [100, 100, 100])
    weight = values["weight"].detach()
    effective, _ = effective_weight(update, weight, *factors_of(values), budgets)
    assert effective[:12, 3].isnan().all() and effective[12:].isfinite().all()


@pytest.mark.parametrize("compiler", ["missing", "failing"])
def test_without_a_compiler_there_is_one_warning(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler == "failing":
        script = tmp_path / "c++"
        script.write_text("#!/bin/sh\necho 'cannot compile' >&2\necho more >&2\nexit 1\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if compiler == "failing" else str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    forget = (cpu._library, cpu._failures, cpu._warn)
    for function in forget:
        function.cache_clear()
    reason = "cannot compile" if compiler == "failing" else "no C\\+\\+ compiler"
    try:
        with pytest.warns(UserWarning, match=rf"without compiled loops \({reason}") as log:
            for kernel in (Kernel("mix-k", 4), Kernel("mix-k", 2)):
                compare(problem(kernel), loops(kernel, "paper", [10, 100, 240]))
        assert len(log) == 1 and not cpu.in_use()
    finally:
        for function in forget:
            function.cache_clear()


def test_selections_of_a_device() -> None:
    merged = torch.randn(12, 20).round(decimals=1)
    selection = sparsify_module._select_on_device(merged.abs().flatten(), 100)
    expected = sparsify_module.select(merged, 100)
    assert (float(selection.threshold), int(selection.cut), float(selection.subtracted)) == (
        expected.threshold,
        expected.cut,
        expected.subtracted,
    )


@pytest.mark.parametrize("form", FORMS)
def test_scale_kept_tiles_and_separate_branch(form: str) -> None:
    kernel = Kernel("mix-k", 4)
    compare(problem(kernel), tiled(kernel, form, [50, 0, 99], scale=0.3))
    compare(problem(kernel), tiled(kernel, form, [50, 0, 99], keep=True))
    compare(problem(kernel), tiled(kernel, form, [50, 0, 99], scale=1.7), weight=False)


def test_ties_at_the_threshold() -> None:
    kernel = Kernel("linear", 2)
    values = problem(kernel, slices=1)
    with torch.no_grad():
        values["a"].copy_(values["a"].sign())
        values["b"].copy_(values["b"].sign())
    compare(values, tiled(kernel, "paper", [100]))
    compare(values, tiled(kernel, "released", [100]))


def test_single_precision() -> None:
    kernel = Kernel("mix-k", 8)
    compare(
        problem(kernel, 1, 96, 64, torch.float32), tiled(kernel, "paper", [3000]), tolerance=1e-3
    )


@pytest.mark.parametrize("form", ["none", "released"])
def test_finite_differences(form: str) -> None:
    """KLoRA is smooth; the released form counts |W| as a constant, so only x is checked there."""
    kernel = Kernel("mix-k", 2, temperature=True)
    values = problem(kernel, 1, 4, 3)
    names = list(values) if form == "none" else ["x", "weight", "bias"]

    def function(*leaves: Tensor) -> Tensor:
        current = values | dict(zip(names, leaves, strict=True))
        case = tiled(kernel, form, [7])
        return merged_linear(*current.values(), case.budgets, case.update)

    assert torch.autograd.gradcheck(function, [values[name] for name in names])


def test_finite_differences_of_the_paper_form_between_thresholds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the threshold held just above a dropped entry, Eq. 13 is smooth in A, B and scalars."""
    kernel = Kernel("mix-k", 2)
    values, case = problem(kernel, 1, 4, 3), tiled(kernel, "paper", [7])
    _, found = effective_weight(case.update, None, *factors_of(values), case.budgets)
    threshold = 1.001 * float(found.selection[0])
    monkeypatch.setattr(plain, "select", lambda *_: Selection(threshold, 0, threshold))

    def function(*leaves: Tensor) -> Tensor:
        return merged_linear(*leaves, case.budgets, case.update)

    assert torch.autograd.gradcheck(function, list(values.values()), eps=1e-7, atol=1e-4)


def test_merged_weight_is_differentiable() -> None:
    kernel = Kernel("mix-k", 4)
    values, case = problem(kernel), tiled(kernel, "paper", [50, 240, 0])
    leaves = [values[n] for n in ("weight", "a", "b", "scalars")]
    weight = merged_weight(*leaves, case.budgets, case.update)
    product = F.linear(values["x"], weight, values["bias"])
    expected = by_autograd(values, case)
    torch.testing.assert_close(product, expected)
    upstream = torch.randn_like(expected)
    for actual, reference in zip(
        torch.autograd.grad(product, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, reference)


def blocks(width: int = 768, depth: int = 1, image: int = 224) -> VisionTransformer:
    return VisionTransformer(
        img_size=image, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=10
    )


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, beyond the model's own parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.train()(x).sum()
        total = sum(kept.values())
        loss.backward()
    return total


def test_memory_for_backward_is_that_of_lora() -> None:
    """ViT-B/16 at 224 pixels; its twelve blocks are alike, one stands for all."""
    x = torch.randn(1, 3, 224, 224)
    lora = LoraConfig(r=8, target_modules=r".*blocks\.\d+\..*\.(qkv|proj|fc1|fc2)")
    reference = saved_bytes(get_peft_model(blocks(), lora), x)
    for settings in ({}, {"variant": "released", "dropout": 0.0, "drop_path": 0.0}):
        model = get_peft_model(blocks(), SnellaConfig(rank=8, **settings))
        assert saved_bytes(model, x) <= 1.01 * reference
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    factors = sum(p.numel() for n, p in model.named_parameters() if "_A" in n or "_B" in n)
    assert factors <= trained <= 1.001 * factors, "optimizer state is that of the factors"


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3
    )
    return get_peft_model(model, SnellaConfig(rank=4, allocation=False, **settings))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often thresholds were selected and merged matrices evaluated."""
    counts = {"select": 0, "tile": 0}

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            if function is loops_forward:  # which selects for every slice
                counts["select"] += len(kwargs.get("a", args[2]))
            return function(*args, **kwargs)

        return wrapped

    loops_forward = cpu.effective_weight
    for where, attribute, name in (
        (plain, "select", "select"),
        (tiles.PiecewiseTiles, "tile", "tile"),
        (cpu, "effective_weight", "tile"),
        (cpu, "contract", "tile"),
    ):
        monkeypatch.setattr(where, attribute, count(name, getattr(where, attribute)))
    return counts


both = pytest.mark.parametrize("compiled", [False, None], ids=["tiles", "loops"])


@both
def test_thresholds_are_found_once_per_forward(
    counted: dict[str, int], compiled: bool | None
) -> None:
    """And not again in backward, even where a step lies in between (pipelines, two losses)."""
    model, x = adapted(compile=compiled).train(), torch.randn(2, 3, 16, 16)
    slices = 3 + 1 + 1 + 1
    for forwards in range(1, 4):
        model(x).sum().backward()
        assert counted["select"] == forwards * slices


@both
def test_evaluation_uses_one_plain_matrix(counted: dict[str, int], compiled: bool | None) -> None:
    model, x = adapted(compile=compiled).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        first = model(x)
        evaluated = counted["tile"]
        assert all(model(x).equal(first) for _ in range(3))
    assert counted["tile"] == evaluated == 4, "each of the four layers once"
    assert counted["select"] == 6


def test_checkpointing_keeps_no_matrices() -> None:
    model, x = adapted().train(), torch.randn(2, 3, 16, 16)
    expected = torch.autograd.grad(
        model(x).sum(), [p for p in model.parameters() if p.requires_grad]
    )
    block = model.base_model.model.blocks[0]
    model.base_model.model.set_grad_checkpointing()
    with torch.no_grad():
        model(x)
    assert all(m._folded.matrix is None for m in block.modules() if hasattr(m, "_folded"))
    actual = torch.autograd.grad(model(x).sum(), [p for p in model.parameters() if p.requires_grad])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_only_one_factor_trained() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("snella_B" in name)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@both
def test_kept_tiles_are_not_evaluated_again(counted: dict[str, int], compiled: bool | None) -> None:
    for settings, expected in (({"keep_merged": True}, 4), ({}, 8)):
        counted["tile"] = 0
        model = adapted(compile=compiled, **settings)
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        assert counted["tile"] == expected


def test_a_changed_parameter_is_seen_at_once() -> None:
    model, x = adapted().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(x).clone()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        after = model(x)
    assert not after.allclose(before, atol=1e-4)
    torch.testing.assert_close(model(x).detach(), after, rtol=1e-5, atol=1e-6)
    for layer in model.modules():
        if hasattr(layer, "snella_budget"):
            layer.set_budget("default", [3] * layer.slices)
    with torch.no_grad():
        assert not model(x).allclose(after, atol=1e-5)


def test_operators_are_told_an_update_as_text() -> None:
    update = tiled(Kernel("mix-k", 6, pieces=3, temperature=True), "released", [1], scale=0.3)[0]
    assert from_spec(update.spec) == update


def test_benchmark_reference_computes_the_released_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from reference import ReferenceDelta

    reference = ReferenceDelta(20, 12, 8, 0.7).double()
    layer = nn.ModuleDict({"0": nn.ModuleDict({"fc1": nn.Linear(20, 12)})})
    config = SnellaConfig(
        rank=8, variant="released", initial_sparsity=0.7, dropout=0.0, drop_path=0.0
    )
    adapted = get_peft_model(layer.double(), config)
    target = adapted.base_model.model["0"]["fc1"].double()
    with torch.no_grad():
        target.snella_A["default"].copy_(reference.In_Qs[None])
        target.snella_B["default"].copy_(reference.Out_Qs[None])
    delta = target.get_delta_weight("default")
    torch.testing.assert_close(delta, reference.sparse().T)
    x = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(target(x), target.base_layer(x) + reference(x))
