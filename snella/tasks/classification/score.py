"""Top-1 accuracy of predicted classes on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from snella.errors import UserError
from snella.tasks.base import Score, Scorer
from snella.tasks.classification.settings import PREDICTIONS


class Top1(Scorer):
    """The fraction of images whose predicted class is their label."""

    def score(self, predictions: Path, split: str) -> dict[str, Score]:
        """Top-1 accuracy, by class and per image; every image has to be predicted once."""
        file = predictions / PREDICTIONS
        found = np.load(file, allow_pickle=False)
        labels = self.data.targets(split, "label")
        if found.shape != labels.shape:
            raise UserError(
                f"{file} holds {len(found)} predictions for {len(labels)} images; "
                "delete the run's folder and train it again."
            )
        correct = found == labels
        names = self.data.manifest.get("class_names") or range(self.data.num_classes)
        per_class = {
            str(name): float(correct[labels == k].mean())
            for k, name in enumerate(names)
            if (labels == k).any()
        }
        return {"top1": Score(float(correct.mean()), per_class, correct.astype(np.float32))}

    def chance(self) -> dict[str, float]:
        """Always guessing the most frequent class of the test split."""
        labels = self.data.targets("test", "label")
        return {"top1": float(np.bincount(labels).max() / len(labels))}
