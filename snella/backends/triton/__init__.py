"""Triton kernels behind ``backends.gpu``: merged matrix, exact selection, update, and the way back.

A program sees a block of one slice's matrix: rows are outputs, columns inputs. Distances come from
differences, d² = Σ_k (B_ok − A_ik)², and are evaluated wherever they are needed: arithmetic is
cheaper than memory. Forward and backward must agree bit by bit on the merged matrix, or backward
would keep other entries; hence the one ``evaluate``, fused multiply-adds only where written, and
sums over blocks in a fixed order. Only integers are added atomically: all results are
deterministic.

The threshold is found by its bits, 31 of a non-negative float, which order as integers: a histogram
of the first 8 tells them, then one of the next 12 among entries that agree so far, then one of the
last 11. Ties are then counted block by block in flat order. (snella.equations.sparsify.Selection)

Names: a is A as ``prepare`` has turned it, (slices, pieces, coordinates, inputs); b is B, (slices,
pieces, outputs, coordinates); scalars (slices · K); ranks (slices), how many entries are dropped,
or None; softmax, numbers and cuts as in ``backends.gpu.Constants``; dense is ∂L/∂S, (slices,
outputs, inputs); PIECES … LEARNED are the choices of ``equations.kernels.Kernel``.
"""

from snella.backends.triton.backward import contract, gather
from snella.backends.triton.forward import apply, merge, prepare
from snella.backends.triton.selection import finish, second, select, third

__all__ = [
    "apply",
    "contract",
    "finish",
    "gather",
    "merge",
    "prepare",
    "second",
    "select",
    "third",
]
