"""Runs on disk: which one a name means, the records of a tree, and failures to be tried again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from snella.errors import UserError, ascii_name, closest, some
from snella.files import user_path
from snella.records import FAILURE, FILES, FINISHED, RECORD, read_record
from snella.results import record_folders
from snella.suite.status import is_running

LISTED = 5


def find_run(results: Path, name: str) -> Path:
    """The folder of a run: a path to it, or its name below ``results/runs``.

    A name may leave parts out as long as it fits one run: ``digits/lora-8/seed0``. Raises
    :class:`~snella.errors.UserError` with the closest name if none fits, or with those that do.
    """
    folder = user_path(name)
    if folder.name in (*FILES, "config.json"):
        folder = folder.parent
    if _holds_run(folder):
        return folder
    root = results / "runs"
    if ".." not in Path(name).parts and not Path(name).is_absolute() and _holds_run(root / name):
        return root / name
    known = {f.relative_to(root).as_posix(): f for f in record_folders(results)} if (
        root.is_dir()) else {}  # fmt: skip
    wanted = [part for part in name.split("/") if part]
    fitting = [key for key in known if _within(wanted, key.split("/"))]
    if len(fitting) == 1:
        return known[fitting[0]]
    if fitting:
        raise UserError(
            f"{ascii_name(name)} fits {len(fitting)} runs: {some(fitting, LISTED)}; name one."
        )
    close = closest(name, known)
    hint = f" Did you mean {close!r}?" if close else ""
    raise UserError(f"There is no folder {ascii_name(name)}, and no such run below {root}.{hint}")


def _holds_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*FILES, "config.json"))


def _within(wanted: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether ``wanted`` are some of ``parts``, in the same order."""
    rest = iter(parts)
    return bool(wanted) and all(part in rest for part in wanted)


def read_tree(place: Path) -> dict[str, dict[str, Any]]:
    """The records of a results folder, or of any folder of runs, by the run's place below it.

    A run's own folder is one record without a name. Raises :class:`~snella.errors.UserError` for a
    record that cannot be read.
    """
    if any((place / name).is_file() for name in FILES):
        return {"": read_record(place) or {}}
    root = place / "runs" if (place / "runs").is_dir() else place
    found = {f.relative_to(root).as_posix(): read_record(f) for f in record_folders(place)}
    return {name: record for name, record in found.items() if record is not None}


def failed_runs(results: Path) -> list[Path]:
    """The folders of all runs whose last try broke."""
    return [folder for folder in record_folders(results) if (folder / FAILURE).exists()]


def forget_failures(
    folders: Iterable[Path], *, diverged: bool = False
) -> tuple[list[Path], list[Path]]:
    """Remove the marks of broken tries, so that the workflow tries these cells again.

    With ``diverged`` the record of a run that diverged goes too. A finished result stays, and so
    does a checkpoint, from which the next try goes on. Returns the folders that were cleared, and
    those left alone because a process is working on them.
    """
    cleared, busy = [], []
    for folder in folders:
        if is_running(folder):
            busy.append(folder)
            continue
        record = read_record(folder) if diverged else None
        names = (RECORD, FINISHED) if record and record["status"] == "diverged" else ()
        marks = [mark for name in (FAILURE, *names) if (mark := folder / name).exists()]
        for mark in marks:
            mark.unlink(missing_ok=True)
        if marks:
            cleared.append(folder)
    return cleared, busy
