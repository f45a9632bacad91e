"""Shared fixtures: the repository's root as working directory, one thread, a tiny data set."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# As many tests as cores run at once: more threads, also those of their processes, would only wait.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """A prepared data set of 40/16/24 images, 4 classes told apart by their mean colour."""
    from snella.tasks.classification.prepare import write_labelled

    rng = np.random.default_rng(0)

    def split(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(n, dtype=np.int64) % 4
        images = rng.integers(0, 100, (n, 16, 16, 3)) + 40 * labels[:, None, None, None]
        return images.astype(np.uint8), labels

    splits = {"train": split(40), "val": split(16), "test": split(24)}
    folder = tmp_path / "data" / "prepared" / "tiny"
    write_labelled(folder, splits, {"name": "tiny", "source": "test", "num_classes": 4})
    return folder


@pytest.fixture
def make_run(tiny_data: Path, tmp_path: Path):
    """One run on ``tiny_data``, as a function of what differs."""

    def make(method: str = "full", hyperparameters: dict | None = None, **protocol):
        from snella.runs.protocol import Protocol
        from snella.runs.run import Run

        chosen = {
            "image_size": 16, "resize": "none", "normalisation": "inception", "epochs": 3,
            "train_split": "train", "warmup_epochs": 1, "batch_size": 16, "lr": 1e-3,
            "evaluate_every": 1, **protocol,
        }  # fmt: skip
        common = {k: v for k, v in chosen.items() if k in Protocol.model_fields}
        kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
        return Run.model_validate({
            "suite": "test",
            "backbone": {
                "name": "tiny", "arch": "vit_tiny_patch16_224", "kwargs": kwargs, "file": "random",
            },
            "dataset": {
                "name": "tiny", "task": "classification", "prepared": tiny_data.as_posix(),
            },
            "method": {
                "name": method,
                "file": (ROOT / "baselines" / f"{method}.py").as_posix(),
                "hyperparameters": hyperparameters or {},
            },
            "protocol_name": "test",
            "protocol": common,
            "settings": {k: v for k, v in chosen.items() if k not in common},
            "results": (tmp_path / "results").as_posix(),
        })  # fmt: skip

    return make
