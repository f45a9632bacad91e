"""The two hooks of training: importance after every step, budgets at every epoch (paper Fig. 6b).

The allocator lives on the adapted model, so it is found again from any wrapper of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from snella.equations.allocation import Importance, Schedule, allocate, allocate_released
from snella.errors import UserError
from snella.tuner.config import SnellaConfig
from snella.tuner.layer import SnellaLayer


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
        self.before: list[Tensor] = []

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
        self.epoch, self.epochs, self.steps_per_epoch, self.step = epoch, epochs, steps, 0
        _seen(layers)
        if self.config.sensitivity_at == "before-step":
            self.before = [factor.detach().clone() for factor in _factors(layers, name)]
        self._report()
        if self.config.allocation:
            self._update(layers, name)

    @torch.no_grad()
    def on_step_end(self, layers: list[SnellaLayer], name: str) -> None:
        """Take in the step's gradients; with ``interval="step"`` also reallocate."""
        if self.epoch is None:
            raise UserError("Call on_epoch_start(epoch, epochs) before the first training step.")
        _seen(layers)
        self.step += 1
        if not self.config.allocation:
            return
        factors = _factors(layers, name)
        grads = [factor.grad for factor in factors]
        if all(grad is None for grad in grads):
            raise UserError(
                "on_step_end() found no gradients: call it after optimizer.step() and before "
                "zero_grad()."
            )
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
        if self.config.interval == "step":
            self._update(layers, name)

    def _update(self, layers: list[SnellaLayer], name: str) -> None:
        update, updates = self.epoch or 0, self.epochs
        if self.config.interval == "step" and self.steps_per_epoch is not None:
            update = update * self.steps_per_epoch + self.step
            updates *= self.steps_per_epoch
        schedule = self.schedule(layers)
        if schedule.reallocates(update, updates):
            share = allocate if self.config.sharing == "exact" else allocate_released
            sizes = [layer.slice_size for layer in layers for _ in range(layer.slices)]
            granted = iter(
                share(self.scores(layers, name), sizes, schedule.budget(update, updates))
            )
            for layer in layers:
                layer.set_budget(name, [next(granted) for _ in range(layer.slices)])

    def schedule(self, layers: list[SnellaLayer]) -> Schedule:
        """The budget over time, for the adapted weights of this model."""
        config = self.config
        total = sum(layer.slice_size * layer.slices for layer in layers)
        return Schedule(
            (1 - float(config.initial_sparsity or 0)) * total,
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
        return {"counters": torch.tensor(counters), **self.importance.state_dict()}

    def load_state_dict(
        self, state: dict[str, Tensor], layers: list[SnellaLayer], name: str
    ) -> None:
        """Restore ``state_dict`` into an allocator of the same model and adapter."""
        epoch, self.epochs, self.step, self.reported = map(int, state["counters"])
        self.epoch = None if epoch < 0 else epoch
        factors = _factors(layers, name)
        rest = {key: value for key, value in state.items() if key != "counters"}
        self.importance.load_state_dict(rest, factors)
        if self.config.sensitivity_at == "before-step":
            self.before = [factor.detach().clone() for factor in factors]


def _factors(layers: list[SnellaLayer], name: str) -> list[Tensor]:
    """A and B of every layer, in a fixed order."""
    return [p for layer in layers for p in (layer.snella_A[name], layer.snella_B[name])]


def _weight_magnitude(layer: SnellaLayer, name: str) -> Tensor:
    """Mean magnitude of the kept entries of every slice."""
    delta = layer.get_delta_weight(name).view(layer.slices, -1).abs()
    return delta.sum(1) / (delta > 0).sum(1).clamp_min(1)


def _seen(layers: list[SnellaLayer]) -> None:
    for layer in layers:
        layer.hook_called()


def snella_layers(model: nn.Module, adapter_name: str) -> list[SnellaLayer]:
    """The adapted layers of ``model`` that hold this adapter, in the model's order."""
    return [
        module
        for module in model.modules()
        if isinstance(module, SnellaLayer) and adapter_name in module.snella_A
    ]


def _allocators(model: nn.Module) -> Iterator[tuple[str, list[SnellaLayer], Allocator]]:
    """The allocators of all trained SNELLA adapters of ``model``, made on first use."""
    found: list[SnellaLayer] = [m for m in model.modules() if isinstance(m, SnellaLayer)]
    if not found:
        raise UserError("The model has no SNELLA layer: adapt it with get_peft_model first.")
    for name in sorted({name for layer in found for name in layer.active_adapters}):
        layers = [layer for layer in found if name in layer.snella_A]
        if not layers:
            continue
        owner = layers[0].allocators
        if name not in owner:
            owner[name] = Allocator(layers[0].settings[name])
        yield name, layers, owner[name]


def on_epoch_start(
    model: nn.Module, epoch: int, epochs: int, steps_per_epoch: int | None = None
) -> None:
    """Call before epoch ``epoch`` of 0 … ``epochs`` − 1, with the adapted model or its wrapper."""
    for name, layers, allocator in _allocators(model):
        allocator.on_epoch_start(layers, name, epoch, epochs, steps_per_epoch)


def on_step_end(model: nn.Module) -> None:
    """Call after each ``optimizer.step()``, before the gradients are cleared."""
    for name, layers, allocator in _allocators(model):
        allocator.on_step_end(layers, name)


def training_state(model: nn.Module) -> dict[str, Tensor]:
    """Allocator state for a training checkpoint; not part of the adapter."""
    return {
        f"{name}/{key}": value
        for name, _, allocator in _allocators(model)
        for key, value in allocator.state_dict().items()
    }


def load_training_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore ``training_state``; call after the adapter's weights are loaded."""
    for name, layers, allocator in _allocators(model):
        prefix = f"{name}/"
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if own:
            allocator.load_state_dict(own, layers, name)
