"""Scoring: the only module that reads test targets, and it never sees a model.

Training hands over predictions; here they meet the targets, under every selection rule that
the run allows, so that one record shows how much looking at the test set adds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from snella.data.prepared import test_labels

Predictions = dict[str, dict[int, np.ndarray]]


def score_run(
    task: Any, predictions: Predictions, folder: Path, val_targets: np.ndarray | None
) -> dict[str, dict[str, float]]:
    """Metrics under each selection: ``last``, ``best-test`` and, with ``val_targets``, ``val``.

    ``task`` gives ``score`` and the primary ``metric``; ``predictions[split][epoch]`` are a
    split's predictions after an epoch; ``folder`` is the prepared data set. The earliest of
    equally good epochs is taken.
    """
    targets = test_labels(folder)
    test = {epoch: task.score(found, targets) for epoch, found in predictions["test"].items()}
    chosen = {"last": max(test), "best-test": _best(test, task.metric)}
    if val_targets is not None:
        val = {e: task.score(found, val_targets) for e, found in predictions["val200"].items()}
        chosen["val"] = _best(val, task.metric)
    return {rule: {"epoch": epoch, **test[epoch]} for rule, epoch in chosen.items()}


def _best(scores: dict[int, dict[str, float]], metric: str) -> int:
    return max(sorted(scores), key=lambda epoch: scores[epoch][metric])
