"""Downloads of data sets and checkpoints whose owners publish an address: resumable, checked.

`config/downloads.yaml` lists the files of each set with mirrors, size, SHA-256 and licence; sets
that are gated or fetched by hand have one line that says how. A file appears under its name only
when its digest is right; an interrupted download goes on where it stopped.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from snella.errors import UserError, unknown

CHUNK = 1 << 20
TIMEOUT = 60
Progress = Callable[[str, int, int | None], None]


class File(BaseModel):
    """One file: addresses in order of preference, and what it must be."""

    model_config = ConfigDict(extra="forbid")

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


class Download(BaseModel):
    """A data set or checkpoint: its files and licence, or how to get it by hand."""

    model_config = ConfigDict(extra="forbid")

    title: str
    licence: str
    files: list[File] = []
    manual: str | None = None
    folder: str = ""


def load_downloads(file: Path) -> dict[str, Download]:
    """Read ``config/downloads.yaml``."""
    content: dict[str, Any] = yaml.safe_load(file.read_text()) or {}
    return {name: Download.model_validate(entry) for name, entry in content.items()}


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
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for file in entry.files:
        path = fetch(file, target, report)
        if file.unpack:
            unpack(path, target)
        paths.append(path)
    return paths


def fetch(file: File, folder: Path, report: Progress = lambda name, done, total: None) -> Path:
    """One file from the first mirror that has it, continuing a partial download."""
    path = folder / file.file_name
    if path.exists() and _problem(path, file) is None:
        return path
    partial = path.with_name(f"{path.name}.part")
    reasons = []
    for url in file.urls:
        try:
            _receive(url, partial, file, report)
        except (OSError, urllib.error.URLError) as error:
            reasons.append(f"{url}: {getattr(error, 'reason', error)}")
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
        length = response.headers.get("Content-Length")
        done = have if resumed else 0
        total = file.bytes or (done + int(length) if length else None)
        with open(partial, "ab" if resumed else "wb") as stream:
            while chunk := response.read(CHUNK):
                stream.write(chunk)
                done += len(chunk)
                report(file.file_name, done, total)
        if length and done < (have if resumed else 0) + int(length):
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
    with open(path, "rb") as stream:
        start = stream.read(64).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")) and not path.name.endswith(".html"):
        return "a web page instead of the file"
    return None


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a .zip, .tar(.gz, .bz2, .xz) or .gz into ``folder``.

    Nothing is written outside ``folder``: absolute paths, ``..``, links and devices are refused
    before anything is unpacked. Returns the topmost entries.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                names = content.namelist()
                _refuse(archive, names, folder)
                if any(info.external_attr >> 28 == 0xA for info in content.infolist()):
                    raise UserError(f"{archive} holds links, which are not unpacked.")
                content.extractall(folder)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as content:
                members = content.getmembers()
                names = [member.name for member in members]
                _refuse(archive, names, folder)
                odd = [m.name for m in members if not (m.isfile() or m.isdir())]
                if odd:
                    raise UserError(f"{archive} holds {odd[0]}, a link or device; not unpacked.")
                content.extractall(folder, filter="data")
        elif archive.suffix == ".gz":
            names = [archive.stem]
            with gzip.open(archive) as source, open(folder / archive.stem, "wb") as target:
                shutil.copyfileobj(source, target, CHUNK)
        else:
            raise UserError(f"{archive} is no archive that is unpacked here (.zip, .tar, .gz).")
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{archive} is damaged ({error}); download it again.") from error
    return [folder / top for top in dict.fromkeys(_tops(names))]


def _tops(names: list[str]) -> Iterator[str]:
    for name in names:
        parts = [part for part in PurePosixPath(name).parts if part != "."]
        if parts:
            yield parts[0]


def _refuse(archive: Path, names: list[str], folder: Path) -> None:
    root = folder.resolve()
    for name in names:
        place = (root / name.replace("\\", "/")).resolve()
        if not place.is_relative_to(root):
            raise UserError(f"{archive} would write outside {folder}: {name!r}; not unpacked.")
