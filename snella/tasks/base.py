"""The interface of a task family, so that the trainer assumes nothing about labels or logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from torch import Tensor, nn

from snella.data.prepared import Prepared
from snella.methods.base import Batch
from snella.runs.protocol import Protocol


class Task(ABC):
    """One data set under one protocol, seen through what training and scoring need.

    A task never holds test targets: it predicts on test inputs, and the predictions are scored
    afterwards by :mod:`snella.runs.evaluate`, which alone can read them.
    """

    metric: str
    """The primary metric's name; every metric is a fraction in [0, 1], higher is better."""

    def __init__(self, data: Prepared, protocol: Protocol) -> None:
        self.data = data
        self.protocol = protocol

    @abstractmethod
    def build_model(self, backbone: dict[str, Any]) -> nn.Module:
        """The pre-trained backbone with a fresh head for this task."""

    @abstractmethod
    def train_batches(self, epoch_seed: int | None) -> Any:
        """Iterate one epoch of training batches; in file order when the seed is None."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""

    @abstractmethod
    def predict(self, model: nn.Module, split: str) -> np.ndarray:
        """Predict every example of ``split`` exactly once, in order, in compact form."""

    @staticmethod
    @abstractmethod
    def score(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """All metrics of ``predictions``, among them the primary one."""
