"""The one training loop: any method, any task, one protocol.

Every epoch is seeded from (run seed, epoch) and ends with a checkpoint, so that a run killed
at any moment continues from its last whole epoch to the bit-identical result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snella.errors import Diverged, UserError
from snella.methods.base import Batch, Method, check_marked, method_file
from snella.models.parameters import frozen_checksums, seed_everything, trainable
from snella.records import atomic
from snella.runs.measure import PeakMemory
from snella.runs.protocol import Protocol
from snella.suite.plan import derive_seed
from snella.tasks import Task

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
}
Row = dict[str, float]


@dataclass
class Progress:
    """What a run has produced so far; with the model's state, all that a checkpoint holds."""

    epoch: int = -1
    history: list[Row] = field(default_factory=list)
    predictions: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    peak_memory_mb: float | None = None


class Trainer:
    """Fit one adapted model; the result is in ``progress`` and in the model itself."""

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        task: Task,
        seed: int,
        checkpoint: Path,
        fingerprint: str,
        report: Callable[[Row, int], None] = lambda row, epochs: None,
    ) -> None:
        self.method, self.model, self.task = method, model, task
        self.protocol: Protocol = task.protocol
        self.seed, self.checkpoint, self.fingerprint = seed, checkpoint, fingerprint
        self.report = report
        self.device = next(model.parameters()).device
        self.progress = Progress()
        self.ema: dict[str, Tensor] | None = None

    def fit(self) -> Progress:
        """Train to the last epoch, resuming from the checkpoint if there is one.

        Raises :class:`~snella.errors.Diverged` if the loss becomes NaN or infinite, and
        :class:`~snella.errors.UserError` if the method marks nothing or moves frozen weights.
        """
        saved = self._read_checkpoint()
        if saved is None:
            self._calibrate()
        else:
            self.method.load_state(self.model, saved["state"])
            self.method.load_training_state(self.model, saved["training_state"])
        check_marked(self.method, self.model)
        frozen = frozen_checksums(self.model)
        groups = self.method.parameter_groups(
            self.model, self.protocol.lr, self.protocol.weight_decay
        )
        optimizer = OPTIMIZERS[self.protocol.optimizer](groups, lr=self.protocol.lr)
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        if self.protocol.ema_decay:
            self.ema = {n: p.detach().clone() for n, p in trainable(self.model).items()}
        if saved is None:
            self._write_checkpoint(optimizer)
        else:
            self._restore(saved, optimizer)
        for epoch in range(self.progress.epoch + 1, self.protocol.epochs):
            self._epoch(epoch, optimizer)
            self._check_frozen(frozen)
        return self.progress

    def _calibrate(self) -> None:
        seed_everything(derive_seed(self.seed, "calibration", 0))
        batches = _Reiterable(lambda: self._on_device(self.task.train_batches(None)))
        self.method.calibrate(self.model, batches, self.task.loss)

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        seed = derive_seed(self.seed, "epoch", epoch)
        seed_everything(seed)
        memory = PeakMemory(self.device)
        begin = time.perf_counter()
        with memory.watch():
            row = self._train(epoch, seed, optimizer)
        row["train_seconds"] = time.perf_counter() - begin
        if memory.mib is not None:
            seen = self.progress.peak_memory_mb
            self.progress.peak_memory_mb = max(memory.mib, seen or 0.0)
        if self.protocol.evaluates(epoch):
            row |= self._evaluate(epoch)
        self.progress.epoch = epoch
        self.progress.history.append(row)
        self._write_checkpoint(optimizer)
        self.report(row, self.protocol.epochs)

    def _check_frozen(self, before: dict[str, int]) -> None:
        now = frozen_checksums(self.model)
        moved = [name for name, checksum in before.items() if now.get(name, checksum) != checksum]
        if moved:
            raise UserError(
                f"{method_file(self.method)}: {type(self.method).__name__} moves {moved[0]}, which "
                "it did not mark as trainable; set requires_grad in adapt, or leave it alone."
            )

    def _train(self, epoch: int, seed: int, optimizer: torch.optim.Optimizer) -> Row:
        self.model.train()
        self.method.on_epoch_start(self.model, epoch, self.protocol.epochs)
        size = len(self.task.data.labels(self.protocol.train_split))
        steps = -(-size // self.protocol.batch_size)
        losses, images = [], 0
        for step, batch in enumerate(self._on_device(self.task.train_batches(seed))):
            self._set_lr(optimizer, epoch, step / steps)
            losses.append(self._step(batch, optimizer))
            images += len(next(iter(batch.values())))
        values = torch.stack(losses).float().cpu()
        if not values.isfinite().all():
            first = int((~values.isfinite()).nonzero()[0])
            raise Diverged(f"the loss became {values[first]:.0f} in epoch {epoch}, step {first}")
        return {
            "epoch": epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "loss": values.mean().item(),
            "images": images,
        }

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> Tensor:
        with self._precision():
            loss = self.task.loss(self.model, batch)
            extra = self.method.auxiliary_loss(self.model, batch, self.task.loss)
        optimizer.zero_grad(set_to_none=True)
        (loss if extra is None else loss + extra).backward()
        if self.protocol.clip_grad:
            nn.utils.clip_grad_norm_(trainable(self.model).values(), self.protocol.clip_grad)
        optimizer.step()
        self.method.on_step_end(self.model)
        if self.ema is not None:
            self._update_ema(self.ema)
        return loss.detach()

    def _evaluate(self, epoch: int) -> Row:
        """Predict on val200 (unless trained on) and on the test images; time the latter."""
        row: Row = {}
        with self._ema_weights(), self._precision():
            self.model.eval()
            if self.protocol.train_split != "trainval":
                found = self.task.predict(self.model, "val200")
                self.progress.predictions.setdefault("val200", {})[epoch] = found
                targets = self.task.data.labels("val200")
                row["val"] = self.task.score(found, targets)[self.task.metric]
            begin = time.perf_counter()
            found = self.task.predict(self.model, "test")
            row["test_seconds"] = time.perf_counter() - begin
            row["test_images"] = len(found)
            self.progress.predictions.setdefault("test", {})[epoch] = found
        return row

    def _set_lr(self, optimizer: torch.optim.Optimizer, epoch: int, progress: float) -> None:
        factor = self.protocol.lr_factor(epoch, progress)
        for group, base in zip(optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def _precision(self) -> Any:
        if self.protocol.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    @torch.no_grad()
    def _update_ema(self, ema: dict[str, Tensor]) -> None:
        decay = self.protocol.ema_decay
        assert decay is not None
        for name, parameter in trainable(self.model).items():
            ema[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def _ema_weights(self) -> Iterator[None]:
        """Evaluate the averaged weights, inside the live model with its live budgets and masks."""
        if self.ema is None:
            yield
            return
        live = {n: p.detach().clone() for n, p in trainable(self.model).items()}
        self._put(self.ema)
        yield
        self._put(live)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in trainable(self.model).items():
            parameter.copy_(values[name])

    def _write_checkpoint(self, optimizer: torch.optim.Optimizer) -> None:
        content = {
            "fingerprint": self.fingerprint,
            "state": self.method.state(self.model),
            "training_state": self.method.training_state(self.model),
            "optimizer": optimizer.state_dict(),
            "ema": self.ema,
            "epoch": self.progress.epoch,
            "history": self.progress.history,
            "peak_memory_mb": self.progress.peak_memory_mb,
            "predictions": {
                split: {epoch: torch.from_numpy(found) for epoch, found in by_epoch.items()}
                for split, by_epoch in self.progress.predictions.items()
            },
        }
        with atomic(self.checkpoint) as path:
            torch.save(content, path)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint of this very run; one of other settings or a damaged one is ignored."""
        if not self.checkpoint.exists():
            return None
        try:
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except Exception:  # half a file after a crash of the machine: start again
            return None
        return saved if saved.get("fingerprint") == self.fingerprint else None

    def _restore(self, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        optimizer.load_state_dict(saved["optimizer"])
        self.ema = saved["ema"]
        predictions = {
            split: {epoch: found.cpu().numpy() for epoch, found in by_epoch.items()}
            for split, by_epoch in saved["predictions"].items()
        }
        self.progress = Progress(
            saved["epoch"], saved["history"], predictions, saved["peak_memory_mb"]
        )


class _Reiterable:
    """Batches that a calibrating method may run over more than once."""

    def __init__(self, make: Callable[[], Iterator[Batch]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Batch]:
        return self._make()
