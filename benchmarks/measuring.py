"""What the benchmarks share: models that step in turns, memory counted, facts of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella.method import Method
from snella.methods.base import build_method, prepare_model
from snella.suite import config as configuration
from snella.suite import plan

MIB = 2**20
LEARNING_RATE = WEIGHT_DECAY = 1e-4
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Setup:
    """What all models of one run have in common: the backbone and one fixed random batch."""

    arch: str = "vit_base_patch16_224"
    batch: int = 8
    classes: int = 100
    device: str = "cpu"

    def backbone(self) -> nn.Module:
        """The plain model of timm, with random weights."""
        torch.manual_seed(0)
        return with_random_head(timm.create_model(self.arch, num_classes=self.classes))

    def data(self) -> dict[str, Tensor]:
        """The batch: image (B, 3, 224, 224), label (B,)."""
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(self.batch, 3, 224, 224, generator=generator)
        label = torch.randint(self.classes, (self.batch,), generator=generator)
        return {"image": image.to(self.device), "label": label.to(self.device)}

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclass
class Training:
    """A model in training mode, its loss on a fixed batch, and what happens around a step."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    after_backward: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None

    def step(self) -> None:
        """One training step."""
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.after_backward()
        self.optimizer.step()
        self.after_step()

    def memory(self) -> dict[str, int]:
        """Bytes that a step adds to the model: kept for backward, gradients, optimizer state."""
        kept: dict[int, int] = {}
        own = {t.untyped_storage().data_ptr() for t in model_tensors(self.model)}

        def note(tensor: Tensor) -> Tensor:
            for part in strided(tensor):
                storage = part.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.after_backward()
        self.optimizer.step()
        self.after_step()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        return {
            "kept_for_backward": sum(kept.values()),
            "gradients": total_bytes(gradients),
            "optimizer_state": total_bytes(t for t in states if isinstance(t, Tensor)),
        }

    def trainable(self) -> int:
        """Number of trainable parameters, the head included."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def model_tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def strided(tensor: Tensor) -> list[Tensor]:
    """A tensor with a storage as it is; a sparse one's indices and values."""
    return [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for t in tensors for part in strided(t))


def with_random_head(model: Any) -> Any:
    """Give the head weights that let gradients through; timm and others start it at zero."""
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    return model


def cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"])


def trained_by_adamw(
    model: nn.Module, loss: Callable[[], Tensor], groups: Any = None, **hooks: Callable[[], None]
) -> Training:
    """AdamW on ``groups``, by default on all that trains."""
    groups = groups or [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return Training(model, loss, optimizer, **hooks)


def configured_method(row: str, **settings: Any) -> Method:
    """The method of a row of config/methods.yaml, with some hyper-parameters set otherwise."""
    config = configuration.load()
    entry = config.methods[row]
    path = Path(plan.method_path(config, entry.file or row))
    return build_method(path, entry.hyperparameters | settings)


def configured_row(method: Method, setup: Setup) -> Training:
    """What the training loop does with ``method``, hooks included, on one batch."""
    model, batch = setup.backbone().to(setup.device), setup.data()
    prepare_model(method, model)
    method.calibrate(model, [batch], cross_entropy)

    def loss() -> Tensor:
        task = cross_entropy(model, batch)
        extra = method.auxiliary_loss(model, batch, cross_entropy)
        return task if extra is None else task + extra

    groups = method.parameter_groups(model, LEARNING_RATE, WEIGHT_DECAY)
    method.on_epoch_start(model, 0, 10)
    model.train()
    return trained_by_adamw(model, loss, groups, after_step=lambda: method.on_step_end(model))


def interleaved(
    actions: dict[str, Callable[[], object]],
    repeats: int,
    setup: Setup,
    clock: str = "wall",
    inference: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each call of each action.

    They take turns, backwards in every second round, so that a machine that gets slower gets
    slower for all; a first round warms up and is not counted.
    """
    now = CLOCKS[clock]
    samples: dict[str, list[float]] = {name: [] for name in actions}
    with torch.inference_mode() if inference else nullcontext():
        for turn in range(repeats + 1):
            for name in sorted(actions, key=list(actions).index, reverse=turn % 2 == 1):
                setup.synchronize()
                begin = now()
                actions[name]()
                setup.synchronize()
                if turn > 0:
                    samples[name].append(now() - begin)
    return samples


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}
