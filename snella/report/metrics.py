"""What a table can show: metrics and costs of a record, their unit, direction and digits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from snella.errors import unknown


@dataclass(frozen=True)
class Unit:
    """A recorded number times ``scale`` is printed in units of ``symbol`` with ``digits``."""

    symbol: str
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True)
class Quantity:
    """One number of a record.

    ``path`` leads to it in the record; metrics have none, they are looked up below the table's
    selection. Of several ``units`` the first in which the largest printed value reaches 1 is
    used. ``after_failure`` says that the number means something even if the run failed.
    """

    name: str
    title: str
    units: tuple[Unit, ...]
    higher_is_better: bool = True
    path: tuple[str, ...] = ()
    after_failure: bool = False

    def unit(self, values: Iterable[float]) -> Unit:
        """The unit in which ``values`` (as recorded) are printed."""
        largest = max(values, default=0.0)
        return next((u for u in self.units if largest * u.scale >= 1), self.units[-1])

    def read(self, record: Mapping[str, Any], selection: str) -> float | None:
        """The number in ``record``, unscaled, or None where the record does not have it."""
        node: Any = record
        for key in self.path or ("metrics", selection, self.name):
            node = node.get(key) if isinstance(node, Mapping) else None
        return None if node is None else float(node)


PERCENT = (Unit("%", 100.0, 1),)
FRACTION = (Unit("", 1.0, 4),)
COUNT = (Unit("M", 1e-6, 2), Unit("k", 1e-3, 1))
SECONDS = (Unit("s", 1.0, 1), Unit("ms", 1e3, 2))

METRICS: dict[str, Quantity] = {
    q.name: q
    for q in (
        Quantity("top1", "Top-1 accuracy", PERCENT),
        Quantity("accuracy", "Accuracy", PERCENT),
        Quantity("mdice", "mDice", FRACTION),
        Quantity("miou", "mIoU", FRACTION),
        Quantity("concept_align_clip_i", "Concept alignment (CLIP-I)", FRACTION),
        Quantity("text_align_clip_t", "Text alignment (CLIP-T)", FRACTION),
        Quantity("diversity_vendi", "Diversity (Vendi)", FRACTION),
        Quantity("clip_i", "CLIP-I", FRACTION),
        Quantity("clip_t", "CLIP-T", FRACTION),
        Quantity("dino", "DINO", FRACTION),
        Quantity("lpips", "LPIPS", FRACTION, higher_is_better=False),
    )
}

VALUES: dict[str, Quantity] = {
    q.name: q
    for q in (
        Quantity(
            "trainable",
            "Trainable parameters, head included",
            COUNT,
            higher_is_better=False,
            path=("parameters", "with_head"),
            after_failure=True,
        ),
        Quantity(
            "total",
            "Parameters of the model",
            COUNT,
            higher_is_better=False,
            path=("parameters", "total"),
            after_failure=True,
        ),
        Quantity(
            "gflops",
            "Multiply-adds of one forward pass at inference",
            (Unit("G", 1.0, 2), Unit("M", 1e3, 1)),
            higher_is_better=False,
            path=("cost", "gflops"),
        ),
        Quantity(
            "peak_memory_mb",
            "Peak memory of training",
            (Unit("MB", 1.0, 0),),
            higher_is_better=False,
            path=("cost", "peak_memory_mb"),
        ),
        Quantity(
            "train_seconds",
            "Training time of one run",
            SECONDS,
            higher_is_better=False,
            path=("cost", "train_seconds"),
        ),
        Quantity(
            "train_seconds_per_image",
            "Training time per image",
            SECONDS,
            higher_is_better=False,
            path=("cost", "train_seconds_per_image"),
        ),
        Quantity(
            "inference_seconds_per_image",
            "Inference time per image",
            SECONDS,
            higher_is_better=False,
            path=("cost", "inference_seconds_per_image"),
        ),
    )
}


def metric(name: str) -> Quantity:
    """Look up a metric; raises UserError with the closest match for an unknown one."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def value(name: str) -> Quantity:
    """Look up a cost or parameter count; raises UserError for an unknown one."""
    if name not in VALUES:
        raise unknown("value", name, VALUES)
    return VALUES[name]
