"""Scoring: predictions on disk meet the sealed targets; no model is ever seen here.

Each look at the model left its predictions in a folder. All are scored, under every selection rule
that the run allows, so that one record shows how much looking at the test set adds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from snella.data.prepared import Prepared
from snella.errors import UserError
from snella.files import atomic
from snella.runs.run import Run
from snella.tasks.base import Metric, Score

SCORES = "scores.npz"
Scores = dict[str, Score]


@dataclass
class Evaluation:
    """Metrics, and their spread over groups, by selection rule; scores per example by name.

    ``warnings`` are those of the last epoch's scores.
    """

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    per_example: dict[str, np.ndarray] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def require_files(run: Run) -> None:
    """Check that all files which scoring reads are there, so that no training is done in vain.

    Raises :class:`~snella.errors.UserError` that names the setting.
    """
    for setting, path in run.task_settings.scoring_files().items():
        if path is None:
            raise UserError(
                f"Scoring {run.dataset.task} needs `{setting}:`, a local file; set it in protocol "
                f"{run.protocol_name!r}."
            )
        if not Path(path).exists():
            raise UserError(
                f"Scoring needs `{setting}: {path}`, which does not exist; put it there, or "
                f"correct protocol {run.protocol_name!r}."
            )


def evaluate(run: Run, data: Prepared, looks: Mapping[int, Mapping[str, Path]]) -> Evaluation:
    """Score predictions: ``looks[epoch][split]`` is a folder of them, split "test" and maybe "val".

    The earliest of equally good epochs is taken.
    Raises :class:`~snella.errors.UserError` for predictions that are missing or do not fit, and for
    a scorer that does not keep to the metrics of its task.
    """
    info = run.task
    scorer = info.scorer_class()(data, run.task_settings)

    def score(folder: Path, split: str) -> Scores:
        if not folder.is_dir():
            raise UserError(f"There are no predictions in {folder}; train the run again.")
        found = scorer.score(folder, split)
        _require(info.metrics if split == "test" else (info.primary,), found, info.name)
        return found

    test = {epoch: score(folders["test"], "test") for epoch, folders in looks.items()}
    chosen = {"last": max(test), "best-test": best(test, info.primary)}
    if all("val" in folders for folders in looks.values()):
        val = {epoch: score(folders["val"], "val") for epoch, folders in looks.items()}
        chosen["val"] = best(val, info.primary)
    found = Evaluation()
    for rule, epoch in chosen.items():
        _take(found, rule, epoch, test[epoch])
    return found


def _require(metrics: Iterable[Metric], scores: Scores, task: str) -> None:
    """Refuse scores that a record could not hold: a metric is missing, or out of its range."""
    for metric in metrics:
        if metric.name not in scores:
            found = ", ".join(scores) or "nothing"
            raise UserError(
                f"The scorer of task {task} gives no {metric.name!r} (it gives {found}), which the "
                "metrics of its TASK name; correct one of the two."
            )
        value = scores[metric.name].value
        if not (math.isfinite(value) and metric.lower <= value <= metric.upper):
            raise UserError(
                f"The scorer of task {task} gives {metric.name} = {value}, outside of "
                f"{metric.lower} to {metric.upper}; correct it, or the bounds of the Metric."
            )


def best(scores: Mapping[int, Scores], metric: Metric) -> int:
    """The earliest epoch with the best value of ``metric``."""
    sign = 1 if metric.higher_is_better else -1
    return max(sorted(scores), key=lambda epoch: sign * scores[epoch][metric.name].value)


def write_scores(folder: Path, per_example: Mapping[str, np.ndarray]) -> str | None:
    """Write the scores per example, ``<selection>/<metric>`` (N,); return the file's name."""
    if not per_example:
        return None
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {k: v.astype(np.float32) for k, v in sorted(per_example.items())}
    np.savez_compressed(buffer, **arrays)
    with atomic(folder / SCORES) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return SCORES


def _take(found: Evaluation, rule: str, epoch: int, scores: Scores) -> None:
    found.metrics[rule] = {"epoch": epoch, **{name: s.value for name, s in scores.items()}}
    groups = {name: s.per_group for name, s in scores.items() if s.per_group}
    if groups:
        found.groups[rule] = groups
    if rule == "last":
        found.warnings = list(dict.fromkeys(w for s in scores.values() for w in s.warnings))
    for name, score in scores.items():
        if score.per_example is not None:
            found.per_example[f"{rule}/{name}"] = score.per_example
