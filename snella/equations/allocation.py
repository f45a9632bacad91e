"""Layer-level competition: how many weights every layer may tune (paper Eq. 7-12, Algorithm 1).

A "layer" is one weight matrix of N_l entries. Its importance is the mean over A plus the mean over
B of smoothed sensitivity times smoothed uncertainty; the model's budget b(t) falls from b_0 to b_T
and is shared out in proportion to importance, no layer receiving more than N_l.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snella.errors import UserError, unknown

SCHEDULES = {"constant": None, "linear": 1, "quadratic": 2, "cubic": 3}
SCORES = ("sensitivity", "magnitude", "weight-magnitude")


@dataclass(frozen=True)
class Schedule:
    """The model's budget over time, b(t) = b_T + (1 − t/T)^k (b_0 − b_T)  (Eq. 12; cubic: k = 3).

    start, target: b_0 and b_T in entries; constant stays at b_T throughout.
    warmup: updates at b_0 before the decay; cooldown: updates at b_T after it; interval: updates
    between two reallocations. reach_target: the last update sits at b_T (paper: t = 0 … T);
    otherwise it is one update short of it (released code).
    """

    start: float
    target: float
    shape: str = "cubic"
    warmup: int = 0
    cooldown: int = 0
    interval: int = 1
    reach_target: bool = True

    def __post_init__(self) -> None:
        if self.shape not in SCHEDULES:
            raise unknown("budget schedule", self.shape, SCHEDULES)
        if self.interval < 1 or self.warmup < 0 or self.cooldown < 0:
            raise UserError(
                "interval must be at least 1; warmup and cooldown must not be negative."
            )

    def budget(self, update: int, updates: int) -> int:
        """Entries that may be non-zero in the whole model at update 0 <= t < ``updates``."""
        exponent = SCHEDULES[self.shape]
        if exponent is None:
            return int(self.target)
        if update <= self.warmup:
            return int(self.start)
        if update > updates - self.cooldown:
            return int(self.target)
        span = updates - self.cooldown - self.warmup - (1 if self.reach_target else 0)
        remaining = max(0.0, 1 - (update - self.warmup) / max(span, 1))
        return int(self.target + (self.start - self.target) * remaining**exponent)

    def reallocates(self, update: int, updates: int) -> bool:
        """Whether layers compete anew at this update; the first one has no scores to go by."""
        if update <= self.warmup:
            return False
        return update > updates - self.cooldown or update % self.interval == 0


def allocate(scores: Sequence[float], sizes: Sequence[int], budget: int) -> list[int]:
    """Algorithm 1 with integers: entries per layer, summing to min(budget, Σ sizes) exactly.

    Layers take budget · score; what a full layer cannot take goes to the others in proportion, and
    fractions are rounded by largest remainder (ties: lower index first). Scores that are NaN,
    infinite or negative count as 0; if no score is positive, layers share in proportion to size.
    """
    if len(scores) != len(sizes):
        raise UserError(f"{len(scores)} scores for {len(sizes)} layers.")
    if budget < 0:
        raise UserError(f"budget must not be negative, got {budget}.")
    remaining = min(int(budget), sum(sizes))
    clean = [s if math.isfinite(s) and s > 0 else 0.0 for s in map(float, scores)]
    granted = [0] * len(sizes)
    while remaining > 0:
        open_layers = [i for i, size in enumerate(sizes) if granted[i] < size]
        weights = _competing_weights(clean, sizes, granted, open_layers)
        overfull = [i for i in weights if remaining * weights[i] >= sizes[i] - granted[i]]
        if not overfull:
            _round_largest_remainder(granted, weights, remaining)
            break
        # Shares only grow when full layers leave, so a layer that overflows now always will.
        for i in overfull:
            remaining -= sizes[i] - granted[i]
            granted[i] = sizes[i]
    return granted


def _competing_weights(
    scores: list[float], sizes: Sequence[int], granted: list[int], layers: list[int]
) -> dict[int, float]:
    """Normalised scores of the layers with room; by room when none of them has a positive score."""
    scored = [i for i in layers if scores[i] > 0]
    if scored:
        largest = max(scores[i] for i in scored)
        values = {i: scores[i] / largest for i in scored}
    else:
        values = {i: float(sizes[i] - granted[i]) for i in layers}
    total = math.fsum(values.values())
    return {i: value / total for i, value in values.items()}


def _round_largest_remainder(granted: list[int], weights: dict[int, float], remaining: int) -> None:
    shares = {i: remaining * weight for i, weight in weights.items()}
    left = remaining - sum(math.floor(share) for share in shares.values())
    order = sorted(shares, key=lambda i: (math.floor(shares[i]) - shares[i], i))
    for rank, i in enumerate(order):
        granted[i] += math.floor(shares[i]) + (1 if rank < left else 0)


def allocate_released(scores: Sequence[float], sizes: Sequence[int], budget: int) -> list[int]:
    """The released code's sharing rule: a truncated first pass, then real-valued passes, truncated.

    Single precision, as released; the sum may stay a few weights below the budget. Scores need not
    be normalised; unusable ones are treated as in ``allocate``.
    """
    clean = [s if math.isfinite(s) and s > 0 else 0.0 for s in map(float, scores)]
    if not any(clean):
        return allocate(scores, sizes, budget)
    values = torch.tensor(clean, dtype=torch.float64) / max(clean)
    score = (values / values.sum()).float()
    room = torch.tensor(list(sizes), dtype=torch.float32)
    granted = torch.minimum((budget * score).int().float(), room)
    left = budget - granted.sum()
    while left > 0:
        open_score = torch.where(granted < room, score, 0.0)
        if not open_score.any():
            break
        share = torch.minimum(left * open_score / open_score.sum(), room - granted)
        granted = granted + share
        previous, left = left, budget - granted.sum()
        if left >= previous:
            break
    return [int(value) for value in granted]


class Importance:
    """Smoothed sensitivity and uncertainty of every low-rank matrix (Eq. 7-10), on its own device.

    beta1, beta2: smoothing of sensitivity and of uncertainty.
    from_first: the averages start at the first step's sensitivity and 0 (Eq. 8); otherwise both
    start at 0 and are smoothed in the first step too (released code).
    skip_nonfinite: a step with a NaN or infinite gradient anywhere leaves the averages alone and is
    counted in ``skipped``; otherwise only the entries concerned count as 0 (released code does so
    with NaN, while one infinite entry freezes it for good).
    """

    def __init__(
        self,
        beta1: float = 0.85,
        beta2: float = 0.85,
        from_first: bool = True,
        skip_nonfinite: bool = True,
    ) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta <= 1:
                raise UserError(f"{name} must lie in [0, 1], got {beta}.")
        self.beta1, self.beta2 = beta1, beta2
        self.from_first, self.skip_nonfinite = from_first, skip_nonfinite
        self.sensitivity: list[Tensor] = []
        self.uncertainty: list[Tensor] = []
        # Places of the matrices of one device and type, and the memory of all their averages: few
        # operations then do for all.
        self._groups: list[tuple[list[int], Tensor, Tensor]] = []
        self._started: Tensor | None = None
        self._skipped: Tensor | None = None

    @torch.no_grad()
    def update(
        self, factors: list[Tensor], grads: list[Tensor], left_out: Tensor | bool = False
    ) -> None:
        """Take in one optimizer step: matrices and their gradients, always in the same order.

        left_out: whether the optimizer left the step out; it then counts as skipped.
        """
        if not self.sensitivity:
            self._start(factors)
        assert self._started is not None and self._skipped is not None
        usable = torch.ones_like(self._started)
        if left_out is not False:
            usable &= ~torch.as_tensor(left_out, device=usable.device)
        gradients = [_flatten([grads[i] for i in places]) for places, _, _ in self._groups]
        if self.skip_nonfinite:
            for gradient in gradients:
                usable &= gradient.isfinite().all().to(usable.device)
        self._skipped += ~usable
        for (places, sensitivity, uncertainty), gradient in zip(
            self._groups, gradients, strict=True
        ):
            current = _flatten([factors[i] for i in places]).mul_(gradient).abs_()
            current.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            rate1, rate2 = self._rates(usable.to(current), self._started.to(current))
            sensitivity.add_((current - sensitivity).mul_(rate1))
            deviation = current.sub_(sensitivity).abs_()
            uncertainty.add_(deviation.sub_(uncertainty).mul_(rate2))
        self._started |= usable

    def _start(self, factors: list[Tensor]) -> None:
        zeros = [torch.zeros_like(factor) for factor in factors]
        self._place(factors, zeros, zeros)
        device = factors[0].device
        self._started = torch.tensor(not self.from_first, device=device)
        self._skipped = torch.zeros((), dtype=torch.long, device=device)

    def _place(self, like: list[Tensor], *averages: list[Tensor]) -> None:
        """Put sensitivities and uncertainties where the matrices are, in their types."""
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, tensor in enumerate(like):
            kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
        self.sensitivity, self.uncertainty = (list(values) for values in averages)
        self._groups = [
            (places, _join(self.sensitivity, places, like), _join(self.uncertainty, places, like))
            for places in kinds.values()
        ]

    def follow(self, factors: list[Tensor]) -> None:
        """Move the averages to where the matrices are, after ``model.to(...)``."""
        if not self.sensitivity:
            return
        assert self._started is not None and self._skipped is not None
        if any(
            average.device != factor.device or average.dtype != factor.dtype
            for average, factor in zip(self.sensitivity, factors, strict=True)
        ):
            self._place(factors, self.sensitivity, self.uncertainty)
            device = factors[0].device
            self._started, self._skipped = self._started.to(device), self._skipped.to(device)

    def _rates(self, usable: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
        """Smoothing rates as device scalars: (1, 0) at Eq. 8's first step, (0, 0) when skipped."""
        return (1 - self.beta1 * started) * usable, (1 - self.beta2) * started * usable

    def scores(self) -> list[Tensor]:
        """Mean of sensitivity · uncertainty (Eq. 11) of every matrix, per slice: (slices,) each."""
        products = torch._foreach_mul(self.sensitivity, self.uncertainty)
        return [product.flatten(1).mean(1) for product in products]

    @property
    def skipped(self) -> int:
        """Steps left out because of a gradient that was not finite."""
        return 0 if self._skipped is None else int(self._skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as plain tensors."""
        if self._started is None or self._skipped is None:
            return {}
        state = {"started": self._started, "skipped": self._skipped}
        for i, (sensitivity, uncertainty) in enumerate(
            zip(self.sensitivity, self.uncertainty, strict=True)
        ):
            state |= {f"sensitivity.{i}": sensitivity, f"uncertainty.{i}": uncertainty}
        return {name: value.clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor], factors: list[Tensor]) -> None:
        """Restore ``state_dict``; ``factors`` gives order, shapes and devices."""
        if not state:
            self.sensitivity, self.uncertainty, self._groups = [], [], []
            self._started = self._skipped = None
            return
        self._start(factors)
        for i, (sensitivity, uncertainty) in enumerate(
            zip(self.sensitivity, self.uncertainty, strict=True)
        ):
            sensitivity.copy_(state[f"sensitivity.{i}"])
            uncertainty.copy_(state[f"uncertainty.{i}"])
        assert self._started is not None and self._skipped is not None
        self._started.copy_(state["started"])
        self._skipped.copy_(state["skipped"])


def _flatten(tensors: list[Tensor]) -> Tensor:
    """All values, one after the other, in new memory."""
    return (
        torch._C._nn.flatten_dense_tensors(tensors)
        if len(tensors) > 1
        else tensors[0].flatten().clone()
    )


def _join(tensors: list[Tensor], places: list[int], like: list[Tensor]) -> Tensor:
    """One memory for the tensors at these places, which become its parts."""
    whole = _flatten([tensors[i].to(like[i]) for i in places])
    parts = whole.split([like[i].numel() for i in places])
    for i, part in zip(places, parts, strict=True):
        tensors[i] = part.view(like[i].shape)
    return whole
