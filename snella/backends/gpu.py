"""The update of one layer on a GPU: W + S, and the way back to A, B and scalars, by Triton kernels.

For the piecewise kernels in single precision. A layer of a vision transformer keeps a GPU busy for
microseconds, so that starting the work is what costs: launches are few and prepared, and the host
never waits, so that a step can be captured in a CUDA graph after a first one that compiles.

    forward     prepare · merge (with the selection) · finish; without sparsity prepare · apply
    backward    apply (not for piecewise-linear without ∂L/∂x) · contract · gather
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from snella.backends.update import Found, Gradients, Update
from snella.equations.kernels import Kernel

SELECTION_TYPE = torch.int32

# Rows, columns and warps of a program, by kernel: the fastest of several on an H100. prepare and
# apply walk down their columns, which are split until there are PROGRAMS.
BLOCKS = {
    "prepare": (128, 32, 8),
    "merge": (32, 64, 8),
    "apply": (64, 32, 4),
    "contract": (32, 32, 1),
}
FLAT, GATHER = 2048, 64
PROGRAMS = 512
# Parts of a column at most, and integers of workspace, as the package ``triton`` has them.
MAX_SPLITS, HEADER, BUCKETS = 8, 2064, 2048

# Whether CPU tensors are taken too, by Triton's interpreter; for tests.
interpreted = False
_broken: list[str] = []


class Broken(Exception):
    """Triton does not work on this machine; the message says what it said."""


def usable(update: Update, a: Tensor) -> bool:
    """Whether these kernels compute such an update for such parameters; says why not, once."""
    if not (a.is_cuda or (interpreted and a.device.type == "cpu")) or update.compile is False:
        return False
    reason = _obstacle(update, a.dtype)
    if reason is None:
        return True
    if not _broken:
        _say(reason)
    return False


def _obstacle(update: Update, dtype: torch.dtype) -> str | None:
    if update.keep:
        return "keep_merged keeps the tiles of torch operations"
    if not update.kernel.is_piecewise:
        return f"there are none for the kernel {update.kernel.name!r}"
    if dtype == torch.float64:
        return "there are none for double precision"
    if _kernels() is None and not _broken:
        return "Triton is not installed"
    return _broken[0] if _broken else None


@lru_cache
def _say(reason: str) -> None:
    warnings.warn(f"SNELLA runs without Triton kernels ({reason}).", stacklevel=4)


@cache
def _kernels() -> Any:
    """The package ``backends.triton``, or None where there is no Triton."""
    if find_spec("triton") is None:
        return None
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
            raise RuntimeError(f"Triton {triton.__version__} is too old; torch 2.9 brings 3.5")
        from snella.backends import triton as kernels
    except Exception as error:
        _break(error)
        return None
    return kernels


def _break(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    reason = f"they failed here: {reason}"
    _broken.append(reason)
    _say(reason)
    return reason


class Launch:
    """One kernel for layers of one shape: its grid and constants, and how to start it quickly.

    Triton looks at every argument at every launch, which costs as much as a small kernel runs. So
    the compiled kernel is kept by the types and alignment of the tensors and their device, all that
    may differ.
    """

    def __init__(
        self,
        name: str,
        grid: tuple[int, int, int],
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        num_warps: int = 4,
    ) -> None:
        self.name, self.grid, self.numbers, self.constants = name, grid, numbers, constants
        self.options = {"num_warps": num_warps, "enable_fp_fusion": False}
        self.compiled: dict[Any, tuple[Any, ...]] = {}

    def __call__(self, *tensors: Tensor | float | None, key: Any, stream: int | None) -> None:
        """Start it; ``key`` tells what of the tensors may differ. Raises ``Broken``.

        Without implicit fused multiply-adds: see ``backends.triton``.
        """
        known = self.compiled.get(key)
        try:
            if known is not None:
                run, place, rest = known
                pointers = [t.data_ptr() if isinstance(t, Tensor) else t for t in tensors]
                run(*self.grid, stream, *place, *pointers, *rest)
                return
            kernel = getattr(_kernels(), self.name)
            arguments = *tensors, *self.numbers
            compiled = kernel[self.grid](*arguments, **self.constants, **self.options)
            if stream is not None and hasattr(compiled, "packed_metadata"):
                place = compiled.function, compiled.packed_metadata, None, None, None
                rest = *self.numbers, *self.constants.values()
                self.compiled[key] = compiled.run, place, rest
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Broken(_break(error)) from error


class Plan:
    """How layers of one shape are cut into programs, and the launches that do so."""

    def __init__(self, kernel: Kernel, form: str, slices: int, inputs: int, outputs: int) -> None:
        self.slices, self.inputs, self.outputs = slices, inputs, outputs
        self.total, self.form = inputs * outputs, form
        self.mixed = kernel.name == "mix-k"
        self.recipe = {
            "PIECES": kernel.pieces,
            "COORDINATES": kernel.coordinates,
            "MIXED": int(self.mixed),
            "TEMPERATURE": int(self.mixed and kernel.temperature),
            "LEARNED": int(kernel.learnable_coefficients),
        }
        self.scalars = len(kernel.scalars)
        self.splits, self.height = self._walk("prepare")
        self.parts = 2 * self.splits * slices * inputs
        self.apply_splits, self.apply_height = self._walk("apply")
        self.weighted = self.apply_splits * slices * inputs if self.mixed else 0
        # A bucket holds a two-thousandth of a twelfth of the entries, more where they are dense.
        self.capacity = 1024 if self.total <= 2**22 else 2048
        # Floats: the merged matrices, the parts of columns, and room for the selection's integers.
        self.unsorted = slices * self.total + self.parts
        self.work = self.unsorted + slices * (HEADER + BUCKETS * self.capacity)
        self.sizes = kernel.rank * inputs, kernel.rank * outputs
        self.wide, self.tall = self._blocks("contract")[:2]
        shares = self.tall * self.sizes[0] + self.wide * self.sizes[1]
        self.shares = self.weighted + slices * (shares + self.wide * self.tall * self.scalars)

        self.variants: dict[Any, int] = {}

    def variant(self, *kinds: Any) -> int:
        """A number for what may differ between tensors of one shape, quicker to look up."""
        return self.variants.setdefault(kinds, len(self.variants))

    def _walk(self, name: str) -> tuple[int, int]:
        """Parts of a column, and rows of a part."""
        rows, columns, _ = BLOCKS[name]
        blocks = math.ceil(self.outputs / rows)
        programs = math.ceil(self.inputs / columns) * self.slices
        height = rows * math.ceil(blocks / min(blocks, MAX_SPLITS, math.ceil(PROGRAMS / programs)))
        return math.ceil(self.outputs / height), height

    def _blocks(self, name: str) -> tuple[int, int, int]:
        """Blocks of columns and of rows, and slices."""
        rows, columns, _ = BLOCKS[name]
        return math.ceil(self.inputs / columns), math.ceil(self.outputs / rows), self.slices

    def _launch(
        self, name: str, grid: tuple[int, int, int], *numbers: int, **constants: Any
    ) -> Launch:
        rows, columns, warps = BLOCKS[name]
        blocks = self.recipe | constants | {"ROWS": rows, "COLUMNS": columns}
        return Launch(name, grid, (self.inputs, self.outputs, *numbers), blocks, warps)

    @cached_property
    def prepare(self) -> Launch:
        grid = self._blocks("prepare")[0], self.splits, self.slices
        return self._launch("prepare", grid, self.height)

    @cached_property
    def merge(self) -> Launch:
        return self._launch("merge", self._blocks("merge"), self.splits, CAPACITY=self.capacity)

    @cached_property
    def apply(self) -> Launch:
        """In backward, with the softmax's constants known."""
        grid = self._blocks("apply")[0], self.apply_splits, self.slices
        return self._launch("apply", grid, self.apply_splits, self.apply_height, FORM=self.form)

    @cached_property
    def apply_first(self) -> Launch:
        """In forward, where the parts that ``prepare`` found are yet to be combined."""
        rows, columns, warps = BLOCKS["prepare"]
        blocks = self.recipe | {"FORM": self.form, "ROWS": rows, "COLUMNS": columns}
        sizes = self.inputs, self.outputs, self.splits, self.height
        return Launch("apply", self.prepare.grid, sizes, blocks, warps)

    @cached_property
    def contract(self) -> Launch:
        grid = self._blocks("contract")
        return self._launch("contract", grid, self.apply_splits, FORM=self.form)

    @cached_property
    def finish(self) -> Launch:
        grid = math.ceil(self.total / FLAT), self.slices, 1
        return Launch("finish", grid, (self.total,), {"FORM": self.form, "BLOCK": FLAT})

    @cached_property
    def gather(self) -> Launch:
        programs = sum(math.ceil(size / GATHER) for size in self.sizes)
        grid = programs + math.ceil(self.scalars / 8), self.slices, 1
        constants = {"SCALARS": self.scalars, "BLOCK": GATHER}
        numbers = *self.sizes, self.wide, self.tall, self.weighted
        return Launch("gather", grid, numbers, constants)


@lru_cache(maxsize=1024)
def plan_of(kernel: Kernel, form: str, slices: int, inputs: int, outputs: int) -> Plan:
    """The plan for layers of this shape."""
    return Plan(kernel, form, slices, inputs, outputs)


# Counters by layer, so that programs of layers on several streams are not counted together. Should
# they be, a window is chosen too early or not at all, which costs time, and nothing else.
_counters: OrderedDict[tuple[int, torch.device, int], Tensor] = OrderedDict()


def _counter(a: Tensor, slices: int) -> Tensor:
    key = a.data_ptr(), a.device, slices
    counter = _counters.get(key)
    if counter is None:
        with torch.inference_mode(False):
            counter = _counters[key] = a.new_zeros(slices, dtype=torch.int32)
        if len(_counters) > 4096:
            _counters.popitem(last=False)
    return counter


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int | None:
    """Of the launches; None under the interpreter."""
    if device.type != "cuda":
        return None
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def _key(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The types and alignment of tensors that come from elsewhere."""
    return tuple([None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors])


def found_like(update: Update, a: Tensor, b: Tensor) -> Found:
    """Uninitialised memory for what ``effective_weight`` finds."""
    slices, _, inputs, _ = a.shape
    selection = torch.empty(4, slices, dtype=SELECTION_TYPE, device=a.device)
    shape = slices, update.kernel.rank + 2, inputs
    return Found(selection, torch.empty(shape, dtype=torch.float32, device=a.device))


def budgets_of(found: Found) -> Tensor:
    """The entries to keep that a selection was made for."""
    return found.selection[3]


def effective_weight(
    update: Update,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    budgets: Tensor,
    dtype: torch.dtype,
    transient: bool = False,
) -> tuple[Tensor, Found]:
    """See ``backends.dispatch.effective_weight``. Raises ``Broken``."""
    slices, _, inputs, _ = a.shape
    plan = plan_of(update.kernel, update.form, slices, inputs, b.shape[2])
    device = a.device
    a, b, scalars = a.contiguous(), b.contiguous(), scalars.contiguous()
    base = None if weight is None else weight.contiguous()
    found = found_like(update, a, b)
    size = plan.unsorted if update.form == "none" else plan.work
    work = torch.empty(size, dtype=torch.float32, device=device)
    out = torch.empty(slices * plan.outputs, inputs, dtype=dtype, device=device)
    with _on(device):
        start: dict[str, Any] = {
            "key": plan.variant(*_key(a, b, scalars, base, budgets), dtype, device.index),
            "stream": _stream(device),
        }
        if update.form == "none":
            plan.prepare(a, b, scalars, None, found.constants, work, None, **start)
            absent = None, base, out, None, None
            plan.apply_first(b, scalars, found.constants, work, *absent, update.scale, **start)
            return out, found
        if budgets.device != device:
            budgets = budgets.to(device)
        rest = budgets, found.constants, work
        plan.prepare(a, b, scalars, *rest, _counter(a, slices), **start)
        plan.merge(b, scalars, *rest, found.selection, **start)
        plan.finish(work, found.selection, base, out, update.scale, **start)
    return out, found


def contract(
    update: Update,
    found: Found,
    dense: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor,
    needs_effective: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Gradients]:
    """See ``backends.dispatch.contract``; gradients in the parameters' types. Raises ``Broken``."""
    slices, _, inputs, _ = a.shape
    plan = plan_of(update.kernel, update.form, slices, inputs, b.shape[2])
    device = a.device
    a, b, scalars = a.contiguous(), b.contiguous(), scalars.contiguous()
    base = None if weight is None else weight.contiguous()
    dense = dense.contiguous()
    selection = None if update.form == "none" else found.selection
    out = None
    if needs_effective:
        out = torch.empty(slices * plan.outputs, inputs, dtype=dtype, device=device)
    parts = torch.empty(plan.shares, dtype=torch.float32, device=device)
    gradients = torch.empty_like(a), torch.empty_like(b), torch.empty_like(scalars)
    with _on(device):
        kinds = *_key(a, b, scalars, base, dense), dtype, needs_effective, device.index
        start: dict[str, Any] = {"key": plan.variant(*kinds), "stream": _stream(device)}
        function = b, scalars, found.constants
        if plan.mixed:
            places = selection, base, out, dense, parts
            plan.apply(*function, None, *places, update.scale, **start)
        elif out is not None:
            absent = None, None
            plan.apply(*function, None, selection, base, out, *absent, update.scale, **start)
        plan.contract(*function, selection, dense, parts, update.scale, **start)
        plan.gather(parts, selection, *gradients, **start)
    return out, gradients
