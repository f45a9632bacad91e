"""SnellaConfig: every choice of SNELLA (arXiv 2510.24037) as a field of a Hugging Face PEFT config.

``variant`` fills the fields left at None: "paper" follows the text, "released" the authors' code
(github.com/ssfgunner/SNELL at e9d5185). Each field can be set alone. Further settings of the same
code: SNELL is ``allocation=False, kernel="piecewise-linear"``, KLoRA also ``sparsify="none"``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from snella.equations.allocation import SCHEDULES, SCORES
from snella.equations.kernels import Kernel
from snella.equations.sparsify import BUDGET_RULES, FORMS
from snella.errors import UserError, unknown


class SnellaPeftType(enum.StrEnum):
    """PEFT's own enum is closed; a str member equal to its name works wherever PEFT looks it up."""

    SNELLA = "SNELLA"


# The released code gives dropout to the updates of all layers but these.
_ATTENTION_OUTPUTS = ("proj", "o_proj", "out_proj", "to_out.0", "attention.output.dense")
# name of the field: (paper, released)
_VARIANTS: dict[str, tuple[Any, Any]] = {
    "coefficients": ("learnable", "fixed"),
    "temperature": (False, True),
    "sparsify": ("paper", "released"),
    "initial_sparsity": (0.0, 0.01),
    "budget_rule": ("exact", "quantile"),
    "sharing": ("exact", "released"),
    "reach_target": (True, False),
    "sensitivity_at": ("before-step", "after-step"),
    "smoothing_start": ("first-step", "zero"),
    "nonfinite": ("skip-step", "zero-entries"),
    "dropout": (0.0, 0.1),
    "drop_path": (0.0, 0.1),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "coefficients": ("learnable", "fixed"),
    "sparsify": FORMS,
    "budget_rule": BUDGET_RULES,
    "sharing": ("exact", "released"),
    "schedule": tuple(SCHEDULES),
    "interval": ("epoch", "step"),
    "score": SCORES,
    "sensitivity_at": ("before-step", "after-step"),
    "smoothing_start": ("first-step", "zero"),
    "nonfinite": ("skip-step", "zero-entries"),
}
_FRACTIONS = ("initial_sparsity", "target_sparsity", "beta1", "beta2")


@dataclass
class SnellaConfig(PeftConfig):
    """Configuration of a SNELLA adapter.

    Which layers
        target_modules: linear layers to adapt: names, a regular expression, or None for those of
            the blocks of a ViT, Swin, ConvNeXt, SAM encoder or diffusion transformer.
        exclude_modules, layers_to_transform, layers_pattern: as everywhere in PEFT.
        modules_to_save: modules trained in full and saved with the adapter, e.g. ``["head"]``.
        fused_parts: layers that stack several matrices along their output, and into how many equal
            parts they fall. Each part has its own kernel, budget and threshold.
    Merged matrix (Eq. 6, Table 14)
        rank, pieces: r and P; the pieces share the rank.
        kernel: mix-k, piecewise-linear, linear, sigmoid, rbf or rbf-normalised.
        coefficients: piece coefficients c_p "learnable", or "fixed" at ±0.1.
        temperature: a learnable temperature in the softmax of mix-k.
    Sparsity (Eq. 13)
        sparsify: "paper" (Eq. 13), "released" (W·|W| above the threshold) or "none".
        initial_sparsity, target_sparsity: share of entries at zero when training starts and ends;
            without allocation, and with a constant schedule, it is the target throughout.
        budget_rule: "exact", or "quantile" for the released code's count (at most N − 1).
    Budget and allocation (Eq. 7-12, Algorithm 1)
        allocation: layers compete for the budget; off means uniform sparsity.
        schedule: constant, linear, quadratic or cubic; reach_target: whether the last update sits
            at the target or one update short of it.
        interval: update once per "epoch" or "step"; warmup_updates, cooldown_updates, update_every:
            updates at the initial and at the target sparsity, and between two reallocations.
        sharing: "exact" integers, or "released" rounding.
        score: sensitivity, magnitude or weight-magnitude (Table 10).
        beta1, beta2: smoothing of sensitivity (Eq. 9) and uncertainty (Eq. 10).
        sensitivity_at: the weight in |w ∂L/∂w| from "before-step" (Eq. 7) or "after-step".
        smoothing_start: "first-step" (Eq. 8) or "zero".
        nonfinite: a gradient with NaN or inf means "skip-step" or "zero-entries".
    Training
        dropout: on the input of the update, except for layers named in no_dropout (by default those
            after attention).
        drop_path: stochastic depth on the output of the update, per sample.
        keep_merged: keep merged matrices for backward, at several times the adapter's memory (the
            paper compares both); rules out compiled loops.
        compile: whether the elementwise arithmetic runs as compiled loops instead of torch
            operations. None: on a CPU, where a C++ compiler is found (it takes a second or two).
    """

    rank: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fused_parts: dict[str, int] = field(default_factory=lambda: {"qkv": 3, "kv": 2})
    variant: str = "paper"

    kernel: str = "mix-k"
    pieces: int = 2
    coefficients: str | None = None
    temperature: bool | None = None

    sparsify: str | None = None
    budget_rule: str | None = None
    initial_sparsity: float | None = None
    target_sparsity: float = 0.7

    allocation: bool = True
    schedule: str = "cubic"
    interval: str = "epoch"
    warmup_updates: int = 0
    cooldown_updates: int = 0
    update_every: int = 1
    reach_target: bool | None = None
    sharing: str | None = None
    score: str = "sensitivity"
    beta1: float = 0.85
    beta2: float = 0.85
    sensitivity_at: str | None = None
    smoothing_start: str | None = None
    nonfinite: str | None = None

    dropout: float | None = None
    no_dropout: list[str] = field(default_factory=lambda: list(_ATTENTION_OUTPUTS))
    drop_path: float | None = None
    keep_merged: bool = False
    compile: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SnellaPeftType.SNELLA
        if self.variant not in ("paper", "released"):
            raise unknown("variant", self.variant, ("paper", "released"))
        for name, values in _VARIANTS.items():
            if getattr(self, name) is None:
                setattr(self, name, values[self.variant == "released"])
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        for name, parts in self.fused_parts.items():
            if not isinstance(parts, int) or parts < 1:
                raise UserError(f"fused_parts[{name!r}] must be a positive integer, got {parts!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern needs layers_to_transform.")
        if self.sparsify == "none" and self.allocation:
            raise UserError('sparsify="none" keeps every entry: also set allocation=False.')
        self.merge_kernel  # noqa: B018  raises the user's error for kernel, rank and pieces

    def to_dict(self) -> dict[str, Any]:
        """The fields as saved, in a reproducible order."""
        fields = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}

    @property
    def merge_kernel(self) -> Kernel:
        """The kernel as the mathematics sees it."""
        return Kernel(
            self.kernel,
            self.rank,
            self.pieces,
            learnable_coefficients=self.coefficients == "learnable",
            temperature=bool(self.temperature),
        )

    @property
    def sparsity_at_start(self) -> float:
        """Of a fresh adapter; uniform sparsity and constant schedules start at the target."""
        if not self.allocation or self.schedule == "constant":
            return self.target_sparsity
        assert self.initial_sparsity is not None
        return self.initial_sparsity
