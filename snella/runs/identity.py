"""Identity: what can move a number makes a run stale, and nothing else.

A stage depends on the sources that it executes (:mod:`snella.runs.sources`), on the versions of the
libraries that these import, on the resolved settings, and on the contents of data and weights. All
is by content and never by a local path, so that two laboratories can compare identities.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from snella.files import digest_file, digest_json
from snella.models.backbone_files import RANDOM, file_digest, require, weights_path
from snella.runs.run import Run
from snella.runs.sources import PACKAGE, Sources, closure, merge_code
from snella.tasks import TaskInfo

TRAINING, EVALUATION = "snella.runs.train:train", "snella.runs.evaluate:evaluate"
_SHARED: dict[str, Any] = {
    **dict.fromkeys(("backbone", "method", "protocol", "settings", "tasks"), True),
    "dataset": {"task"},
}
Stats = tuple[tuple[Path, int, int], ...]
_digests: dict[str, str] = {}
_latest: list[tuple[tuple[object, ...], tuple[str, dict[str, str]]]] = []


def training_sources(run: Run) -> Sources:
    """What the training of a run executes; the method's ``merge`` comes after training."""
    task = run.task
    return _stage(run.method.file, task.implementation, task.name, run.tasks, TRAINING)


def evaluation_sources(run: Run) -> Sources:
    """What scoring a run's predictions executes."""
    task = run.task
    return _stage("", task.scorer, task.name, run.tasks, EVALUATION)


@cache
def _stage(method: str, entry: str, task: str, tasks: str, own: str) -> Sources:
    roots = {"snella": PACKAGE}
    if (Path(tasks) / task / "__init__.py").exists():
        roots[task] = (Path(tasks) / task).resolve()
    return closure((own, entry), roots, method)


def prepare_key(task: TaskInfo) -> dict[str, object]:
    """What preparing a family's data executes."""
    return entry_key(f"{task.prepare.__module__}:{task.prepare.__name__}")


def entry_key(entry: str) -> dict[str, object]:
    """What "module:function" of a package that is imported executes."""
    top = entry.partition(":")[0].partition(".")[0]
    folder = Path(sys.modules[top].__file__ or "").parent
    return closure([entry], {"snella": PACKAGE, top: folder}).key


def settings_digest(run: Run) -> str:
    """SHA-256 of the resolved settings; what a row's runs share of them is digested once."""
    return digest_json([*_cell(run), run.base_seed, run.seed])


def _cell(run: Run) -> tuple[str, dict[str, str]]:
    """What the seeds of a cell, which follow each other, have in common: settings and data set."""
    parts = (run.backbone, run.method, run.protocol, run.settings, run.dataset, run.tasks)
    if not (_latest and all(a is b for a, b in zip(parts, _latest[0][0], strict=True))):
        key = run.model_dump_json(include=_SHARED)
        if key not in _digests:
            _digests[key] = digest_json(run.shared())
        dataset = run.dataset.model_dump(exclude={"prepared"}, exclude_defaults=True)
        _latest[:] = [(parts, (_digests[key], dataset))]
    return _latest[0][1]


def training_key(run: Run) -> dict[str, object]:
    """The part of the training identity that is known before data and weights are there."""
    return {"settings": settings_digest(run), **training_sources(run).key}


def evaluation_key(run: Run) -> dict[str, object]:
    """The same for scoring."""
    task = run.task
    metrics = [[m.name, m.unit, m.higher_is_better] for m in task.metrics]
    key = {**evaluation_sources(run).key, "metrics": metrics}
    scoring = set(task.settings.scoring)
    if not scoring:
        return key
    settings = run.task_settings
    files = {
        name: _content(Path(path)) if path else ""
        for name, path in settings.scoring_files().items()
    }
    own = settings.model_dump(mode="json", include=scoring - files.keys())
    return {**key, "settings": digest_json(own), **({"files": files} if files else {})}


def _content(path: Path) -> str:
    """The digest of a file's or folder's contents; empty where there is none."""
    return _content_of(path, found) if (found := stats(path)) else ""


@cache
def _content_of(path: Path, stats: Stats) -> str:
    return digest_json([[p.relative_to(path).as_posix(), digest_file(p)] for p, *_ in stats])


def stats(path: Path) -> Stats:
    """Size and time of a file, or of all files of a folder."""
    parts = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = ((p, p.stat()) for p in parts)
    return tuple((p, s.st_size, s.st_mtime_ns) for p, s in found)


def code_key(run: Run) -> tuple[dict[str, object], dict[str, object], str]:
    """All that a run's job executes: training, scoring, merging."""
    return training_key(run), evaluation_key(run), merge_code(run.method.file)


def identity(run: Run, data: str, backbone: str) -> dict[str, object]:
    """All parts of a run's identity, given the digests of its data and of its weights."""
    training, evaluation, merge = code_key(run)
    trained = digest_json([training, data, backbone])
    scored = digest_json([trained, evaluation, merge])
    return {
        **code_parts(run),
        "run": scored,
        "training": trained,
        "data": data,
        "backbone": backbone,
    }


def code_parts(run: Run) -> dict[str, object]:
    """The parts of :func:`identity` that are known before data and weights are looked at."""
    training, evaluation, merge = code_key(run)
    return {**training, "evaluation": digest_json(evaluation), "merge": merge}


def backbone_digest(run: Run) -> str:
    """SHA-256 of the weights' file, or of a folder's weights; ``random`` for random weights.

    Raises :class:`~snella.errors.UserError` if there is no such file.
    """
    path = weights_path(run.backbone.entry)
    if path is None:
        return RANDOM
    require(path)
    return weights_digest(path, stats(path))


@cache
def weights_digest(path: Path, changed: Stats) -> str:
    """The same of a file or folder with such :func:`stats`."""
    return file_digest(path)
