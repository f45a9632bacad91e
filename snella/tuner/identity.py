"""The start at the backbone's own function (``init_weights=True``): a gate at 0.

The paper's start is a small random update. It cannot be zero by the choice of A and B: Eq. 13 is
quadratic at 0, where all gradients vanish. So S gets a learned factor per matrix, the gate, that
starts at 0. In the first step only the gates have a gradient, as only B has with LoRA; and what a
step of the gate does is in proportion to S, which therefore starts at about a third of the frozen
weight's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snella.equations.kernels import Kernel, merge

# Root mean square of S over that of the frozen weight, and what is assumed of one out of reach.
_SIZE, _USUAL = 0.3, 0.03
_SAMPLE = 64


@torch.no_grad()
def enlarge(
    kernel: Kernel, form: str, a: Tensor, b: Tensor, scalars: Tensor, weight: Tensor | None
) -> None:
    """Redraw A and B with unit spread, and scale the update; in place.

    Shapes as in ``equations.kernels.merge``; scalars: (slices · K,).
    """
    bound = (3 / kernel.coordinates) ** 0.5
    a.uniform_(-bound, bound)
    b.uniform_(-bound, bound)
    if a.is_meta:
        return
    values = scalars.view(len(a), -1)
    rows, columns = a[:, :, :_SAMPLE].float(), b[:, :, :_SAMPLE].float()
    dense = merge(kernel, rows, columns, values.float())
    size = (dense if form == "none" else dense.square()).square().mean().sqrt()
    known = weight is not None and weight.is_floating_point() and not weight.is_meta
    usual = float(weight.float().square().mean().sqrt()) if known and weight is not None else 0.0
    ratio = _SIZE * (usual or _USUAL) / max(float(size), 1e-12)
    factor = ratio if form == "none" else ratio**0.5
    coefficients = [k for k in kernel.scalars if k.startswith("coefficient")]
    if coefficients:
        values[:, [kernel.scalar_index[name] for name in coefficients]] *= factor
    elif kernel.is_piecewise or kernel.name == "linear":  # a distance, or a product of two
        a *= factor if kernel.is_piecewise else factor**0.5
        b *= factor if kernel.is_piecewise else factor**0.5
