"""The competition of an adapter's layers: importance after every step, budgets at every epoch.

Paper Fig. 6b. Layers that are frozen keep their budget and do not compete.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import islice

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
FLAT = (
    "FullyShardedDataParallel keeps a flat piece of every factor, which does not tell SNELLA the "
    "importance of layers: use torch's fully_shard (FSDP2) or DistributedDataParallel, or set "
    "allocation=False."
)
NO_STATE = (
    "SNELLA has no importance scores for epoch {} of 0 … {}, the first that starts here: to resume "
    "a training, give back what training_state(model) returned by load_training_state(model, "
    "state); otherwise count epochs from 0."
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
        self.start: list[int] | None = None  # entries kept by every layer when it trained on
        self.frozen: set[int] = set()  # layers that do not train, by their place
        self.late: set[int] = set()  # that trained again later, and have had no gradient yet
        self.resumed = False
        self.expected = False  # a denser adapter than asked for may be saved now
        self.before: list[Tensor] = []
        self.drawn: list[float] = []  # sums of the factors of a fresh adapter
        self.watch = Watch()

    def on_epoch_start(
        self, layers: list[SnellaLayer], name: str, epoch: int, epochs: int, steps: int | None
    ) -> None:
        """Lower the budget and let the layers compete for it."""
        if not 0 <= epoch < epochs:
            raise UserError(f"epoch must lie in [0, {epochs}), got {epoch}.")
        if epoch > 0 and self.epoch is None and self._scored:
            raise UserError(NO_STATE.format(epoch, epochs - 1))
        if self.epoch is not None and epoch > self.epoch and self.step == 0:
            raise UserError(
                "SNELLA saw no optimizer step since the last epoch started: call on_step_end() "
                "after optimizer.step() and before zero_grad(), or set allocation=False."
            )
        if self.config.interval == "step" and steps is None:
            raise UserError('interval="step" needs on_epoch_start(epoch, epochs, steps_per_epoch).')
        if any(factor.ndim != 4 for factor in _factors(layers, name)):
            raise UserError(FLAT)
        frozen = {i for i, layer in enumerate(layers) if not trains(layer, name)}
        self.late, self.frozen = (self.late | self.frozen) - frozen, frozen
        if self.resumed and epoch == self.epoch:  # in mid-epoch: its budgets are shared out already
            self.epochs, self.steps_per_epoch, self.resumed = epochs, steps, False
            return
        if epoch == 0 and self.epoch != 0:
            self.start = self._continued(layers, name)
        seen, self.resumed = self.step, False
        self.watch.on_epoch_start()
        self.epoch, self.epochs, self.steps_per_epoch, self.step = epoch, epochs, steps, 0
        self._remember(layers, name)
        self._report()
        if self.config.allocation:
            if epoch == 0:
                self._warn_of_no_fall(layers)
            self._update(layers, name, steps_seen=seen)

    @property
    def _scored(self) -> bool:
        """Whether budgets depend on the gradients so far."""
        return self.config.allocation and self.config.score == "sensitivity"

    def _continued(self, layers: list[SnellaLayer], name: str) -> list[int] | None:
        """Entries at which a sparse adapter that trains on starts; None for a fresh one (b_0).

        A trained adapter must not grow dense again before it gets sparse.
        """
        rule, sparsity = str(self.config.budget_rule), self.config.sparsity_at_start
        fresh = sum(
            layer.slices * budget_from_sparsity(sparsity, layer.slice_size, rule)
            for layer in self.competing(layers)
        )
        kept = [kept_entries([layer], name) for layer in layers]
        return kept if kept_entries(self.competing(layers), name) < fresh else None

    def _rivals(self, layers: list[SnellaLayer]) -> set[int]:
        return set(range(len(layers))) - self.frozen

    def competing(self, layers: list[SnellaLayer]) -> list[SnellaLayer]:
        """Those of ``layers``, all of the adapter, that are not frozen."""
        return [layers[i] for i in sorted(self._rivals(layers))]

    def _warn_of_no_fall(self, layers: list[SnellaLayer]) -> None:
        """A single epoch, say, leaves no update between the first budget and the last."""
        schedule, updates = self.schedule(layers), self.updates
        first, last = (schedule.budget(update, updates) for update in (0, updates - 1))
        if last >= first > schedule.target:
            warnings.warn(
                f"With {updates} update(s) of the budget SNELLA stays at its first, {first:,} "
                f"entries, and does not reach target_sparsity={self.config.target_sparsity}: "
                'train for more epochs, or set interval="step".',
                stacklevel=5,
            )

    def _remember(self, layers: list[SnellaLayer], name: str) -> None:
        """The weights before the next step."""
        factors = values(_factors(layers, name))
        self._follow(factors)
        if self.config.sensitivity_at == "before-step":
            self.before = [factor.clone() for factor in factors]

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
            if self.watch.passed_by:
                return
            raise UserError(NO_GRADIENTS)
        left_out = self.watch.on_step_end(grads)
        if self.late:
            self.late -= {i // 2 for i, grad in enumerate(grads) if grad is not None}
        factors = values(factors)
        self._follow(factors)
        if self.config.score == "sensitivity":
            zeros = [
                torch.zeros_like(f) if g is None else g for f, g in zip(factors, grads, strict=True)
            ]
            self.importance.update(self.before or factors, values(zeros), left_out)
        if self.before:
            torch._foreach_copy_(self.before, factors)

    @property
    def updates(self) -> int:
        """Updates of the budget in the whole training."""
        per_epoch = self.steps_per_epoch if self.config.interval == "step" else 1
        return self.epochs * (per_epoch or 1)

    def remember_draw(self, layers: list[SnellaLayer], name: str) -> None:
        """Keep the sums of the factors of a fresh adapter, by which it is known."""
        factors = [layer.snella_A[name].detach() for layer in layers]
        if not any(factor.is_meta for factor in factors):
            self.drawn = [float(factor.double().sum()) for factor in factors]

    def is_fresh(self, layers: list[SnellaLayer], name: str) -> bool:
        """Whether the factors are still those that were drawn, as far as can be told."""
        for layer, drawn in zip(layers, self.drawn, strict=False):
            factor = layer.snella_A[name].detach()
            if factor.ndim == 4 and not hasattr(factor, "full_tensor"):
                rounding = torch.finfo(factor.dtype).eps * float(factor.double().abs().sum())
                if abs(float(factor.double().sum()) - drawn) > rounding:
                    return False
        return True

    def _update(self, layers: list[SnellaLayer], name: str, steps_seen: int = 0) -> None:
        update = self.epoch or 0
        if self.config.interval == "step" and self.steps_per_epoch is not None:
            update = update * self.steps_per_epoch + self.step
        schedule = self.schedule(layers)
        if not schedule.reallocates(update, self.updates):
            return
        scores = self.scores(layers, name)
        if steps_seen > 1 and self._all_zero(scores) and kept_entries(layers, name):
            raise UserError(ALL_ZERO)
        flat = iter(scores)
        by_layer = [list(islice(flat, layer.slices)) for layer in layers]
        # Without gradients so far, those that come late would lose everything to the others.
        for places in (self._rivals(layers) - self.late, self.late):
            self._share_out(layers, name, sorted(places), by_layer, update)

    def _share_out(
        self,
        layers: list[SnellaLayer],
        name: str,
        places: list[int],
        scores: list[list[float]],
        update: int,
    ) -> None:
        """The budget of the layers at these places, by their scores."""
        share = allocate if self.config.sharing == "exact" else allocate_released
        sizes = [layers[i].slice_size for i in places for _ in range(layers[i].slices)]
        budget = self.schedule(layers, places).budget(update, self.updates)
        granted = iter(share([s for i in places for s in scores[i]], sizes, budget))
        for i in places:
            layers[i].set_budget(name, list(islice(granted, layers[i].slices)))

    def _all_zero(self, scores: list[float]) -> bool:
        """Whether steps were taken in, none left out, and yet no gradient was seen."""
        seen = self.config.score == "sensitivity" and bool(self.importance.sensitivity)
        return seen and not self.importance.skipped and not any(scores)

    def schedule(self, layers: list[SnellaLayer], places: Iterable[int] | None = None) -> Schedule:
        """The budget over time of ``layers`` at these places; None: of all that compete."""
        config, places = self.config, self._rivals(layers) if places is None else places
        total = sum(layers[i].slice_size * layers[i].slices for i in places)
        start = (1 - float(config.initial_sparsity or 0)) * total
        if self.start is not None:
            start = float(sum(self.start[i] for i in places))
        return Schedule(
            start,
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
            means = [factor.abs().flatten(1).mean(1) for factor in values(_factors(layers, name))]
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
        state = {
            "counters": torch.tensor(counters),
            "start": torch.tensor(self.start or [], dtype=torch.long),
            "frozen": torch.tensor(sorted(self.frozen | self.late), dtype=torch.long),
        }
        return state | self.importance.state_dict()

    def load_state_dict(
        self, state: dict[str, Tensor], layers: list[SnellaLayer], name: str
    ) -> None:
        """Restore ``state_dict`` into an allocator of the same model and adapter."""
        state, factors = dict(state), values(_factors(layers, name))
        shapes = {key: v.shape for key, v in state.items() if key.startswith("sensitivity.")}
        if shapes and shapes != {f"sensitivity.{i}": f.shape for i, f in enumerate(factors)}:
            raise UserError(
                f"The training state of adapter {name!r} is of other layers or ranks than its own."
            )
        epoch, self.epochs, self.step, self.reported = map(int, state.pop("counters"))
        self.epoch = None if epoch < 0 else epoch
        self.start = state.pop("start").tolist() or None
        self.frozen, self.late = set(state.pop("frozen").tolist()), set()
        self.resumed = self.epoch is not None and self.step > 0
        self.importance.load_state_dict(state, factors)
        self._remember(layers, name)


def _factors(layers: list[SnellaLayer], name: str) -> list[Tensor]:
    """A and B of every layer, in a fixed order."""
    return [factor for layer in layers for factor in layer._tensors(name)[:2]]


def values(tensors: list[Tensor]) -> list[Tensor]:
    """Plain tensors, whole where ``fully_shard`` has left a part of each on every process."""
    return [t.detach() if type(t) in _PLAIN else _whole(t.detach()) for t in tensors]


_PLAIN = (Tensor, nn.Parameter)


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def trains(layer: SnellaLayer, name: str) -> bool:
    """Whether the layer's adapter of this name is not frozen."""
    return any(factor.requires_grad for factor in _factors([layer], name))


def _weight_magnitude(layer: SnellaLayer, name: str) -> Tensor:
    """Mean magnitude of the kept entries of every slice."""
    delta = layer.get_delta_weight(name).view(layer.slices, -1).abs()
    return delta.sum(1) / (delta > 0).sum(1).clamp_min(1)


def kept_entries(layers: list[SnellaLayer], name: str) -> int:
    """Entries that an adapter may keep, over all layers."""
    return sum(sum(layer.snella_budget[name].tolist()) for layer in layers)
