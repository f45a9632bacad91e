"""Triton kernels behind ``backends.gpu``: merged matrix, exact selection, update, and the way back.

A program sees a block of one slice's matrix: rows are outputs, columns inputs. Distances come from
differences, d² = Σ_k (B_ok − A_ik)², and are evaluated wherever they are needed: arithmetic is
cheaper than memory. Forward and backward must agree bit by bit on the merged matrix, or backward
would keep other entries; hence the one ``evaluate``, fused multiply-adds only where written, and
sums over blocks in a fixed order. Only integers are added atomically: all results are
deterministic.

Names: a is A, b is B, (slices, pieces, features, coordinates); scalars (slices · K); budgets
(slices), entries to keep, or None for all; constants (slices, pieces · coordinates + 2, inputs), A
with features last, then shift and 1 / Σ exp of the softmax of every column; selection (4, slices),
integers, the bits of the threshold and of the subtracted magnitude, the cut, and the entries kept,
or None for all; dense is ∂L/∂S, (slices, outputs, inputs); PIECES … LEARNED are the choices of
``equations.kernels.Kernel``. Absent arguments are None, which is known when a kernel is compiled.
"""

from snella.backends.triton.backward import contract, gather
from snella.backends.triton.forward import apply, finish, merge, prepare

__all__ = ["apply", "contract", "finish", "gather", "merge", "prepare"]
