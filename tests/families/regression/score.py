"""Distances between predicted and true places."""

from pathlib import Path

import numpy as np

from snella.tasks import Score, Scorer


class Distance(Scorer):
    """Root mean squared error, and the fraction of places found to within a tenth."""

    def score(self, predictions: Path, split: str) -> dict[str, Score]:
        found = np.load(predictions / "places.npy")
        error = np.linalg.norm(found - self.data.targets(split, "place"), axis=1)
        near = error < 0.1
        return {
            "rmse": Score(float(np.sqrt((error**2).mean())), per_example=error),
            "near": Score(float(near.mean()), per_example=near.astype(np.float32)),
        }

    def chance(self) -> dict[str, float]:
        return {"rmse": 0.4}  # of the middle of the image
