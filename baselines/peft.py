"""Every reparametrisation that Hugging Face PEFT 0.21 implements, as a config line.

Most compute y = W x + b + ΔW x with a cheap ΔW, e.g. LoRA's ΔW = (alpha / rank) B A (Hu et al.,
ICLR 2022). Query, key and value of a fused ``qkv`` are three matrices; ``fused_qkv`` adapts the
fused layer as one, as NOAH does for the widely quoted LoRA-8 rows. ViT-B/16: LoRA-8 on fused qkv
294,912 parameters; on all six matrices 1,327,104.

Differences from the papers and from PEFT's own training recipes:
LoRA-FA is "freeze A, AdamW on B", the algorithm of its paper; PEFT's optimizer rescales the
gradient by (AAᵀ)⁻¹ in bfloat16 instead. LoRA+ multiplies the learning rate of B alone; PEFT's
own also puts the head's bias into the fast group. AdaLoRA gets its orthogonality penalty,
which PEFT adds only to models whose output has a ``loss``. CorDA and LoRA-GA are initialised on
training data in :meth:`Peft.calibrate`; they, PiSSA and OLoRA change the frozen weights, which is
undone and redone exactly on loading because the initial factors are part of the state.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, get_type_hints

import peft
import torch
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.lora.corda import collect_eigens_for_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import Tensor, nn

from snella.errors import CannotMerge, Unsupported, UserError, unknown
from snella.method import (
    ROLES,
    Batch,
    LossFn,
    Method,
    family,
    fuse_qkv,
    head,
    no_decay,
    replace,
    slots,
    split_qkv,
    trainable,
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
    "corda": _lora(),
    "lora_ga": _lora(),
    "adalora": _Kind("AdaLoraConfig", "target_r", "lora_alpha", "lora_dropout"),
    "fourierft": _Kind("FourierFTConfig", alpha="scaling"),
    "waveft": _Kind("WaveFTConfig", alpha="scaling"),
    "vera": _Kind("VeraConfig", "r", dropout="vera_dropout"),
    "shira": _Kind("ShiraConfig", "r"),
    "oft": _Kind("OFTConfig", dropout="module_dropout"),
    "hra": _Kind("HRAConfig", "r"),
    "loha": _Kind("LoHaConfig", "r", "alpha", "rank_dropout"),
    "lokr": _Kind("LoKrConfig", "r", "alpha", "rank_dropout"),
    "miss": _Kind("MissConfig", "r", dropout="miss_dropout"),
    "delora": _Kind("DeloraConfig", "r", dropout="module_dropout"),
    "randlora": _Kind("RandLoraConfig", "r", "randlora_alpha", "randlora_dropout"),
}
_OURS = {"target_modules", "modules_to_save", "task_type", "peft_type", "inference_mode"}
_OURS |= {"init_r", "total_step", "tinit", "tfinal"}
_DATA_DRIVEN = {"corda", "lora_ga"}
_CHANGES_WEIGHTS = {"pissa", "olora", *_DATA_DRIVEN}


class Peft(Method):
    """Inject adapters of PEFT's ``method`` into the linear layers with one of ``roles``."""

    paper: ClassVar[str] = "PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods (2022)"
    bibkey: ClassVar[str] = "mangrulkar2022peft"
    licence: ClassVar[str] = "Apache-2.0"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam", "sd3"})

    method: Literal[tuple(_KINDS)] = "lora"
    rank: PositiveInt | None = Field(None, description="Rank; None is PEFT's default.")
    alpha: PositiveFloat | None = Field(None, description="Scale; None is rank (LoRA: scale 1).")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the adapter's input.")
    roles: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = Field(
        ROLES,
        description="Linear layers to adapt; fc1, fc2 where they name attention only and "
        "the backbone has none (ConvNeXt).",
    )
    fused_qkv: bool = Field(False, description="Adapt a fused qkv layer as one matrix.")
    lr_ratio: PositiveFloat | None = Field(
        None, description="Adapter's (LoRA+: B's) learning rate over the head's; LoRA+ default 16."
    )
    options: dict[str, Any] = Field({}, description="Further fields of PEFT's config class.")

    @field_validator("method", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value not in _KINDS:
            raise unknown("PEFT method", value, _KINDS)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Peft":
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

    def check_supported(self, model: nn.Module) -> None:
        super().check_supported(model)
        if self.method == "oft" and (kind := family(model)) in {"convnext", "sam"}:
            raise Unsupported(
                f"PEFT's OFT takes the four-dimensional tokens of {kind} for a convolution's input."
            )

    def adapt(self, model: nn.Module) -> None:
        if not self.fused_qkv and {"q", "k", "v"} & set(self.roles):
            split_qkv(model)
        roles = self.roles
        if family(model) == "convnext" and not {"fc1", "fc2"} & set(roles):
            roles = ("fc1", "fc2")
        targets = list(dict.fromkeys(slot.path for slot in slots(model, roles)))
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
            if self.method == "adalora":
                layer.ranknum.requires_grad_(False)  # PEFT marks it where it moves the layer
        if self.method in _CHANGES_WEIGHTS:
            for _, layer in _tuner_layers(model):
                _record_initial(layer, zero=self.method in _DATA_DRIVEN)
        if self.method == "adalora":
            model.adalora = _RankBudget(model, config)

    def calibrate(self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        if self.method not in _DATA_DRIVEN:
            return
        layers = [layer for _, layer in _tuner_layers(model)]
        look = _look_at_inputs if self.method == "corda" else _look_at_gradients
        training = model.training
        model.eval()
        look(model, [layer.get_base_layer() for layer in layers], batches, loss_fn)
        model.train(training)
        initialise = _initialise_corda if self.method == "corda" else _initialise_lora_ga
        for layer in layers:
            weight = layer.get_base_layer().weight.detach().clone()
            initialise(layer, self.options)
            layer.get_base_layer().weight.data = weight
            _record_initial(layer)
            _subtract_initial(layer)

    def parameter_groups(
        self, model: nn.Module, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        ratio = self.lr_ratio or (16.0 if self.method == "lora_plus" else 1.0)
        task_head = head(model)
        slow = set(map(id, task_head.parameters())) if task_head is not None else set()
        if self.method == "lora_plus":
            slow |= {id(p) for n, p in model.named_parameters() if ".lora_B." not in n}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in trainable(model).items():
            rate = lr if id(parameter) in slow else lr * ratio
            spectrum = ".fourierft_spectrum." in name  # decayed by its authors, though a vector
            decay = 0.0 if no_decay(name, parameter) and not spectrum else weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
        return [
            {"params": params, "lr": rate, "weight_decay": decay}
            for (rate, decay), params in groups.items()
        ]

    def auxiliary_loss(self, model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor | None:
        """AdaLoRA's penalty: the mean of ||AAᵀ - I|| and ||BᵀB - I|| over all layers, times 0.5."""
        if self.method != "adalora":
            return None
        weight = model.peft_config[_ADAPTER].orth_reg_weight
        factors = [layer.lora_A[_ADAPTER] for _, layer in _tuner_layers(model)]
        factors += [layer.lora_B[_ADAPTER].T for _, layer in _tuner_layers(model)]
        excess = [f @ f.T - torch.eye(len(f), dtype=f.dtype, device=f.device) for f in factors]
        return weight * torch.stack([torch.linalg.matrix_norm(e) for e in excess]).mean()

    def on_epoch_start(self, model: nn.Module, epoch: int, epochs: int) -> None:
        if self.method == "adalora":
            model.adalora.plan(epoch, epochs)

    def on_step_end(self, model: nn.Module) -> None:
        if self.method == "adalora":
            model.adalora.step(model)

    def count(self, model: nn.Module) -> dict[str, int]:
        """AdaLoRA counts the ranks of its budget, not the half as many again it starts with."""
        counts = super().count(model)
        if self.method == "adalora":
            counts["trainable"] -= model.adalora.pruned(model)
        return counts

    def merge(self, model: nn.Module) -> None:
        for path, layer in list(_tuner_layers(model)):
            try:
                layer.merge()
            except NotImplementedError as error:
                raise CannotMerge(f"PEFT cannot merge {self.method}: {error}") from error
            replace(model, path, layer.get_base_layer())
        fuse_qkv(model)
        del model.peft_config
        if self.method == "adalora":
            del model.adalora

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What trains, the adapter's frozen parts (LoRA-FA's A, shared bases), chosen indices."""
        found = super().state(model)
        seen: set[tuple[int, torch.Size]] = set()
        for path, layer in _tuner_layers(model):
            for name, tensor in layer.state_dict().items():
                if name.startswith(layer.adapter_layer_names):
                    found[f"{path}.{name}"] = tensor
            for name, indices in _index_tensors(layer):
                found[f"{path}.{name}"] = indices
        unique = {}
        for name, tensor in found.items():
            key = (tensor.data_ptr(), tensor.shape)
            if key not in seen:
                unique[name] = tensor
            seen.add(key)
        return unique

    @torch.no_grad()
    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        state = dict(state)
        before = {}
        for path, layer in _tuner_layers(model):
            for name, indices in _index_tensors(layer):
                value = state.pop(f"{path}.{name}", indices)
                getattr(layer, name)[_ADAPTER] = value.to(indices.device)
            if self.method in _CHANGES_WEIGHTS:
                before[path] = (layer.initial_A.clone(), layer.initial_B.clone())
        super().load_state(model, state)
        for path, (a, b) in before.items():
            _subtract_initial(model.get_submodule(path), undo=(a, b))

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        return model.adalora.state() if self.method == "adalora" else {}

    def load_training_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        if self.method == "adalora":
            model.adalora.load_state(state)

    def _config(self, targets: list[str]) -> peft.PeftConfig:
        kind = _KINDS[self.method]
        of_calibration = f"{self.method}_config"
        values = {k: v for k, v in self.options.items() if k != of_calibration}
        values = dict(kind.preset) | values | {"target_modules": targets}
        if self.rank:
            values[kind.rank] = self.rank
        if self.alpha:
            values[kind.alpha] = self.alpha
        elif kind.config == "LoraConfig":
            values[kind.alpha] = self.rank or 8
        if kind.dropout:
            values[kind.dropout] = self.dropout
        if self.method == "adalora":
            target = self.rank or 8
            start = max(target + 1, 3 * target // 2)
            values |= {"init_r": start, "total_step": 1}
            values.setdefault(kind.alpha, start)  # PEFT divides by the rank it starts with
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


def _index_tensors(layer: BaseTunerLayer) -> Iterator[tuple[str, Tensor]]:
    """Positions that a sparse or spectral method drew, which PEFT keeps outside the state dict."""
    for name in layer.other_param_names:
        value = getattr(layer, name, None)
        if isinstance(value, dict) and isinstance(value.get(_ADAPTER), Tensor):
            yield name, value[_ADAPTER]


@torch.no_grad()
def _record_initial(layer: BaseTunerLayer, zero: bool = False) -> None:
    """Keep the factors by which initialisation changed the frozen weight: W <- W - s B0 A0."""
    for name in ("lora_A", "lora_B"):
        weight = getattr(layer, name)[_ADAPTER].weight.detach()
        initial = torch.zeros_like(weight) if zero else weight.clone()
        layer.register_buffer(f"initial_{name[-1]}", initial)


@torch.no_grad()
def _subtract_initial(layer: BaseTunerLayer, undo: tuple[Tensor, Tensor] | None = None) -> None:
    """Take the initial factors off the frozen weight, and put back those in ``undo`` (A0, B0)."""
    weight, scale = layer.get_base_layer().weight, layer.scaling[_ADAPTER]
    if undo is not None and torch.equal(undo[0], layer.initial_A):
        return
    if undo is not None and undo[1].any():
        weight.add_(scale * undo[1] @ undo[0])
    weight.sub_(scale * layer.initial_B @ layer.initial_A)


@torch.no_grad()
def _look_at_inputs(
    model: nn.Module, layers: list[nn.Module], batches: Iterable[Batch], loss_fn: LossFn
) -> None:
    """CorDA: the second moment of each layer's inputs, every image scaled to maximum 1.

    As PEFT does with one image at a time, whatever the size of the batches; Swin's windows of one
    image are scaled together.
    """
    size = 1

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].float().reshape(size, -1, inputs[0].shape[-1])
        x = (x / x.amax((1, 2), keepdim=True).abs()).flatten(0, 1)
        layer.covariance_matrix = layer.covariance_matrix + x.T @ x

    handles = [layer.register_forward_hook(add) for layer in layers]
    for layer in layers:
        layer.covariance_matrix = 0.0
    images = 0
    for batch in batches:
        size = len(next(iter(batch.values())))
        loss_fn(model, batch)
        images += size
    for layer, handle in zip(layers, handles, strict=True):
        handle.remove()
        layer.covariance_matrix = layer.covariance_matrix / images


def _initialise_corda(layer: BaseTunerLayer, options: dict[str, Any]) -> None:
    """A and B from the SVD of W C: its largest ("ipm") or smallest ("kpm") components."""
    config = peft.LoraConfig(
        init_lora_weights="corda", corda_config=options.get("corda_config") or {}
    )
    base, rank = layer.get_base_layer(), layer.r[_ADAPTER]
    eigens = collect_eigens_for_layer(base, config)
    kept = slice(rank) if config.corda_config.corda_method == "ipm" else slice(-rank, None)
    eigens.S_WC = eigens.S_WC[kept].clone()
    eigens.U_WC = eigens.U_WC[:, kept].to(base.weight.device)
    eigens.V_WC = eigens.V_WC[:, kept].to(base.weight.device)
    base.eigens = eigens
    layer.corda_init(_ADAPTER, "corda")
    del base.covariance_matrix


def _look_at_gradients(
    model: nn.Module, layers: list[nn.Module], batches: Iterable[Batch], loss_fn: LossFn
) -> None:
    """LoRA-GA: the mean gradient of the loss at the pretrained weights."""
    for layer in layers:
        layer.weight.requires_grad_(True)
    count = 0
    for batch in batches:
        loss_fn(model, batch).backward()
        count += 1
    for layer in layers:
        layer._peft_loraga_grad = layer.weight.grad / count
        layer.weight.requires_grad_(False)
        layer.weight.grad = None
    model.zero_grad(set_to_none=True)


def _initialise_lora_ga(layer: BaseTunerLayer, options: dict[str, Any]) -> None:
    config = peft.LoraConfig(
        init_lora_weights="lora_ga", lora_ga_config=options.get("lora_ga_config") or {}
    )
    layer.lora_ga_init(_ADAPTER, config.lora_ga_config)


class _RankBudget:
    """AdaLoRA's budget of ranks: from 1.5 times the target, cubically down to the target.

    The first epoch counts the steps; the budget falls from a tenth of all steps (but not within
    the first epoch) to seven tenths, then the surviving ranks stay. In a training of a single
    epoch it does not fall.
    """

    def __init__(self, model: nn.Module, config: peft.AdaLoraConfig) -> None:
        self.config = config
        self.allocator = RankAllocator(model, config, _ADAPTER)
        self.steps = 0
        self.planned = False
        self.kept: dict[str, Tensor] = {}

    def plan(self, epoch: int, epochs: int) -> None:
        if epoch > 0 and not self.planned:
            self._set_plan(self.steps, self.steps // epoch * epochs)

    def _set_plan(self, first: int, total: int) -> None:
        self.config.total_step, self.config.tfinal = total, 3 * total // 10
        self.config.tinit = max(first, total // 10)
        self.planned = True

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        self.steps += 1
        last = self.config.total_step - self.config.tfinal
        if not self.planned:
            self.allocator.update_ipt(model)
        elif self.steps < last:
            self.allocator.update_and_allocate(model, self.steps)
        elif self.steps == last:
            _, pattern = self.allocator.update_and_allocate(model, last, force_mask=True)
            self.kept = {name: torch.tensor(kept)[:, None] for name, kept in pattern.items()}
            self.allocator.reset_ipt()
        for name, kept in self.kept.items():
            value = model.get_parameter(name)
            value.mul_(kept.to(value.device))

    def pruned(self, model: nn.Module) -> int:
        """Entries of singular triples that the budget ends without: chosen ones, once it did."""
        total = 0
        for path, layer in _tuner_layers(model):
            triple = layer.lora_A[_ADAPTER].shape[1] + layer.lora_B[_ADAPTER].shape[0] + 1
            rank = layer.lora_E[_ADAPTER].shape[0]
            kept = self.kept.get(f"{path}.lora_E.{_ADAPTER}")
            left = self.config.target_r if kept is None else int(kept.sum())
            total += (rank - left) * triple
        return total

    def state(self) -> dict[str, Tensor]:
        plan = [self.steps, self.planned, self.config.tinit, self.config.total_step]
        averages = {"ipt": self.allocator.exp_avg_ipt, "unc": self.allocator.exp_avg_unc}
        named = {f"{k}/{name}": t for k, d in averages.items() for name, t in d.items()}
        return named | {f"kept/{n}": t for n, t in self.kept.items()} | {"plan": torch.tensor(plan)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.steps, planned, first, total = state["plan"].tolist()
        if planned:
            self._set_plan(first, total)
        targets = {
            "ipt": self.allocator.exp_avg_ipt,
            "unc": self.allocator.exp_avg_unc,
            "kept": self.kept,
        }
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            if kind in targets:
                targets[kind][name] = tensor
            if kind == "ipt":  # the allocator starts anew for a tensor it has no last value of
                self.allocator.ipt[name] = torch.zeros_like(tensor)
