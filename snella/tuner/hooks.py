"""The two calls of training, ``on_epoch_start`` and ``on_step_end``, and its state.

The allocator of an adapter is shared by its layers, so it is found again from any wrapper of the
model, and copied and saved with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from torch import Tensor, nn

from snella.errors import UserError
from snella.tuner.allocator import Allocator, trains
from snella.tuner.layer import SnellaLayer


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
        allocator.remember_draw(layers, adapter_name)
        for layer in layers:
            layer.allocators[adapter_name] = allocator
            if allocator.config.allocation:  # a compiled model shows no forward
                allocator.watch.know(layer, adapter_name)


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
        if not any(trains(layer, name) for layer in layers):
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
