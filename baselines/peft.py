"""Every reparametrisation that Hugging Face PEFT 0.21 implements, as a config line.

Most compute y = W x + b + ΔW x with a cheap ΔW, e.g. LoRA's ΔW = (alpha / rank) B A (Hu et al.,
ICLR 2022). Query, key and value of a fused ``qkv`` are three matrices; ``fused_qkv`` adapts the
fused layer as one, as NOAH does for the widely quoted LoRA-8 rows. ViT-B/16: LoRA-8 on fused qkv
294,912 parameters; on all six matrices 1,327,104.

Differences from the papers and from PEFT's own training recipes:
LoRA-FA is "freeze A, AdamW on B", the algorithm of its paper; PEFT's optimizer rescales the
gradient by (AAᵀ)⁻¹ in bfloat16 instead. LoRA+ multiplies the learning rate of B alone; PEFT's
helper also puts the head's bias into the fast group. AdaLoRA gets its orthogonality penalty,
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, get_type_hints

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from torch import Tensor, nn

from snella.errors import CannotMerge, Unsupported, UserError, unknown
from snella.method import (
    ROLES,
    Method,
    fuse_qkv,
    head,
    no_decay,
    replace,
    slots,
    split_qkv,
)

_ADAPTER = "default"


class _Kind(NamedTuple):
    """PEFT's config class of a method, its fields for our typed ones, and what it presets."""

    config: str
    rank: str = ""
    alpha: str = ""
    dropout: str = ""
    preset: Mapping[str, Any] = MappingProxyType({})


def _lora(**preset: Any) -> _Kind:
    return _Kind("LoraConfig", "r", "lora_alpha", "lora_dropout", preset)


_KINDS = {
    "lora": _lora(),
    "lora_plus": _lora(),
    "lora_fa": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "pissa": _lora(init_lora_weights="pissa"),
    "olora": _lora(init_lora_weights="olora"),
    "fourierft": _Kind("FourierFTConfig", alpha="scaling"),
    "waveft": _Kind("WaveFTConfig", alpha="scaling"),
    "vera": _Kind("VeraConfig", "r", dropout="vera_dropout"),
    "shira": _Kind("ShiraConfig", "r"),
    "oft": _Kind("OFTConfig", dropout="module_dropout"),
    "boft": _Kind("BOFTConfig", dropout="boft_dropout"),
    "hra": _Kind("HRAConfig", "r"),
    "loha": _Kind("LoHaConfig", "r", "alpha", "rank_dropout"),
    "lokr": _Kind("LoKrConfig", "r", "alpha", "rank_dropout"),
    "miss": _Kind("MissConfig", "r", dropout="miss_dropout"),
    "delora": _Kind("DeloraConfig", "r", dropout="module_dropout"),
    "randlora": _Kind("RandLoraConfig", "r", "randlora_alpha", "randlora_dropout"),
}
_OURS = {"target_modules", "modules_to_save", "task_type", "peft_type", "inference_mode"}
_CHANGES_WEIGHTS = {"pissa", "olora"}


class Peft(Method):
    """Inject adapters of PEFT's ``method`` into the linear layers with one of ``roles``."""

    paper: ClassVar[str] = "PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods (2022)"
    bibkey: ClassVar[str] = "mangrulkar2022peft"
    licence: ClassVar[str] = "Apache-2.0"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam"})

    method: str = Field("lora", description=f"One of {', '.join(_KINDS)}.")
    rank: PositiveInt | None = Field(None, description="Rank; None is PEFT's default.")
    alpha: PositiveFloat | None = Field(None, description="Scale; None is rank (LoRA: scale 1).")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the adapter's input.")
    roles: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = ROLES
    fused_qkv: bool = Field(False, description="Adapt a fused qkv layer as one matrix.")
    lr_ratio: PositiveFloat | None = Field(
        None, description="Adapter's (LoRA+: B's) learning rate over the head's; LoRA+ default 16."
    )
    options: dict[str, Any] = Field({}, description="Further fields of PEFT's config class.")

    @model_validator(mode="after")
    def _check(self) -> "Peft":
        if self.method not in _KINDS:
            raise unknown("PEFT method", self.method, _KINDS)
        kind = _KINDS[self.method]
        for name, field in (("rank", kind.rank), ("alpha", kind.alpha), ("dropout", kind.dropout)):
            if getattr(self, name) and not field:
                raise UserError(f"PEFT's {kind.config} has no {name}: remove `{name}:`.")
        if self.fused_qkv and 0 < len({"q", "k", "v"} & set(self.roles)) < 3:
            raise UserError(
                "`fused_qkv` adapts q, k and v as one matrix: name all or none of them."
            )
        _check_options(kind, self.options)
        return self

    def adapt(self, model: nn.Module) -> None:
        if not self.fused_qkv and {"q", "k", "v"} & set(self.roles):
            split_qkv(model)
        targets = list(dict.fromkeys(slot.path for slot in slots(model, self.roles)))
        config = self._config(targets)
        tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        try:
            tuner(model, config, _ADAPTER)
        except (ValueError, TypeError) as error:
            name = type(model).__name__
            raise Unsupported(f"PEFT cannot apply {self.method} to {name}: {error}") from error
        for _, layer in _tuner_layers(model):
            layer.train(model.training)
            if self.method == "lora_fa":
                layer.lora_A.requires_grad_(False)
        if self.method in _CHANGES_WEIGHTS:
            for _, layer in _tuner_layers(model):
                _record_initial(layer)

    def parameter_groups(
        self, model: nn.Module, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        ratio = self.lr_ratio or (16.0 if self.method == "lora_plus" else 1.0)
        groups: dict[tuple[float, float], list[Tensor]] = {}
        task_head = head(model)
        of_head = set(map(id, task_head.parameters())) if task_head is not None else set()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                fast = (
                    ".lora_B." in name
                    if self.method == "lora_plus"
                    else id(parameter) not in of_head
                )
                decay = 0.0 if no_decay(name, parameter) else weight_decay
                groups.setdefault((lr * ratio if fast else lr, decay), []).append(parameter)
        return [
            {"params": params, "lr": rate, "weight_decay": decay}
            for (rate, decay), params in groups.items()
        ]

    def merge(self, model: nn.Module) -> None:
        for path, layer in list(_tuner_layers(model)):
            try:
                layer.merge()
            except NotImplementedError as error:
                raise CannotMerge(f"PEFT cannot merge {self.method}: {error}") from error
            replace(model, path, layer.get_base_layer())
        del model.peft_config
        fuse_qkv(model)

    def _config(self, targets: list[str]) -> peft.PeftConfig:
        kind = _KINDS[self.method]
        values = dict(kind.preset) | self.options | {"target_modules": targets}
        if self.rank:
            values[kind.rank] = self.rank
        if self.alpha:
            values[kind.alpha] = self.alpha
        elif kind.config == "LoraConfig":
            values[kind.alpha] = self.rank or 8
        if kind.dropout:
            values[kind.dropout] = self.dropout
        return getattr(peft, kind.config)(**values)


def _check_options(kind: _Kind, options: dict[str, Any]) -> None:
    """Raise :class:`UserError` for an option PEFT's config class does not have, or a wrong type."""
    hints = get_type_hints(getattr(peft, kind.config))
    known = set(hints) - _OURS - {kind.rank, kind.alpha, kind.dropout}
    for name, value in options.items():
        if name not in known:
            raise unknown(f"option of PEFT's {kind.config}", name, known)
        try:
            TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise UserError(
                f"Option {name} of PEFT's {kind.config}: {message} (got {value!r})."
            ) from error


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


@torch.no_grad()
def _record_initial(layer: BaseTunerLayer, zero: bool = False) -> None:
    """Keep the factors by which initialisation changed the frozen weight: W <- W - s B0 A0."""
    for name in ("lora_A", "lora_B"):
        weight = getattr(layer, name)[_ADAPTER].weight.detach()
        initial = torch.zeros_like(weight) if zero else weight.clone()
        layer.register_buffer(f"initial_{name[-1]}", initial)
