"""From a data set's entry in the configuration to its prepared folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from snella.errors import UserError, unknown
from snella.files import digest_json, user_path, write_json
from snella.jobs.inputs import faulty
from snella.runs.identity import prepare_key
from snella.runs.run import Run
from snella.suite.checks import check_dataset
from snella.suite.config import Config
from snella.suite.plan import prepared_folder
from snella.suite.status import Inputs
from snella.tasks import find_task
from snella.tasks.base import DatasetSpec


def prepare_dataset(config: Config, name: str, *, missing_only: bool = False) -> Path:
    """Read or render the data set ``name``, check it, and write its prepared folder.

    With ``missing_only`` nothing is done while the entry, the files behind it and the code that
    reads them are those that the folder was prepared from.
    Raises :class:`~snella.errors.UserError` if it is unknown, not configured or damaged.
    """
    if name not in config.datasets:
        raise unknown("data set", name, config.datasets)
    if problem := faulty(config, name):  # before all files of a wrong folder are looked at
        raise UserError(problem)
    folder = prepared_folder(config, name)
    spec = config.datasets[name]
    origin = origin_of(config, name)
    mark = folder.with_name(f".{name}.origin.json")
    if missing_only and (folder / "manifest.json").exists() and _read(mark) == origin:
        return folder
    find_task(spec.task, config.tasks).prepare(name, spec, folder)
    shutil.rmtree(folder.with_name(f".{name}.pixels"), ignore_errors=True)  # resized, of the old
    write_json(mark, origin)
    return folder


def inputs_of(config: Config, runs: Iterable[Run]) -> Inputs:
    """What runs read, for comparing their records with it.

    Prepared data count as moved if their entry or files are others than those they were made from.
    Another reading code is none of it: whether it reads otherwise shows when it has read. Files
    that are gone are none either, for nothing can be prepared from them.
    """
    names = {run.dataset.name for run in runs}
    return Inputs({name for name in names if moved(config, name) & {"entry", "files"}})


def moved(config: Config, name: str) -> set[str]:
    """In which parts a prepared folder's origin is no longer that; none where its data are gone."""
    path = config.datasets[name].path
    made = _read(prepared_folder(config, name).with_name(f".{name}.origin.json"))
    if made is None or (path is not None and not user_path(path).exists()):
        return set()
    now = origin_of(config, name)
    return {part for part in now if made.get(part) != now[part]}


def warnings_of(folder: Path) -> list[str]:
    """What the manifest of a prepared folder says is odd about the data, a sentence each."""
    manifest = _read(folder / "manifest.json") or {}
    return [str(warning) for warning in manifest.get("warnings", ())]


def origin_of(config: Config, name: str) -> dict[str, Any]:
    """What a prepared folder is made from: its entry, its files and the code."""
    check_dataset(config, name)
    spec = config.datasets[name]
    info = find_task(spec.task, config.tasks)
    return {
        "entry": spec.model_dump(mode="json", exclude={"label"}),
        "files": source_stamp(spec, info.sources(spec)),
        "code": prepare_key(info),
    }


def source_stamp(spec: DatasetSpec, named: list[Path]) -> str:
    """A digest over names, sizes and times of a data set's files: an image replaced is noticed."""
    seen = [(p.as_posix(), *_stat(p)) for p in named]
    if spec.path is not None and Path(spec.path).is_dir():
        seen += sorted(_walk(Path(spec.path)))
    return digest_json(seen)


def _walk(folder: Path) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root) / name
            found.append((path.relative_to(folder).as_posix(), *_stat(path)))
    return found


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (-1, -1)
    return found.st_size, found.st_mtime_ns


def _read(mark: Path) -> Any:
    try:
        return json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
