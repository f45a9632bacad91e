"""The one training loop: any method, any task, one protocol.

Every epoch is seeded from (run seed, epoch), and a checkpoint follows its last step, so that a run
killed at any moment continues from its last whole epoch to the bit-identical result: where it
was predicting, with the predictions that are missing. A run that a signal ends writes one after
the step under way and continues from there. Predictions are files beside the checkpoint; the
trainer knows no label and no metric.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snella.data.placement import travel
from snella.errors import Diverged, UserError, one_line
from snella.files import atomic
from snella.methods.base import (
    Batch,
    Method,
    check_marked,
    counted,
    kept_tensors,
    method_file,
    wrong_result,
)
from snella.methods.step import train_step
from snella.models.parameters import (
    checkpoint_blocks,
    frozen_checksums,
    random_state,
    restore_random_state,
    seed_everything,
    trainable,
)
from snella.runs.measure import PeakMemory
from snella.runs.optimizers import build_optimizer
from snella.runs.precision import autocast
from snella.runs.protocol import Protocol
from snella.runs.stopping import Terminated, whole
from snella.seeds import derive_seed
from snella.tasks.base import Task

Row = dict[str, float]
PREDICTIONS = "predictions"


def prediction_folder(folder: Path, epoch: int, split: str) -> Path:
    """Where a run's predictions after ``epoch`` lie."""
    return folder / PREDICTIONS / f"epoch{epoch:04d}" / split


@dataclass
class Begun:
    """The part of an epoch that is done, in whole steps.

    ``random`` is where the generators have to be put before it goes on, None once they are there.
    """

    losses: list[Tensor] = field(default_factory=list)
    examples: int = 0
    seconds: float = 0.0
    random: dict[str, Any] | None = None


@dataclass
class Progress:
    """What a run has produced so far; with the model's state, all that a checkpoint holds."""

    epoch: int = -1
    history: list[Row] = field(default_factory=list)
    peak_memory_mb: float | None = None


class Trainer:
    """Fit one adapted model; the result is in ``progress``, in the model and in ``folder``.

    ``fingerprint`` is the identity of the training: a checkpoint of another one is not resumed.
    ``validate`` turns a folder of validation predictions into a number to report, or None.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        task: Task,
        protocol: Protocol,
        seed: int,
        folder: Path,
        fingerprint: str,
        report: Callable[[Row, int], None] = lambda row, epochs: None,
        validate: Callable[[Path], float | None] = lambda folder: None,
    ) -> None:
        self.method, self.model, self.task, self.protocol = method, model, task, protocol
        self.seed, self.folder, self.fingerprint = seed, folder, fingerprint
        self.report, self.validate = report, validate
        self.checkpoint = folder / "checkpoint.pt"
        self.device = next(model.parameters()).device
        self.progress = Progress()
        self.begun: Begun | None = None
        self.ema: dict[str, Tensor] | None = None
        steps = task.steps(protocol.train_split)
        self.steps = -(-steps // protocol.accumulation)
        self.epochs = protocol.total_epochs(self.steps)
        method.steps_per_epoch = self.steps
        fp16 = protocol.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type) if fp16 else None

    def fit(self) -> Progress:
        """Train to the last epoch, resuming from the checkpoint if there is one.

        Raises :class:`~snella.errors.Diverged` if the loss becomes NaN or infinite, and
        :class:`~snella.errors.UserError` if the method marks nothing or moves frozen weights.
        """
        saved = self._read_checkpoint()
        if saved is None:
            shutil.rmtree(self.folder / PREDICTIONS, ignore_errors=True)
            self._calibrate()
        else:
            self.method.load_state(self.model, saved["state"])
            self.method.load_training_state(self.model, saved["training_state"])
        check_marked(self.method, self.model)
        counted(self.method, self.model)  # a fault of it costs no training
        if self.protocol.gradient_checkpointing:
            checkpoint_blocks(self.model)
        frozen = frozen_checksums(self.model)
        optimizer = self._optimizer()
        if saved is None:
            self._write_checkpoint(optimizer)
        else:
            self._restore(saved, optimizer)
        try:
            for epoch in range(self.progress.epoch + 1, self.epochs):
                self._epoch(epoch, optimizer, frozen)
        except Terminated:
            if self.begun is None or self.begun.losses:
                self._write_checkpoint(optimizer)
            raise
        if self.ema is not None:  # what was predicted with is what is kept
            self._put(self.ema)
        return self.progress

    def _optimizer(self) -> torch.optim.Optimizer:
        protocol = self.protocol
        groups = self.method.parameter_groups(self.model, protocol.lr, protocol.weight_decay)
        if isinstance(groups, Iterator):
            raise wrong_result(self.method, "parameter_groups", "must return a list, no generator")
        try:
            optimizer = build_optimizer(
                protocol.optimizer, groups, protocol.lr, protocol.momentum, self.scaler is None
            )
        except (TypeError, ValueError, LookupError) as error:
            raise wrong_result(self.method, "parameter_groups", one_line(error)) from error
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        if protocol.ema_decay:
            self.ema = {n: p.detach().clone() for n, p in trainable(self.model).items()}
        return optimizer

    def _calibrate(self) -> None:
        seed_everything(derive_seed(self.seed, "calibration", 0))
        batches = _Reiterable(lambda: self._on_device(self._calibration_batches()))
        self.method.calibrate(self.model, batches, self.task.loss)

    def _calibration_batches(self) -> Iterator[Batch]:
        """Training batches in the order, and with the views, that the method asks for."""
        split, method = self.protocol.train_split, self.method
        shuffled = method.calibration_order == "shuffled"
        seed = derive_seed(self.seed, "calibration order", 0) if shuffled else None
        plain = getattr(self.task, "plain_batches", self.task.batches)
        batches: Iterator[Batch] = plain(split, seed)
        views = getattr(self.task, "views", None)
        if not method.calibration_views or views is None:
            return batches
        augmented = views(split, seed, method.calibration_views)
        return ({**b, "views": v} for b, v in zip(batches, augmented, strict=True))

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer, frozen: dict[str, int]) -> None:
        """Train what is left of an epoch, keep that, and predict what is left to predict."""
        row = self._train(epoch, optimizer)
        self._check_frozen(frozen)
        last = epoch == self.epochs - 1
        if last or (epoch + 1) % self.protocol.checkpoint_every == 0:
            with whole():
                self._write_checkpoint(optimizer)
        if self.protocol.looks(epoch, self.epochs):
            row |= self._predict(epoch)
        with whole():
            self.begun = None
            self.progress.epoch = epoch
            self.progress.history.append(row)
        self.report(row, self.epochs)

    def _check_frozen(self, before: dict[str, int]) -> None:
        late = [name for name in trainable(self.model) if name in before]
        if late:
            raise UserError(
                f"{method_file(self.method)}: a hook of {type(self.method).__name__} makes "
                f"{late[0]} trainable after training began, too late for the optimizer; set "
                "requires_grad in adapt or calibrate."
            )
        now = frozen_checksums(self.model)
        moved = [name for name, checksum in before.items() if now.get(name, checksum) != checksum]
        if moved:
            raise UserError(
                f"{method_file(self.method)}: {type(self.method).__name__} moves {moved[0]}, which "
                "it did not mark as trainable; set requires_grad in adapt, or leave it alone."
            )

    def _train(self, epoch: int, optimizer: torch.optim.Optimizer) -> Row:
        """Train what is left of an epoch."""
        seed = derive_seed(self.seed, "epoch", epoch)
        seed_everything(seed)
        begun, self.begun = self.begun or Begun(), Begun()  # a hook cut short is not saved
        with self._measured(begun):
            self.model.train()
            if len(begun.losses) < self._end(epoch):  # else only predictions are missing
                self.method.on_epoch_start(self.model, epoch, self.epochs)
            if begun.random is not None:
                restore_random_state(begun.random)
                begun.random = None
            self.begun = begun
            self._steps(epoch, seed, optimizer, begun)
            values = torch.stack(begun.losses).float().cpu()  # waits for the device
        if not values.isfinite().all():
            first = int((~values.isfinite()).nonzero()[0])
            raise Diverged(f"the loss became {values[first]:.0f} in epoch {epoch}, step {first}")
        return {
            "epoch": epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "loss": values.mean().item(),
            "examples": begun.examples,
            "train_seconds": begun.seconds,
        }

    def _steps(self, epoch: int, seed: int, optimizer: torch.optim.Optimizer, begun: Begun) -> None:
        done, end = len(begun.losses), self._end(epoch)
        accumulation = self.protocol.accumulation
        batches = self.task.batches(self.protocol.train_split, seed)
        rest = self._on_device(islice(batches, done * accumulation, None))
        for step, group in zip(range(done, end), _grouped(rest, accumulation), strict=False):
            with whole():
                self._set_lr(optimizer, epoch, step / self.steps)
                begun.losses.append(self._step(group, optimizer))
                begun.examples += sum(self.task.size(batch) for batch in group)

    def _end(self, epoch: int) -> int:
        """How many steps the epoch has; the last may be cut short by the protocol's ``steps``."""
        if not self.protocol.steps:
            return self.steps
        return min(self.steps, self.protocol.steps - epoch * self.steps)

    @contextmanager
    def _measured(self, begun: Begun) -> Iterator[None]:
        """Add the block's seconds and memory, also where a signal ends it."""
        memory = PeakMemory(self.device)
        begin = time.perf_counter()
        try:
            with memory.watch():
                yield
        finally:
            begun.seconds += time.perf_counter() - begin
            if memory.mib is not None:
                seen = self.progress.peak_memory_mb
                self.progress.peak_memory_mb = max(memory.mib, seen or 0.0)

    def _step(self, batches: Sequence[Batch], optimizer: torch.optim.Optimizer) -> Tensor:
        loss = train_step(
            self.model,
            optimizer,
            batches,
            self.task.loss,
            method=self.method,
            precision=self._precision,
            scaler=self.scaler,
            clip_grad=self.protocol.clip_grad,
        )
        if self.ema is not None:
            self._update_ema(self.ema)
        return loss

    def _predict(self, epoch: int) -> Row:
        """Predict on the validation split (unless trained on) and on the test split."""
        row: Row = {}
        with self._ema_weights(), self._precision():
            self.model.eval()
            if self.protocol.train_split != "trainval" and self.task.data.has("val"):
                folder = self._prediction_folder(epoch, "val")
                self.task.predict(self.model, "val", folder)
                found = self.validate(folder)
                if found is not None:
                    row["val"] = found
            folder = self._prediction_folder(epoch, "test")
            begin, resumed = time.perf_counter(), any(folder.iterdir())
            row["predicted"] = self.task.predict(self.model, "test", folder)
            if not resumed:  # else this is the time of a part
                row["predict_seconds"] = time.perf_counter() - begin
        return row

    def _prediction_folder(self, epoch: int, split: str) -> Path:
        folder = prediction_folder(self.folder, epoch, split)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _set_lr(self, optimizer: torch.optim.Optimizer, epoch: int, progress: float) -> None:
        factor = self.protocol.lr_factor(epoch, progress, self.epochs)
        for group, base in zip(optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def _precision(self) -> AbstractContextManager[None]:
        return autocast(self.protocol.precision, self.device)

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches where the model is; single numbers stay on the host, which reads them."""
        for batch in batches:
            yield {n: travel(v, self.device) if v.ndim else v for n, v in batch.items()}

    @torch.no_grad()
    def _update_ema(self, ema: dict[str, Tensor]) -> None:
        decay = self.protocol.ema_decay
        assert decay is not None
        parameters = trainable(self.model)
        averages = [ema[name] for name in parameters]
        torch._foreach_lerp_(averages, list(parameters.values()), 1 - decay)

    @contextmanager
    def _ema_weights(self) -> Iterator[None]:
        """Evaluate the averaged weights, inside the live model with its live budgets and masks."""
        if self.ema is None:
            yield
            return
        live = {n: p.detach().clone() for n, p in trainable(self.model).items()}
        try:
            self._put(self.ema)
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        with whole():
            for name, parameter in trainable(self.model).items():
                parameter.copy_(values[name])

    def _write_checkpoint(self, optimizer: torch.optim.Optimizer) -> None:
        begun = None
        if self.begun is not None:
            self.begun.random = self.begun.random or random_state()
            begun = {**vars(self.begun), "losses": torch.stack(self.begun.losses)}
        content = {
            "fingerprint": self.fingerprint,
            "state": kept_tensors(self.method, self.model, "state"),
            "training_state": kept_tensors(self.method, self.model, "training_state"),
            "optimizer": optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "ema": self.ema,
            "epoch": self.progress.epoch,
            "history": self.progress.history,
            "peak_memory_mb": self.progress.peak_memory_mb,
            "begun": begun,
        }
        with atomic(self.checkpoint) as path:
            torch.save(content, path)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint of this very run; one of another identity or a damaged one is ignored."""
        if not self.checkpoint.exists():
            return None
        try:
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            same = saved["fingerprint"] == self.fingerprint
        except Exception:  # half a file after a crash of the machine, or no checkpoint at all
            return None
        return saved if same else None

    def _restore(self, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        optimizer.load_state_dict(saved["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        self.ema = saved["ema"]
        self.progress = Progress(saved["epoch"], saved["history"], saved["peak_memory_mb"])
        if (begun := saved["begun"]) is not None:
            self.begun = Begun(**{**begun, "losses": list(begun["losses"])})


def _grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """``size`` batches at a time; the last group is what is left."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


class _Reiterable:
    """Batches that a calibrating method may run over more than once."""

    def __init__(self, make: Callable[[], Iterator[Batch]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Batch]:
        return self._make()
