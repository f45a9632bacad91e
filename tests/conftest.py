"""Shared fixtures: the repository's root as working directory, one thread, a tiny data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """A prepared data set of 40/16/24 images, 4 classes told apart by their mean colour."""
    from snella.data.prepared import write_prepared

    rng = np.random.default_rng(0)

    def split(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(n, dtype=np.int64) % 4
        images = rng.integers(0, 100, (n, 16, 16, 3)) + 40 * labels[:, None, None, None]
        return images.astype(np.uint8), labels

    splits = {"train800": split(40), "val200": split(16), "test": split(24)}
    folder = tmp_path / "data" / "prepared" / "tiny"
    write_prepared(folder, splits, info={"name": "tiny", "source": "test", "num_classes": 4})
    return folder


@pytest.fixture
def settings(tiny_data: Path):
    """Resolved settings of one run on ``tiny_data``, as a function of what differs."""

    def make(method: str = "full", hyperparameters: dict | None = None, **protocol) -> dict:
        from snella.runs.protocol import Protocol

        chosen = {
            "image_size": 16, "resize": "none", "normalisation": "inception", "epochs": 3,
            "train_split": "train800", "warmup_epochs": 1, "batch_size": 16, "lr": 1e-3,
            "evaluate_every": 1, **protocol,
        }  # fmt: skip
        kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
        return {
            "suite": "test",
            "backbone": {
                "name": "tiny", "arch": "vit_tiny_patch16_224", "kwargs": kwargs, "file": None,
            },
            "dataset": {
                "name": "tiny", "task": "classification", "prepared": tiny_data.as_posix(),
            },
            "method": {
                "name": method,
                "file": (ROOT / "baselines" / f"{method}.py").as_posix(),
                "hyperparameters": hyperparameters or {},
            },
            "protocol": {"name": "test", **Protocol(**chosen).model_dump()},
            "base_seed": 0,
            "seed": 0,
        }  # fmt: skip

    return make
