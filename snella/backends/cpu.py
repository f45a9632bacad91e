"""The elementwise part of a layer as compiled loops on the CPU: cpu.cpp, called by ctypes.

The same function as ``backends.tiles`` and ``equations.sparsify``, for the piecewise kernels. The
source is compiled once per kernel, form and number type by the machine's own C++ compiler, in a
second or two, and kept in the user's cache (``$XDG_CACHE_HOME/snella``). Where that fails
the caller goes on with the tiles; who asked for the loops is warned once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from ctypes import byref, c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snella.backends.scratch import FreshMemory, Scratch
from snella.backends.update import Found, Gradients, Update, compute_type, new_tensor
from snella.equations.kernels import Kernel
from snella.files import digest_file

SELECTION_TYPE = torch.float64
SOURCE = Path(__file__).with_name("cpu.cpp")
COMPILERS = ("c++", "g++", "clang++")
# Contraction of products is left to the source, so that all loops round alike.
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    "-fopenmp" if sys.platform == "linux" else "-fopenmp-simd",
)
# By the instruction set that torch found, and not by the machine: caches are shared in clusters.
INSTRUCTIONS = {"AVX512": ("-march=x86-64-v4",), "AVX2": ("-march=x86-64-v3",)}
FUNCTIONS = {"snella_forward": 5, "snella_select": 4, "snella_backward": 8}


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("slices", "outputs", "inputs", "threads")),
        *((name, c_void_p) for name in ("a", "b", "scalars", "softmax")),
        ("scale", c_double),
    )


def usable(update: Update, a: Tensor) -> bool:
    """Whether there are loops for this kernel, and a compiler; the first call compiles them."""
    if update.compile is False or update.keep or not update.kernel.is_piecewise:
        return False
    if a.device.type != "cpu":
        return False
    if _library(update.kernel, update.form, _number(a)) is not None:
        return True
    if update.compile:
        _warn()
    return False


def in_use() -> bool:
    """Whether this process has loaded loops; they round otherwise than torch operations do."""
    return _library.cache_info().currsize > 0 and not _failures()


@lru_cache
def _warn() -> None:
    reason = _failures()[0].strip().partition("\n")[0]
    warnings.warn(f"SNELLA runs without compiled loops ({reason}).", stacklevel=2)


def _number(a: Tensor) -> str:
    return "double" if a.dtype == torch.float64 else "float"


@lru_cache
def _library(kernel: Kernel, form: str, number: str) -> ctypes.CDLL | None:
    """The compiled loops; None where they cannot be had."""
    if _failures():
        return None
    try:
        library = ctypes.CDLL(str(_build(_settings(kernel, form, number))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _failures().append(getattr(error, "stderr", None) or str(error))
        return None
    for name, arguments in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [c_void_p] * arguments, None
    return library


@lru_cache
def _failures() -> list[str]:
    """What the compiler said when it failed; it is not asked again in this process."""
    return []


def _settings(kernel: Kernel, form: str, number: str) -> list[str]:
    mixed = kernel.name == "mix-k"
    values = {
        "REAL": number,
        "PIECES": kernel.pieces,
        "COORDINATES": kernel.coordinates,
        "MIXED": int(mixed),
        "TEMPERATURE": int(mixed and kernel.temperature),
        "LEARNED": int(kernel.learnable_coefficients),
        "FORM": ("none", "released", "paper").index(form),
    }
    return [f"-D{name}={value}" for name, value in values.items()]


def _build(settings: list[str]) -> Path:
    """Compile the source, unless this was done before; the path of the library."""
    names = (os.environ.get("CXX"), *COMPILERS)
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the PATH")
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())
    if not instructions and platform.machine() in ("x86_64", "AMD64"):
        raise OSError("the processor has no AVX2, without which they would be slower")
    command = [compiler, *FLAGS, *instructions, *settings]
    machine = platform.machine(), sys.platform, *platform.libc_ver()
    identity = (*machine, *command, SOURCE.read_text())
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snella"
    library = cache / f"{name}.so"
    if not _whole(library):
        cache.mkdir(parents=True, exist_ok=True)
        # Compiled beside its place and moved there whole: other processes may be at the same.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / library.name
            command += [str(SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            digest = Path(folder) / "digest"
            digest.write_text(digest_file(built))
            built.replace(library)
            digest.replace(_digest_of(library))
    return library


def _digest_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _whole(library: Path) -> bool:
    """Whether a cached library is as it was compiled.

    Loading one that a full disk or a crash cut short would end the process with SIGBUS.
    """
    try:
        return digest_file(library) == _digest_of(library).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def found_like(update: Update, a: Tensor, b: Tensor) -> Found:
    """Uninitialised memory for what ``effective_weight`` finds.

    The constants are the softmax's shift and normaliser.
    """
    constants = new_tensor(a, a.shape[0], 2, a.shape[2])
    return Found(new_tensor(a, 3, a.shape[0], dtype=SELECTION_TYPE), constants)


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
    """See ``backends.dispatch.effective_weight``."""
    found, kind = found_like(update, a, b), compute_type(a)
    factors = _plain((a, b, scalars), kind)
    memory = Scratch.like(a, kind) if transient else FreshMemory(a.device, kind)
    out = memory.take("effective", b.shape[0] * b.shape[2], a.shape[2])
    base = None if weight is None else _plain((weight,), kind)[0]
    (budgets,) = _plain((budgets,), torch.int64)
    layer = _layer(update, factors, found.constants)
    arguments = map(_address, (budgets, base, out, found.selection))
    _loaded(update, a).snella_forward(byref(layer), *arguments)
    return out.to(dtype), found


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
    """See ``backends.dispatch.contract``."""
    kind = compute_type(a)
    dense, *factors = _plain((dense, a, b, scalars), kind)
    out = base = None
    if needs_effective:
        out = Scratch.like(a, kind).take("effective", b.shape[0] * b.shape[2], a.shape[2])
        base = None if weight is None else _plain((weight,), kind)[0]
    grad_a, grad_b, grad_scalars = (torch.zeros_like(tensor) for tensor in factors)
    layer = _layer(update, factors, found.constants)
    tensors = found.selection, dense, base, out, grad_a, grad_b, grad_scalars
    _loaded(update, a).snella_backward(byref(layer), *map(_address, tensors))
    return None if out is None else out.to(dtype), (grad_a, grad_b, grad_scalars)


def _plain(tensors: Sequence[Tensor], kind: torch.dtype) -> list[Tensor]:
    """In the form the loops take; the caller keeps them alive during the call."""
    return [tensor.detach().to(kind).contiguous() for tensor in tensors]


def _layer(update: Update, factors: Sequence[Tensor], constants: Tensor) -> _Layer:
    a, b, scalars = factors
    slices, _, inputs, _ = a.shape
    outputs = b.shape[2]
    # A small matrix is done before a second thread has woken up.
    threads = torch.get_num_threads() if outputs * inputs > 2**15 else 1
    addresses = map(_address, (a, b, scalars, constants))
    return _Layer(slices, outputs, inputs, threads, *addresses, update.scale)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _loaded(update: Update, a: Tensor) -> Any:
    return _library(update.kernel, update.form, _number(a))
