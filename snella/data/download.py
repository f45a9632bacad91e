"""Downloads of data sets and checkpoints whose owners publish an address: resumable, checked.

`config/downloads.yaml` lists the files of each set with mirrors, size, SHA-256 and licence; sets
that are gated or fetched by hand have one line that says how. A file appears under its name only
when its digest is right; an interrupted download goes on where it stopped.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import yaml

from snella.data.archives import unpack, web_page_or_pointer
from snella.errors import REMEDIES, UserError, one_line, plain, unknown
from snella.files import try_lock
from snella.validation import Strict, validate

CHUNK = 1 << 20
TIMEOUT = 60
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR)
"""Errors of the disk and not of the network."""
Progress = Callable[[str, int, int | None], None]


class File(Strict):
    """One file: addresses in order of preference, and what it must be."""

    urls: list[str]
    name: str = ""
    bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None
    unpack: bool = False

    @property
    def file_name(self) -> str:
        """Its name on disk: the address's last part unless given."""
        return self.name or PurePosixPath(self.urls[0].partition("?")[0]).name


class Download(Strict):
    """A data set or checkpoint: its files and licence, or how to get it by hand."""

    title: str
    licence: str
    files: list[File] = []
    manual: str | None = None
    folder: str = ""


def load_downloads(file: Path) -> dict[str, Download]:
    """Read ``config/downloads.yaml``; raises :class:`~snella.errors.UserError` for its faults."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        entries = content.items()
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read ({plain(str(error))}); correct it.") from error
    return {str(name): validate(Download, entry, f"{file}, {name}") for name, entry in entries}


def download(
    name: str,
    known: dict[str, Download],
    folder: Path,
    report: Progress = lambda name, done, total: None,
) -> list[Path]:
    """Fetch all files of ``name`` into ``folder`` and unpack what is an archive of folders.

    Returns the files. Raises :class:`~snella.errors.UserError` for an unknown name, a set that
    must be fetched by hand, no reachable mirror, or a wrong digest.
    """
    if name not in known:
        raise unknown("download", name, known)
    entry = known[name]
    if entry.manual:
        raise UserError(f"{entry.title} cannot be fetched by a program: {entry.manual}")
    target = folder / (entry.folder or name)
    paths = []
    with _alone(target):
        for file in entry.files:
            path = fetch(file, target, report)
            if file.unpack:
                unpack(path, target)
            paths.append(path)
    return paths


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder, and keep a second download out of it, which would write the same files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".download.lock").open("w", encoding="utf-8")
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "choose another place")
        raise UserError(f"Cannot write {folder}: {error.strerror}; {remedy} (--to).") from error
    with lock:
        if try_lock(lock) is False:
            raise UserError(f"Another process is downloading into {folder}; wait for it to end.")
        yield
        Path(lock.name).unlink(missing_ok=True)


def fetch(file: File, folder: Path, report: Progress = lambda name, done, total: None) -> Path:
    """One file from the first mirror that has it, continuing a partial download."""
    path = folder / file.file_name
    partial = path.with_name(f"{path.name}.part")
    for place in (path, partial):
        if place.is_dir():
            raise UserError(f"{place} is a folder, where a file is needed; move it away.")
    if path.exists() and _problem(path, file) is None:
        return path
    reasons = []
    for url in file.urls:
        try:
            _receive(url, partial, file, report)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno in DISK:
                raise UserError(
                    f"Cannot write {partial}: {error.strerror}; {REMEDIES[error.errno]}."
                ) from error
            reasons.append(f"{url}: {_reason(error)}")
            continue
        problem = _problem(partial, file)
        if problem is None:
            os.replace(partial, path)
            return path
        partial.unlink(missing_ok=True)
        reasons.append(f"{url}: {problem}")
    raise UserError(
        f"{file.file_name} could not be fetched ({'; '.join(reasons)}); get it by hand and put it "
        f"into {folder}."
    )


def _reason(error: Exception) -> str:
    """Why an address gave nothing, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"status {error.code}, {plain(str(error.reason)).partition('.')[0]}"
    return plain(str(getattr(error, "reason", ""))) or one_line(error)


def _receive(url: str, partial: Path, file: File, report: Progress) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    if file.bytes is not None and have >= file.bytes:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send
            raise
        return
    with response:
        resumed = have and response.status == 206
        length = response.headers.get("Content-Length", "")
        start = done = have if resumed else 0
        total = file.bytes or (done + int(length) if length.isdecimal() else None)
        with open(partial, "ab" if resumed else "wb") as stream:
            while chunk := response.read(CHUNK):
                stream.write(chunk)
                done += len(chunk)
                report(file.file_name, done, total)
                if file.bytes is not None and done > file.bytes:
                    return  # another file, which the caller refuses
        if length.isdecimal() and done < start + int(length):
            raise OSError("the connection ended early; the next call goes on from there")


def _problem(path: Path, file: File) -> str | None:
    """Why a file is not the published one, or None."""
    size = path.stat().st_size
    if file.bytes is not None and size != file.bytes:
        return f"{size:,} bytes instead of {file.bytes:,}"
    for kind, expected in (("sha256", file.sha256), ("md5", file.md5)):
        if expected:
            with open(path, "rb") as stream:
                found = hashlib.file_digest(stream, kind).hexdigest()
            if not found.startswith(expected):
                return f"{kind} begins {found[:8]}, not {expected[:8]}"
    return web_page_or_pointer(path)
