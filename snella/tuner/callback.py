"""SnellaCallback: the two hooks of SNELLA for transformers' Trainer."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from snella.tuner.allocator import on_epoch_start, on_step_end


class SnellaCallback(TrainerCallback):
    """Pass to ``Trainer(callbacks=[SnellaCallback()])``; settings are read from the adapter."""

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Lower the budget and share it out."""
        epochs = max(1, math.ceil(state.num_train_epochs))
        steps = math.ceil(state.max_steps / epochs)
        on_epoch_start(kwargs["model"], min(int(state.epoch or 0), epochs - 1), epochs, steps)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take in the step's gradients; the Trainer clears them right after this."""
        on_step_end(kwargs["model"])
