"""Distances between predicted and true places."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from snella.tasks import Score, Scorer


class Distance(Scorer):
    """Root mean squared error, and the fraction of places found to within a tenth."""

    def score(self, predictions: Path, split: str) -> dict[str, Score]:
        found = np.load(predictions / "places.npy")
        error = np.linalg.norm(found - self.data.targets(split, "place"), axis=1)
        near = error < 0.1
        rmse = float(np.sqrt((error**2).mean()))
        return {
            "rmse": Score(rmse, {}, error),
            "near": Score(float(near.mean()), {}, near.astype(np.float32)),
        }

    def chance(self) -> dict[str, float]:
        return {"rmse": 0.4}  # of the middle of the image
