"""What the update of one layer is: the types that layers, dispatcher and all backends share.

S is a function of A, B, scalars and budgets, by the choices in ``Update``. Nothing of it outlives a
forward and its backward: thresholds are ``Found`` anew whenever a graph is recorded, as writes to
the parameters cannot be told reliably (fused optimizers, ``.data``, replayed CUDA graphs).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from snella.equations.kernels import Kernel


@dataclass(frozen=True)
class Update:
    """The choices that make an adapter's function, apart from its tensors.

    form: of sparsification, see ``equations.sparsify``. scale: factor on the update. keep: whether
    tiles are kept for backward. compile: whether the elementwise part runs as compiled loops or
    kernels; None where there are any. spec: the same as text, for operators, whose arguments are
    tensors, numbers and strings.
    """

    kernel: Kernel
    form: str
    scale: float = 1.0
    keep: bool = False
    compile: bool | None = None

    spec: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fields = {"kernel": asdict(self.kernel), "form": self.form, "scale": self.scale}
        object.__setattr__(self, "spec", json.dumps(fields | {"compile": self.compile}))


@lru_cache(maxsize=1024)
def from_spec(spec: str) -> Update:
    """The inverse of ``Update.spec``; an operator never keeps tiles."""
    fields = json.loads(spec)
    return Update(**fields | {"kernel": Kernel(**fields["kernel"])})


@dataclass(frozen=True)
class Found:
    """What one forward found, and its backward relies on; each backend has its own layout.

    selection: (3, slices), threshold, subtracted magnitude, and cut (−1 where nothing is kept).
    constants: the softmax's, and others that are not worth finding twice. tiles: kept ones.
    """

    selection: Tensor
    constants: Tensor
    tiles: Any = None


# A, B, scalars and budgets, as in ``backends.dispatch.effective_weight``
Factors = tuple[Tensor, Tensor, Tensor, Tensor]
# ∂L/∂A, ∂L/∂B, ∂L/∂scalars
Gradients = tuple[Tensor, Tensor, Tensor]


def compute_type(parameter: Tensor) -> torch.dtype:
    """Merged matrices are evaluated in double precision for double parameters, else in single."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def new_tensor(parameter: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, on the parameter's device, in its compute type."""
    return torch.empty(shape, dtype=dtype or compute_type(parameter), device=parameter.device)
