"""W + S as one plain matrix for evaluation, kept for as long as its contents prove it right.

Versions and addresses of tensors prove nothing: fused optimizers, ``.data`` and CUDA graphs write
without a trace. So the small tensors are compared with copies, and of the frozen weight sums of its
words, in one pass over memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from snella.backends.dispatch import effective_weight
from snella.backends.update import Factors, Update

# Words of eight bytes per sum. Odd, so that the signs of all of them do not change unseen.
WORDS = 61
# A weight up to so many words is as quickly copied.
SMALL = 2**13

# One adapter, and the factor on every output, if it has a gate.
Part = tuple[Update, Factors, Tensor | None]


def fingerprint(weight: Tensor) -> Tensor:
    """Sums that change with any word of a weight, and with edits of several.

    The words of a sum lie a sixtieth of the weight apart, and in other rows and columns, so that
    edits of neighbours, of a row or of a column do not cancel, as their order and signs would.
    """
    data = weight.detach().contiguous().view(-1).view(torch.uint8)
    if data.numel() <= 8 * SMALL:
        return data.clone()
    if data.storage_offset() % 8:
        data = data.clone()
    words = data[: data.numel() // 8 * 8].view(torch.int64)
    sums, row = words.numel() // WORDS, max(1, weight[0].nbytes // 8)
    while math.gcd(sums, row) > 1:
        sums -= 1
    whole = WORDS * sums
    return torch.cat([words[:whole].view(WORDS, sums).sum(0), data[8 * whole :].long()])


class Fold:
    """The matrix of one layer, and what it was made of."""

    def __init__(self) -> None:
        self.matrix: Tensor | None = None
        self._updates: list[Update] = []
        self._copies: list[Tensor] = []

    def clear(self) -> None:
        """Give the memory back."""
        self.matrix, self._copies = None, []

    def of(self, weight: Tensor, parts: Sequence[Part]) -> Tensor:
        """W + Σ S, (out, in), in the type of the weight; not differentiable."""
        with torch.inference_mode(False), torch.no_grad():
            if weight.device.type != "cpu":
                return _fold(weight, parts)  # comparing would wait for the device
            updates, tensors = [part[0] for part in parts], [t for part in parts for t in part[1]]
            tensors += [part[2] for part in parts if part[2] is not None]
            state = [fingerprint(weight), *tensors]
            if self.matrix is None or not self._is_right(weight, updates, state):
                self.matrix = _fold(weight, parts)
                self._updates = updates
                self._copies = [state[0], *(tensor.detach().clone() for tensor in tensors)]
            return self.matrix

    def _is_right(self, weight: Tensor, updates: list[Update], state: list[Tensor]) -> bool:
        assert self.matrix is not None
        return (
            (self.matrix.dtype, self.matrix.shape) == (weight.dtype, weight.shape)
            and updates == self._updates
            and len(state) == len(self._copies)
            and all(map(_equal, state, self._copies))
        )


def _equal(one: Tensor, two: Tensor) -> bool:
    return (one.dtype, one.shape, one.device) == (two.dtype, two.shape, two.device) and torch.equal(
        one, two
    )


def _fold(weight: Tensor, parts: Sequence[Part]) -> Tensor:
    folded = weight
    for update, tensors, factor in parts:
        if factor is None:
            folded, _ = effective_weight(update, folded, *tensors)
        else:
            delta, _ = effective_weight(update, None, *tensors)
            folded = folded + factor.unsqueeze(1) * delta
    return folded.to(weight.dtype)
