"""SnellaConfig: every choice of SNELLA (arXiv 2510.24037) as one field of a Hugging Face PEFT config.

``variant`` fills the fields left at None: "paper" follows the text, "released" the authors' code
(github.com/ssfgunner/SNELL at e9d5185). Each field can be set alone. Further settings of the same code:
SNELL is ``allocation=False, kernel="piecewise-linear"``, KLoRA also ``sparsify="none"``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig

from snella.allocation import SCHEDULES, SCORES
from snella.errors import UserError, unknown
from snella.kernels import Kernel
from snella.sparsify import BUDGET_RULES, FORMS


class SnellaPeftType(str, enum.Enum):
    """PEFT's own enum is closed; a str member equal to its name works wherever PEFT looks it up."""

    SNELLA = "SNELLA"


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


def _help(text: str, default: Any = None) -> Any:
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class SnellaConfig(PeftConfig):
    """Configuration of a SNELLA adapter; see the fields' help and ``docs/snella.md``."""

    rank: int = _help("Rank r of A and B, shared out over the pieces.", 8)
    target_modules: list[str] | str | None = _help(
        "Linear layers to adapt: names, a regular expression, or None for those of the blocks of a "
        "vision transformer, Swin, ConvNeXt, SAM encoder or diffusion transformer."
    )
    exclude_modules: list[str] | str | None = _help("Modules left alone although they match.")
    modules_to_save: list[str] | None = _help("Modules trained in full and saved, e.g. the head.")
    layers_to_transform: list[int] | int | None = _help("Indices of the blocks to adapt; all if None.")
    layers_pattern: list[str] | str | None = _help("Name of the list of blocks, for the indices.")
    fused_parts: dict[str, int] = _help(
        "Layers that stack several matrices along their output, e.g. query, key and value: name and "
        "number of equal parts. Each part has its own kernel, budget and threshold.",
        {"qkv": 3, "kv": 2},
    )
    variant: Literal["paper", "released"] = _help("Fills every field left at None.", "paper")

    kernel: str = _help("mix-k, piecewise-linear, linear, sigmoid, rbf or rbf-normalised.", "mix-k")
    pieces: int = _help("P, pieces of the piecewise kernels (Eq. 6).", 2)
    coefficients: str | None = _help("Piece coefficients c_p: learnable or fixed at ±0.1.")
    temperature: bool | None = _help("Learnable temperature in the softmax of mix-k.")

    sparsify: str | None = _help("paper (Eq. 13), released (W·|W| above the threshold) or none.")
    budget_rule: str | None = _help("exact, or quantile: the released code's count, at most N − 1.")
    initial_sparsity: float | None = _help("Share of entries at zero when training starts.")
    target_sparsity: float = _help("Share at the end; throughout, if allocation is off.", 0.7)

    allocation: bool = _help("Layers compete for the budget; off means uniform sparsity.", True)
    schedule: str = _help("Decay of the budget: constant, linear, quadratic or cubic.", "cubic")
    interval: str = _help("Reallocate once per epoch or per step.", "epoch")
    warmup_updates: int = _help("Updates at the initial sparsity.", 0)
    cooldown_updates: int = _help("Updates at the target sparsity.", 0)
    update_every: int = _help("Updates between two reallocations.", 1)
    reach_target: bool | None = _help("The last update sits at the target, not one short of it.")
    sharing: str | None = _help("Algorithm 1 with exact integers, or the released code's rounding.")
    score: str = _help("sensitivity, magnitude or weight-magnitude (Table 10).", "sensitivity")
    beta1: float = _help("Smoothing of the sensitivity (Eq. 9).", 0.85)
    beta2: float = _help("Smoothing of the uncertainty (Eq. 10).", 0.85)
    sensitivity_at: str | None = _help("Weight in |w ∂L/∂w|: before-step (Eq. 7) or after-step.")
    smoothing_start: str | None = _help("first-step (Eq. 8) or zero.")
    nonfinite: str | None = _help("A gradient with NaN or inf: skip-step or zero-entries.")

    dropout: float | None = _help("Dropout on the input of the update.")
    no_dropout: list[str] = _help("Layers whose update sees its input without dropout.", ["proj"])
    drop_path: float | None = _help("Stochastic depth on the output of the update, per sample.")
    keep_merged: bool = _help("Keep merged matrices for backward: faster, needs their memory.", False)

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
        """Sparsity of a fresh adapter: constant schedules and uniform sparsity start at the target."""
        if not self.allocation or self.schedule == "constant":
            return self.target_sparsity
        assert self.initial_sparsity is not None
        return self.initial_sparsity
