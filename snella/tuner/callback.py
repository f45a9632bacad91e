"""SnellaCallback: the hooks of SNELLA for transformers' Trainer, and its state in checkpoints."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from snella.errors import UserError
from snella.tuner.hooks import (
    load_training_state,
    on_epoch_start,
    on_step_end,
    trained_adapters,
    training_state,
)
from snella.tuner.layer import SnellaLayer

_FILE = "snella_training_state.safetensors"


class SnellaCallback(TrainerCallback):
    """Pass to ``Trainer(callbacks=[SnellaCallback()])``; settings are read from the adapter.

    Checkpoints of the Trainer also hold the state of the allocation, so that
    ``train(resume_from_checkpoint=...)`` goes on exactly. It is looked for in the checkpoint of the
    output folder; ``resume_from_checkpoint`` names another folder. Adding the callback twice counts
    once.
    """

    def __init__(self, resume_from_checkpoint: str | Path | None = None) -> None:
        self.resume_from_checkpoint = resume_from_checkpoint

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Restore the allocation of a resumed training."""
        model = kwargs["model"]
        for _, allocator in trained_adapters(model):
            allocator.expected = True  # checkpoints are as dense as the schedule has them
        if state.global_step > 0:
            load_training_state(model, load_file(self._find(args, state, model)))

    def _find(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> Path:
        """The state that was saved with the weights that the model has now."""
        name = f"checkpoint-{state.global_step}"
        folders = [self.resume_from_checkpoint, args.resume_from_checkpoint]
        folders.append(Path(str(args.output_dir)) / name)
        weights = _digest(model)
        for folder in folders:
            path = Path(str(folder)) / _FILE
            if folder is None or not path.is_file():
                continue
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("weights") == weights:
                    return path
        raise UserError(
            f"The Trainer resumes at step {state.global_step}, but no {_FILE} of these weights is "
            f"in {Path(str(args.output_dir)) / name}: pass the checkpoint's folder to "
            "SnellaCallback(resume_from_checkpoint=...) too. Checkpoints hold the file if they "
            "were written with this callback."
        )

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Lower the budget and share it out."""
        model = kwargs["model"]
        configs = [allocator.config for _, allocator in trained_adapters(model)]
        if all(config.interval == "step" or not config.allocation for config in configs):
            if not getattr(state, "snella_begun", False):  # the whole training as one epoch
                state.snella_begun = True  # type: ignore[attr-defined]
                on_epoch_start(model, 0, 1, state.max_steps)
            return
        if state.num_train_epochs == sys.maxsize:  # data without a length
            raise UserError(
                "The Trainer does not know how long an epoch of this data set is, so SNELLA's "
                'budget would never fall: set interval="step" in SnellaConfig.'
            )
        epochs = max(1, math.ceil(state.num_train_epochs))
        steps = math.ceil(state.max_steps / epochs)
        on_epoch_start(model, min(int(state.epoch or 0), epochs - 1), epochs, steps)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take in the step's gradients; the Trainer clears them right after this."""
        if getattr(state, "snella_step", None) != state.global_step:  # not by a second callback
            state.snella_step = state.global_step  # type: ignore[attr-defined]
            on_step_end(kwargs["model"])

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the state of the allocation to the checkpoint."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            model = kwargs["model"]
            saved = {
                name: t.detach().cpu().contiguous() for name, t in training_state(model).items()
            }
            save_file(saved, folder / _FILE, metadata={"weights": _digest(model)})

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """From now on a saved adapter should have reached its sparsity."""
        for _, allocator in trained_adapters(kwargs["model"]):
            allocator.expected = False


def _digest(model: nn.Module) -> str:
    """Of all factors and budgets: which checkpoint a model's weights are from."""
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, SnellaLayer):
            for group in (module.snella_A, module.snella_B, module.snella_budget):
                for name in sorted(group.keys()):
                    digest.update(group[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
