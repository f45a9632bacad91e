"""The two hooks of training: importance after every step, budgets at every epoch (paper Fig. 6b).

The allocator of an adapter is shared by its layers, so it is found again from any wrapper of the
model, and copied and saved with it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from snella.equations.allocation import Importance, Schedule, allocate, allocate_released
from snella.equations.sparsify import budget_from_sparsity
from snella.errors import UserError
from snella.tuner.config import SnellaConfig
from snella.tuner.layer import SnellaLayer
from snella.tuner.watch import Watch

NO_GRADIENTS = (
    "on_step_end() found no gradients: call it after optimizer.step() and before zero_grad(). If "
    "the order is right, no gradient reaches the adapter: reentrant gradient checkpointing needs "
    "an input that requires gradients (use_reentrant=False, or model.enable_input_require_grads())."
)
MERGED = (
    "The SNELLA adapter {!r} is merged into the weights and cannot train: call unmerge_adapter() "
    "first."
)
ALL_ZERO = (
    "All gradients that on_step_end() saw were zero: call it before zero_grad(), which also clears "
    "them with set_to_none=False; or nothing depends on the adapter."
)


class Allocator:
    """Shares the budget of one adapter among the matrices of one model."""

    def __init__(self, config: SnellaConfig) -> None:
        self.config = config
        self.importance = Importance(
            config.beta1,
            config.beta2,
            from_first=config.smoothing_start == "first-step",
            skip_nonfinite=config.nonfinite == "skip-step",
        )
        self.epoch: int | None = None
        self.epochs = 0
        self.steps_per_epoch: int | None = None
        self.step = 0
        self.reported = 0
        self.start: float | None = None
        self.resumed = False
        self.expected = False  # a denser adapter than asked for may be saved now
        self.before: list[Tensor] = []
        self.watch = Watch()

    def on_epoch_start(
        self, layers: list[SnellaLayer], name: str, epoch: int, epochs: int, steps: int | None
    ) -> None:
        """Lower the budget and let the layers compete for it."""
        if not 0 <= epoch < epochs:
            raise UserError(f"epoch must lie in [0, {epochs}), got {epoch}.")
        if self.epoch is not None and epoch > self.epoch and self.step == 0:
            raise UserError(
                "SNELLA saw no optimizer step since the last epoch started: call on_step_end() "
                "after optimizer.step() and before zero_grad(), or set allocation=False."
            )
        if self.config.interval == "step" and steps is None:
            raise UserError('interval="step" needs on_epoch_start(epoch, epochs, steps_per_epoch).')
        if self.resumed and epoch == self.epoch:  # in mid-epoch: its budgets are shared out already
            self.epochs, self.steps_per_epoch, self.resumed = epochs, steps, False
            return
        if epoch == 0 and self.epoch != 0:
            self.start = self._continued(layers, name)
        seen, self.resumed = self.step, False
        self.watch.on_epoch_start()
        self.epoch, self.epochs, self.steps_per_epoch, self.step = epoch, epochs, steps, 0
        self._follow(_factors(layers, name))
        if self.config.sensitivity_at == "before-step":
            self.before = [factor.detach().clone() for factor in _factors(layers, name)]
        self._report()
        if self.config.allocation:
            _warn_of_frozen(layers, name)
            self._update(layers, name, steps_seen=seen)

    def _continued(self, layers: list[SnellaLayer], name: str) -> float | None:
        """Entries at which a sparse adapter that trains on starts; None for a fresh one (b_0).

        A trained adapter must not grow dense again before it gets sparse.
        """
        rule, sparsity = str(self.config.budget_rule), self.config.sparsity_at_start
        fresh = sum(
            layer.slices * budget_from_sparsity(sparsity, layer.slice_size, rule)
            for layer in layers
        )
        kept = kept_entries(layers, name)
        return float(kept) if kept < fresh else None

    def _follow(self, factors: list[Tensor]) -> None:
        """Keep the averages where the factors are, in their precision."""
        self.importance.follow(factors)
        self.before = [
            old if old.device == new.device and old.dtype == new.dtype else old.to(new)
            for old, new in zip(self.before, factors, strict=False)
        ]

    @torch.no_grad()
    def on_step_end(self, layers: list[SnellaLayer], name: str) -> None:
        """Take in the step's gradients; with ``interval="step"`` also reallocate."""
        if self.epoch is None:
            raise UserError("Call on_epoch_start(epoch, epochs) before the first training step.")
        if any(name in layer.merged_adapters for layer in layers):
            raise UserError(MERGED.format(name))
        if self.config.allocation:
            self._take_in(layers, name)
        self.step += 1
        if self.config.allocation and self.config.interval == "step":
            self._update(layers, name)

    def _take_in(self, layers: list[SnellaLayer], name: str) -> None:
        """Add the step's gradients to the importance scores."""
        factors = _factors(layers, name)
        grads = [factor.grad for factor in factors]
        if all(grad is None for grad in grads):
            raise UserError(NO_GRADIENTS)
        self.watch.on_step_end(grads)
        self._follow(factors)
        if self.config.score == "sensitivity":
            self.importance.update(
                self.before or [factor.detach() for factor in factors],
                [
                    torch.zeros_like(factor) if grad is None else grad
                    for factor, grad in zip(factors, grads, strict=True)
                ],
            )
        if self.before:
            torch._foreach_copy_(self.before, factors)

    def _update(self, layers: list[SnellaLayer], name: str, steps_seen: int = 0) -> None:
        update, updates = self.epoch or 0, self.epochs
        if self.config.interval == "step" and self.steps_per_epoch is not None:
            update = update * self.steps_per_epoch + self.step
            updates *= self.steps_per_epoch
        schedule = self.schedule(layers)
        if schedule.reallocates(update, updates):
            share = allocate if self.config.sharing == "exact" else allocate_released
            sizes = [layer.slice_size for layer in layers for _ in range(layer.slices)]
            scores = self.scores(layers, name)
            if steps_seen > 1 and self._all_zero(scores) and kept_entries(layers, name):
                raise UserError(ALL_ZERO)
            granted = iter(share(scores, sizes, schedule.budget(update, updates)))
            for layer in layers:
                layer.set_budget(name, [next(granted) for _ in range(layer.slices)])

    def _all_zero(self, scores: list[float]) -> bool:
        """Whether steps were taken in, none left out, and yet no gradient was seen."""
        seen = self.config.score == "sensitivity" and bool(self.importance.sensitivity)
        return seen and not self.importance.skipped and not any(scores)

    def schedule(self, layers: list[SnellaLayer]) -> Schedule:
        """The budget over time, for the adapted weights of this model."""
        config = self.config
        total = sum(layer.slice_size * layer.slices for layer in layers)
        return Schedule(
            (1 - float(config.initial_sparsity or 0)) * total if self.start is None else self.start,
            (1 - config.target_sparsity) * total,
            config.schedule,
            config.warmup_updates,
            config.cooldown_updates,
            config.update_every,
            bool(config.reach_target),
        )

    @torch.no_grad()
    def scores(self, layers: list[SnellaLayer], name: str) -> list[float]:
        """Importance of every matrix (slice), in the model's order (Eq. 11, Table 10)."""
        if self.config.score == "weight-magnitude":
            scores = [_weight_magnitude(layer, name) for layer in layers]
        elif self.config.score == "magnitude":
            means = [factor.abs().flatten(1).mean(1) for factor in _factors(layers, name)]
            scores = [a + b for a, b in zip(means[::2], means[1::2], strict=True)]
        elif self.importance.sensitivity:
            means = self.importance.scores()
            scores = [a + b for a, b in zip(means[::2], means[1::2], strict=True)]
        else:
            return [0.0] * sum(layer.slices for layer in layers)
        return torch.cat([score.double().cpu() for score in scores]).tolist()

    def _report(self) -> None:
        skipped = self.importance.skipped
        if skipped > self.reported:
            warnings.warn(
                f"SNELLA left {skipped - self.reported} step(s) out of the importance scores: "
                "their gradients were NaN or infinite.",
                stacklevel=4,
            )
            self.reported = skipped

    def state_dict(self) -> dict[str, Tensor]:
        """What an interrupted training needs to go on; the budgets are part of the adapter."""
        counters = [-1 if self.epoch is None else self.epoch, self.epochs, self.step, self.reported]
        start = torch.tensor(-1.0 if self.start is None else self.start, dtype=torch.float64)
        state = {"counters": torch.tensor(counters), "start": start}
        return state | self.importance.state_dict()

    def load_state_dict(
        self, state: dict[str, Tensor], layers: list[SnellaLayer], name: str
    ) -> None:
        """Restore ``state_dict`` into an allocator of the same model and adapter."""
        epoch, self.epochs, self.step, self.reported = map(int, state["counters"])
        self.epoch = None if epoch < 0 else epoch
        start = float(state.get("start", -1.0))
        self.start = None if start < 0 else start
        self.resumed = self.epoch is not None and self.step > 0
        factors = _factors(layers, name)
        rest = {key: value for key, value in state.items() if key not in ("counters", "start")}
        self.importance.load_state_dict(rest, factors)
        if self.config.sensitivity_at == "before-step":
            self.before = [factor.detach().clone() for factor in factors]


def _factors(layers: list[SnellaLayer], name: str) -> list[Tensor]:
    """A and B of every layer, in a fixed order."""
    return [p for layer in layers for p in (layer.snella_A[name], layer.snella_B[name])]


def _warn_of_frozen(layers: list[SnellaLayer], name: str) -> None:
    """Whoever freezes part of an adapter hardly wants its entries given to the others."""
    frozen = [layer.key for layer in layers if not layer.snella_A[name].requires_grad]
    if frozen:
        warnings.warn(
            f"{len(frozen)} of {len(layers)} SNELLA layers are frozen ({frozen[0]}, ...): without "
            "gradients their importance is 0, and their budget goes to the others. Leave them out "
            "with exclude_modules, or set allocation=False.",
            stacklevel=4,
        )


def _weight_magnitude(layer: SnellaLayer, name: str) -> Tensor:
    """Mean magnitude of the kept entries of every slice."""
    delta = layer.get_delta_weight(name).view(layer.slices, -1).abs()
    return delta.sum(1) / (delta > 0).sum(1).clamp_min(1)


def snella_layers(model: nn.Module, adapter_name: str) -> list[SnellaLayer]:
    """The adapted layers of ``model`` that hold this adapter, in the model's order."""
    return [
        module
        for module in model.modules()
        if isinstance(module, SnellaLayer) and adapter_name in module.snella_A
    ]


def attach(model: nn.Module, adapter_name: str) -> None:
    """Give the layers of a new adapter their common allocator."""
    layers = snella_layers(model, adapter_name)
    if layers:
        allocator = Allocator(layers[0].settings[adapter_name])
        for layer in layers:
            layer.allocators[adapter_name] = allocator


# The layers of models in training: going through all modules after every step takes longer than
# what is done then. Found anew in every epoch.
_layers: weakref.WeakKeyDictionary[nn.Module, list[SnellaLayer]] = weakref.WeakKeyDictionary()


def _allocators(
    model: nn.Module, again: bool = True
) -> Iterator[tuple[str, list[SnellaLayer], Allocator]]:
    """The allocators of all SNELLA adapters of ``model`` that train; ``again``: look for layers."""
    if again or model not in _layers:
        _layers[model] = [m for m in model.modules() if isinstance(m, SnellaLayer)]
    found = _layers[model]
    if not found:
        raise UserError("The model has no SNELLA layer: adapt it with get_peft_model first.")
    trained = False
    for name in sorted({name for layer in found for name in layer.active_adapters}):
        layers = [layer for layer in found if name in layer.snella_A]
        if not any(factor.requires_grad for factor in _factors(layers, name)):
            continue
        trained = True
        yield name, layers, layers[0].allocators[name]
    if not trained:
        raise UserError(
            "No active SNELLA adapter of the model trains: load it with is_trainable=True, "
            "activate it with set_adapter, and switch adapters on (enable_adapter_layers)."
        )


def trained_adapters(model: nn.Module) -> list[tuple[str, Allocator]]:
    """Names and allocators of the adapters that train."""
    return [(name, allocator) for name, _, allocator in _allocators(model)]


def kept_entries(layers: list[SnellaLayer], name: str) -> int:
    """Entries that an adapter may keep, over all layers."""
    return sum(sum(layer.snella_budget[name].tolist()) for layer in layers)


def check_density(model: nn.Module, adapter_name: str) -> None:
    """Warn if an adapter that was trained here keeps more entries than its schedule ends with."""
    layers = snella_layers(model, adapter_name)
    allocator = layers[0].allocators.get(adapter_name) if layers else None
    if allocator is None or allocator.epoch is None or allocator.expected:
        return
    config, total = allocator.config, sum(layer.slice_size * layer.slices for layer in layers)
    if not config.allocation or layers[0].snella_budget[adapter_name].is_meta:
        return
    updates = allocator.epochs * (
        (allocator.steps_per_epoch or 1) if config.interval == "step" else 1
    )
    asked = allocator.schedule(layers).budget(updates - 1, updates)
    kept = kept_entries(layers, adapter_name)
    if kept > asked + sum(layer.slices for layer in layers):  # sharing may round up
        warnings.warn(
            f"The SNELLA adapter {adapter_name!r} keeps {kept:,} of {total:,} entries, not the "
            f"{asked:,} of target_sparsity={config.target_sparsity}: training is in epoch "
            f"{allocator.epoch} of 0 … {allocator.epochs - 1}. That is as it should be for a "
            "checkpoint; after early stopping, or if on_epoch_start() is not called before every "
            "epoch, the adapter stays denser than asked.",
            stacklevel=4,
        )


def on_epoch_start(
    model: nn.Module, epoch: int, epochs: int, steps_per_epoch: int | None = None
) -> None:
    """Call before epoch ``epoch`` of 0 … ``epochs`` − 1, with the adapted model or its wrapper."""
    for name, layers, allocator in _allocators(model):
        allocator.on_epoch_start(layers, name, epoch, epochs, steps_per_epoch)


def on_step_end(model: nn.Module) -> None:
    """Call after each ``optimizer.step()``, before the gradients are cleared."""
    for name, layers, allocator in _allocators(model, again=False):
        allocator.on_step_end(layers, name)


def training_state(model: nn.Module) -> dict[str, Tensor]:
    """Allocator state for a training checkpoint; not part of the adapter."""
    return {
        f"{name}/{key}": value
        for name, _, allocator in _allocators(model)
        for key, value in allocator.state_dict().items()
    }


def load_training_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore ``training_state``; call after the adapter's weights are loaded.

    A training that was left in mid-epoch goes on at its ``on_epoch_start`` without sharing the
    budget out again. Raises ``UserError`` for adapters that the model does not train.
    """
    found = {name: (layers, allocator) for name, layers, allocator in _allocators(model)}
    for name in sorted({key.rpartition("/")[0] for key in state}):
        if name not in found:
            raise UserError(
                f"The training state is of adapter {name!r}, which the model does not train; it "
                f"trains {', '.join(map(repr, found))}."
            )
        layers, allocator = found[name]
        prefix = f"{name}/"
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        allocator.load_state_dict(own, layers, name)


class TrainingState:
    """``training_state`` as an object, e.g. for ``accelerator.register_for_checkpointing``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return training_state(self.model)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_training_state(self.model, state)
