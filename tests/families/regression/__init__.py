"""Where is the bright spot? Two numbers per image."""

from pathlib import Path
from typing import Any

import numpy as np

from snella.tasks import DatasetSpec, Metric, TaskInfo, TaskSettings


class Settings(TaskSettings):
    """The loss is the mean absolute error to the power ``power``."""

    power: float = 2.0


def prepare(name: str, spec: DatasetSpec, folder: Path) -> dict[str, Any]:
    """Render spots on noise: images (N, 32, 32, 3) and places (N, 2) in [0, 1]."""
    from snella.data.prepared import write_prepared

    rng = np.random.default_rng(0)
    grid = (np.arange(32) + 0.5) / 32

    def split(n: int) -> dict[str, np.ndarray]:
        place = rng.random((n, 2)).astype(np.float32)
        far = (grid[None, :, None] - place[:, 0, None, None]) ** 2
        far = far + (grid[None, None, :] - place[:, 1, None, None]) ** 2
        image = rng.integers(0, 30, (n, 32, 32, 3)) + 220 * np.exp(-far[..., None] / 0.02)
        return {"image": image.astype(np.uint8), "place": place}

    splits = {"train": split(96), "val": split(32), "test": split(64)}
    return write_prepared(folder, splits, sealed=("place",), info={"source": "formula"})


TASK = TaskInfo(
    name="regression",
    title="Regression",
    metrics=(
        Metric("rmse", "RMSE", unit="", higher_is_better=False, upper=2**0.5),
        Metric("near", "Within a tenth"),
    ),
    settings=Settings,
    prepare=prepare,
    sources=lambda spec: [],
    implementation="regression.task:Regression",
    scorer="regression.score:Distance",
    families=("vit",),
    gallery="regression.gallery:gallery",
    made=frozenset({"rendered"}),
)
