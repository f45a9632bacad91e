"""The update of one layer on a GPU: W + S, and the way back to A, B and scalars, by Triton kernels.

The same functions as ``effective_weight`` and ``contract`` of ``backends.update``, for the
piecewise kernels in single precision, in few launches: a layer of a vision transformer keeps a GPU
busy for microseconds, so that starting the work is what costs. The host never waits, so that a step
can be captured in a CUDA graph, after a first one that compiles the kernels.

    forward, new parameters    prepare · merge · second, third, select (the threshold) · finish
    forward, the same          apply
    backward                   apply (not for piecewise-linear without ∂L/∂x) · contract · gather
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from snella.equations.kernels import Kernel
from snella.equations.sparsify import Selection

# Blocks of a matrix. With 64 × 64, each of a program's 128 threads has 32 entries: enough to share
# the loads of A and B and the steps of a sum, and few enough for the registers. Where a program
# walks down columns, narrow blocks and split columns make PROGRAMS, two for each core of an H100.
ROWS, COLUMNS, NARROW = 64, 64, 32
FLAT, GATHER = 4096, 64
PROGRAMS = 256
# Parts of a column at most, and integers of workspace per slice, as gpu_kernels has them.
MAX_SPLITS, WORDS = 8, 6416

# Whether CPU tensors are served too, by Triton's interpreter; for tests.
interpreted = False
_broken: list[str] = []

Gradients = tuple[Tensor, Tensor, Tensor]


class UpdateLike(Protocol):
    """What is read of, and written to, a ``backends.update.Update``."""

    kernel: Kernel
    form: str
    budgets: list[int]
    scale: float
    selections: list[Selection] | None
    constants: Any


class Broken(Exception):
    """Triton does not work on this machine; the message says what it said."""


SELECTION_TYPE = torch.int32


def usable(update: UpdateLike, a: Tensor) -> bool:
    """Whether these kernels serve for an adapter with these parameters."""
    return False  # until its interface has followed
    if not a.is_cuda and not (interpreted and a.device.type == "cpu"):
        return False
    if _broken or not update.kernel.is_piecewise or a.dtype == torch.float64:
        return False
    return _kernels() is not None


@cache
def _kernels() -> Any:
    """The package ``gpu_kernels``, or None where there is no Triton."""
    if find_spec("triton") is None:
        return None
    try:
        from snella.backends import triton as gpu_kernels
    except Exception as error:
        _warn(error)
        return None
    return gpu_kernels


def _warn(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    _broken.append(reason)
    warnings.warn(f"SNELLA runs without Triton kernels: they failed here ({reason}).", stacklevel=3)
    return reason


def _launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel; ``Broken`` if that cannot be done here.

    Without implicit fused multiply-adds: see ``gpu_kernels``.
    """
    try:
        kernel = getattr(_kernels(), name)
        constants.setdefault("num_warps", 4)
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Broken(_warn(error)) from error


@dataclass
class Constants:
    """What holds until the parameters change.

    turned: A with features last, (slices, P, r/P, in), so that loads are contiguous. softmax: (2 ·
    splits + 2, slices, in), the largest logit and Σ exp of every part of a column, and both
    ``combined``. ranks: (slices), entries to drop. numbers: (2, slices), threshold and subtracted
    magnitude; cuts: (slices). These two are ``selections``, as the kernels read them.
    """

    turned: Tensor
    softmax: Tensor | None
    combined: bool = False
    ranks: Tensor | None = None
    numbers: Tensor | None = None
    cuts: Tensor | None = None
    selections: list[Selection] | None = None


@dataclass(frozen=True)
class Plan:
    """How a layer is cut into programs.

    columns, blocks, flat: grids over parts of columns, blocks of rows and columns, and flat spans.
    height: rows of a part. recipe: the kernel, as constants of the compiled code.
    """

    inputs: int
    outputs: int
    columns: tuple[int, int, int]
    blocks: tuple[int, int, int]
    flat: tuple[int, int]
    height: int
    recipe: dict[str, int] = field(hash=False)

    @property
    def total(self) -> int:
        """Entries of a slice's matrix."""
        return self.inputs * self.outputs


@lru_cache(maxsize=256)
def _plan(kernel: Kernel, slices: int, inputs: int, outputs: int) -> Plan:
    """The plan for a layer of this shape."""
    wide, narrow = math.ceil(inputs / COLUMNS), math.ceil(inputs / NARROW)
    high = math.ceil(outputs / ROWS)
    wanted = min(high, MAX_SPLITS, math.ceil(PROGRAMS / (narrow * slices)))
    height = ROWS * math.ceil(high / wanted)
    mixed = kernel.name == "mix-k"
    recipe = {
        "PIECES": kernel.pieces,
        "COORDINATES": kernel.coordinates,
        "MIXED": int(mixed),
        "TEMPERATURE": int(mixed and kernel.temperature),
        "LEARNED": int(kernel.learnable_coefficients),
    }
    columns = narrow, math.ceil(outputs / height), slices
    flat = math.ceil(inputs * outputs / FLAT), slices
    return Plan(inputs, outputs, columns, (wide, high, slices), flat, height, recipe)


def _fill_ranks(budgets: tuple[int, ...], total: int, device: torch.device) -> Tensor:
    ranks = torch.empty(len(budgets), dtype=torch.int32, device=device)
    for rank, budget in zip(ranks.unbind(), budgets, strict=True):
        rank.fill_(total - budget)
    return ranks


_remembered_ranks = lru_cache(maxsize=4096)(_fill_ranks)


def _ranks(budgets: list[int], total: int, device: torch.device) -> Tensor:
    """How many entries to drop of every slice; filled in on the device, as a copy would wait.

    What is made during the capture of a graph belongs to the graph, and is not remembered.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (_fill_ranks if capturing else _remembered_ranks)(tuple(budgets), total, device)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class _Layer:
    """The tensors of one call, and the launches on them."""

    def __init__(self, update: UpdateLike, a: Tensor, b: Tensor, scalars: Tensor) -> None:
        self.update, self.device = update, a.device
        self.factors = tuple(t.detach().contiguous() for t in (a, b, scalars))
        self.slices = a.shape[0]
        self.plan = _plan(update.kernel, a.shape[0], a.shape[2], b.shape[2])
        self.sizes = self.plan.inputs, self.plan.outputs

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Memory for the layer's matrix, (out, in)."""
        return self.empty(self.slices * self.plan.outputs, self.plan.inputs, dtype=dtype)

    @property
    def is_empty(self) -> bool:
        """Whether nothing survives, so that there is nothing to compute."""
        return self.update.form != "none" and not any(self.update.budgets)

    def unchanged(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """W, or 0 without one."""
        if weight is None:
            return self.matrix(dtype).zero_()
        return weight.detach().to(dtype, copy=True)

    @cached_property
    def ranks(self) -> Tensor | None:
        if self.update.form == "none":
            return None
        return _ranks(self.update.budgets, self.plan.total, self.device)

    def known(self) -> Constants | None:
        """What earlier calls with the same parameters have found, if it is all that is needed."""
        constants, selections = self.update.constants, self.update.selections
        if self.update.form != "none" and selections is None:
            return None
        if not isinstance(constants, Constants):
            constants = self.prepare(None)
        if constants.selections is not selections and selections is not None:
            constants.selections = selections
            constants.numbers, constants.cuts = _as_tensors(selections, self.device)
        self.update.constants = constants
        return constants

    def prepare(self, workspace: Tensor | None) -> Constants:
        """What can be found before selection; the workspace is cleared at the same time."""
        plan, a = self.plan, self.factors[0]
        turned, softmax = self.empty(a.numel()), None
        if plan.recipe["MIXED"]:
            softmax = self.empty(2 * plan.columns[1] + 2, self.slices, plan.inputs)
        words = 0 if workspace is None else workspace.numel()
        _launch(
            "prepare",
            plan.columns,
            *(*self.factors, self.ranks, turned, softmax, workspace, words),
            *(*self.sizes, plan.height),
            **plan.recipe,
            ROWS=ROWS,
            COLUMNS=NARROW,
        )
        return Constants(turned, softmax, ranks=self.ranks)

    def find(self, weight: Tensor | None, out: Tensor) -> None:
        """Merge and select, and write W + S to ``out``."""
        update, plan = self.update, self.plan
        workspace = self.empty(self.slices * WORDS, dtype=torch.int32)
        constants = self.prepare(workspace)
        merged = self.matrix(torch.float32)
        _launch(
            "merge",
            plan.blocks,
            *(constants.turned, *self.factors[1:], self.ranks, constants.softmax, merged),
            *(workspace, *self.sizes, plan.columns[1]),
            **plan.recipe,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
        constants.combined = True
        self.select(constants, merged, workspace, weight, out)
        update.selections, update.constants = constants.selections, constants

    def select(
        self,
        constants: Constants,
        merged: Tensor,
        workspace: Tensor,
        weight: Tensor | None,
        out: Tensor,
    ) -> None:
        """Select from the merged matrices, whose first bits are counted, and write W + S."""
        plan, matrix = self.plan, (merged, constants.ranks, workspace)
        options = {"BLOCK": FLAT, "num_warps": 8}
        for step in ("second", "third"):
            _launch(step, plan.flat, *matrix, plan.total, **options)
        numbers, cuts = self.empty(2, self.slices), self.empty(self.slices, dtype=torch.int32)
        found = numbers, cuts, self.empty(*plan.flat, dtype=torch.int32)
        _launch("select", plan.flat, *matrix, *found, plan.total, **options)
        result = weight, out, self.update.scale, plan.total
        _launch("finish", plan.flat, *matrix, *found, *result, FORM=self.update.form, **options)
        columns = numbers[0].unbind(), cuts.unbind(), numbers[1].unbind()
        constants.numbers, constants.cuts = numbers, cuts
        constants.selections = [Selection(*values) for values in zip(*columns, strict=True)]

    def function(self, constants: Constants) -> tuple[Tensor | None, ...]:
        """All that determines S."""
        factors = constants.turned, *self.factors[1:]
        return *factors, constants.ranks, constants.softmax, constants.numbers, constants.cuts

    def apply(
        self,
        constants: Constants,
        weight: Tensor | None,
        out: Tensor | None,
        dense: Tensor | None = None,
        weighted: Tensor | None = None,
    ) -> None:
        """Write W + S to ``out``, and Σ_o ∂L/∂merged · exp to ``weighted``, where given."""
        plan, update = self.plan, self.update
        _launch(
            "apply",
            plan.columns,
            *self.function(constants),
            *(weight, out, dense, weighted, update.scale, *self.sizes, plan.height),
            **plan.recipe,
            FORM=update.form,
            COMBINE=not constants.combined,
            ROWS=ROWS,
            COLUMNS=NARROW,
        )
        constants.combined = True

    def contract(self, constants: Constants, dense: Tensor, weighted: Tensor | None) -> Gradients:
        """Gradients of A, B and the scalars from ∂L/∂S."""
        plan, update, (a, b, scalars) = self.plan, self.update, self.factors
        wide, high, slices = plan.blocks
        count = scalars.numel() // slices
        parts = (
            self.empty(high, a.numel()),
            self.empty(wide, b.numel()),
            self.empty(wide * high, scalars.numel()),
        )
        _launch(
            "contract",
            plan.blocks,
            *self.function(constants),
            *(dense, weighted, *parts, update.scale, *self.sizes, plan.columns[1]),
            **plan.recipe,
            FORM=update.form,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
        gradients = torch.empty_like(a), torch.empty_like(b), torch.empty_like(scalars)
        sizes = a.numel() // slices, b.numel() // slices
        programs = sum(math.ceil(size / GATHER) for size in sizes) + math.ceil(count / 8)
        arguments = *parts, constants.ranks, *gradients, *sizes, wide, high, plan.total
        _launch("gather", (programs, slices), *arguments, SCALARS=count, BLOCK=GATHER)
        return gradients


def _as_tensors(selections: list[Selection], device: torch.device) -> tuple[Tensor, Tensor]:
    """(numbers, cuts) of ``Constants`` from selections that were found elsewhere."""

    def row(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.stack([torch.as_tensor(value, dtype=dtype, device=device) for value in values])

    thresholds = row([selection.threshold for selection in selections], torch.float32)
    subtracted = row([selection.subtracted for selection in selections], torch.float32)
    cuts = row([selection.cut for selection in selections], torch.int32)
    return torch.stack([thresholds, subtracted]), cuts


def budgets_of(found: Any) -> Tensor:
    return found.selection[3]


def effective_weight(
    update: UpdateLike,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """W + S, or S alone without a weight, (out, in) in ``dtype``; not differentiable.

    Shapes as in ``equations.kernels.merge``, with scalars (slices · K). Evaluated in single
    precision and rounded once. Finds ``update.selections`` if none yet. Raises ``Broken``.
    """
    with _on(a.device):
        layer = _Layer(update, a, b, scalars)
        if layer.is_empty:
            return layer.unchanged(weight, dtype)
        base = None if weight is None else weight.detach().contiguous()
        out = layer.matrix(dtype)
        constants = layer.known()
        if constants is None:
            layer.find(base, out)
        else:
            layer.apply(constants, base, out)
        return out


def contract(
    update: UpdateLike,
    dense: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    needs_effective: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Gradients]:
    """W + S again in ``dtype`` (if needed), and gradients of A, B and scalars in their own types.

    dense: ∂L/∂(W + S), (out, in), of any type. Raises ``Broken``.
    """
    with _on(a.device):
        layer = _Layer(update, a, b, scalars)
        if layer.is_empty:
            zeros = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(scalars)
            return (layer.unchanged(weight, dtype) if needs_effective else None), zeros
        base = None if weight is None else weight.detach().contiguous()
        out = layer.matrix(dtype) if needs_effective else None
        constants = layer.known()
        if constants is None:
            layer.find(None, layer.matrix(torch.float32))
            constants = update.constants
        dense, weighted = dense.contiguous(), None
        if constants.softmax is not None:
            weighted = layer.empty(layer.plan.columns[1], layer.slices, layer.plan.inputs)
            layer.apply(constants, base, out, dense, weighted)
        elif out is not None:
            layer.apply(constants, base, out)
        return out, layer.contract(constants, dense, weighted)
