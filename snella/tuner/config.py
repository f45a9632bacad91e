"""SnellaConfig: every choice of SNELLA (arXiv 2510.24037) as a field of a Hugging Face PEFT config.

``variant`` fills the fields left at None: "paper" follows the text, "released" the authors' code
(github.com/ssfgunner/SNELL at e9d5185). Each field can be set alone. Further settings of the same
code: SNELL is ``allocation=False, kernel="piecewise-linear"``, KLoRA also ``sparsify="none"``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from snella.equations.allocation import SCHEDULES, SCORES
from snella.equations.kernels import Kernel
from snella.equations.sparsify import BUDGET_RULES, FORMS
from snella.errors import UserError, unknown
from snella.models.names import NAMES, STACKED
from snella.tuner.registration import peft_type

# The released code gives dropout to the updates of all layers but these.
_ATTENTION_OUTPUTS = NAMES["proj"]
FUSED_PARTS = {**STACKED, "in_proj_weight": 3}
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
# Fields of PEFT's other methods that SNELLA does not have, and what to do instead.
_ELSEWHERE = {
    "r": "the rank is called rank",
    "lora_alpha": "SNELLA has no alpha; scale a trained adapter with set_scale",
    "alpha_pattern": "SNELLA has no alpha",
    "lora_dropout": "it is called dropout",
    "init_lora_weights": "it is called init_weights",
    "bias": "biases stay frozen; name modules to train in full in modules_to_save",
    "use_dora": "DoRA is a method of its own",
    "use_rslora": "SNELLA has no alpha to scale with the rank",
    "fan_in_fan_out": "the layer's type decides",
    "target_parameters": "SNELLA adapts modules; nn.MultiheadAttention is one",
    "layer_replication": "layers that share their weights would share their budget",
    "trainable_token_indices": "name the embedding in target_modules or modules_to_save",
    "ensure_weight_tying": "an adapted layer has a weight of its own once it is merged",
    "megatron_config": "parallel layers hold part of a matrix, whose entries compete as a whole",
}
_CARD = """## Loading

This adapter is a SNELLA adapter. PEFT loads it once `snella` has been imported (without it, loading
ends with `KeyError: 'SNELLA'`):

```python
import snella
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or hub id of this adapter")
```
"""
_FRACTIONS = ("initial_sparsity", "target_sparsity", "beta1", "beta2")


@dataclass
class SnellaConfig(PeftConfig):
    """Configuration of a SNELLA adapter.

    Which layers
        target_modules: layers to adapt: names, a regular expression, "all-linear", or None for
            those of attention and MLP in the numbered blocks of a transformer or ConvNeXt.
        exclude_modules, layers_to_transform, layers_pattern: as everywhere in PEFT; they narrow
            the default too.
        modules_to_save: modules trained in full and saved with the adapter, e.g. ``["head"]``.
        fused_parts: layers that stack several matrices along their output, and into how many equal
            parts they fall. Each part has its own kernel, budget and threshold.
    Merged matrix (Eq. 6, Table 14)
        rank, pieces: r and P; the pieces share the rank. rank_pattern: other ranks of layers by
            name or regular expression, as in PEFT.
        kernel: mix-k, piecewise-linear, linear, sigmoid, rbf or rbf-normalised.
        coefficients: piece coefficients c_p "learnable", or "fixed" at ±0.1.
        temperature: a learnable temperature in the softmax of mix-k.
        init_weights: False starts with the small random update of the paper; True at the
            backbone's function, by a learned factor per matrix that starts at 0 (docs/snella.md).
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
    rank_pattern: dict[str, int] = field(default_factory=dict)
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fused_parts: dict[str, int] = field(default_factory=lambda: dict(FUSED_PARTS))
    variant: str = "paper"

    kernel: str = "mix-k"
    pieces: int = 2
    coefficients: str | None = None
    temperature: bool | None = None
    init_weights: bool = False

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
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = peft_type()
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
        if self.init_weights not in (True, False):
            raise UserError(f"init_weights must be True or False, got {self.init_weights!r}.")
        for key in ("", *self.rank_pattern):
            self.kernel_of(key)  # raises the user's error for kernel, rank and pieces

    def to_dict(self) -> dict[str, Any]:
        """The fields as saved, in a reproducible order."""
        values = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and into the model card how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if card.is_file() and _CARD not in (text := card.read_text(encoding="utf-8")):
            card.write_text(text.rstrip() + "\n\n" + _CARD, encoding="utf-8")

    @property
    def merge_kernel(self) -> Kernel:
        """The kernel as the mathematics sees it, of layers that rank_pattern does not name."""
        return Kernel(
            self.kernel,
            self.rank,
            self.pieces,
            learnable_coefficients=self.coefficients == "learnable",
            temperature=bool(self.temperature),
        )

    def kernel_of(self, key: str) -> Kernel:
        """The kernel of the layer at path ``key``."""
        pattern = get_pattern_key(list(self.rank_pattern), key)
        return replace(self.merge_kernel, rank=self.rank_pattern.get(pattern, self.rank))

    @property
    def sparsity_at_start(self) -> float:
        """Of a fresh adapter; uniform sparsity and constant schedules start at the target."""
        if not self.allocation or self.schedule == "constant":
            return self.target_sparsity
        assert self.initial_sparsity is not None
        return self.initial_sparsity


def _refuse_unknown_fields(cls: type[SnellaConfig]) -> None:
    """Let the constructor say what stands in for a field that SNELLA does not have.

    The error is the TypeError that PEFT expects, so that files of later versions load.
    """
    generated, known = cls.__init__, {f.name for f in fields(cls)}

    def __init__(self: SnellaConfig, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                reason = _ELSEWHERE.get(name) or str(unknown("field", name, known))
                raise TypeError(
                    f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}: "
                    f"{reason}."
                )
        generated(self, *args, **kwargs)

    setattr(__init__, "__wrapped__", generated)  # noqa: B010  the signature, for help()
    setattr(cls, "__init__", __init__)  # noqa: B010


_refuse_unknown_fields(SnellaConfig)
