"""Unpacking archives: whole or not at all, and nothing outside the folder."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from snella.errors import REMEDIES, UserError, ascii_name
from snella.files import CHUNK

BOMB_BYTES, BOMB_RATIO = 2**30, 200
"""What unpacks to more, and to so many times its size, is no data set."""
DAMAGE = (
    EOFError, OSError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile,
    tarfile.TarError, zlib.error, lzma.LZMAError,
)  # fmt: skip


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a .zip, .tar(.gz, .bz2, .xz) or .gz into ``folder``; return the topmost entries.

    Raises :class:`~snella.errors.UserError`, with nothing unpacked, for an archive that is damaged,
    encrypted or of another kind, for absolute paths, ``..``, links and devices, for two files of
    one name, and for what would not fit on the disk.
    """
    partial = folder / f".{archive.name}.unpacking"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        with _explained(archive, folder):
            partial.mkdir()
            _extract(archive, partial, _Checks(archive, folder))
            return _move(archive, partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def web_page_or_pointer(path: Path) -> str | None:
    """What a download often holds in place of the file, by its first bytes; else None."""
    with path.open("rb") as stream:
        start = stream.read(64).lstrip().lower()
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the file"
    if start.startswith(b"<") and path.name.removesuffix(".part")[-5:] not in (".html", ".htm"):
        return "a web page instead of the file"
    return None


class _Checks:
    """Looks at an archive's members, in their order, before any is unpacked."""

    def __init__(self, archive: Path, folder: Path) -> None:
        self.archive, self.folder, self.root = archive, folder, folder.resolve()
        self.room = shutil.disk_usage(folder).free
        self.total, self.files = 0, set[str]()

    def member(self, name: str, size: int, is_file: bool) -> None:
        """Raise :class:`~snella.errors.UserError` unless the member may be unpacked."""
        if not name.isprintable():
            raise self.refused(f"holds a name with control characters, {ascii_name(name)}")
        place = (self.root / name.replace("\\", "/")).resolve()
        if not place.is_relative_to(self.root):
            raise self.refused(f"would write outside {self.folder}: {ascii_name(name)}")
        if "\\" in name:  # of folders, by a program of Windows
            raise self.refused(f"holds a name with backslashes, {ascii_name(name)}")
        if is_file:
            key = PurePosixPath(name).as_posix()
            if key in self.files:
                raise self.refused(f"holds two files called {ascii_name(name)}")
            self.files.add(key)
        self.add(size)

    def add(self, size: int) -> None:
        """Count bytes to be written; raises as soon as they are too many."""
        self.total += size
        packed = self.archive.stat().st_size
        if self.total > max(BOMB_BYTES, BOMB_RATIO * packed):
            raise self.refused(f"has {packed:,} bytes that unpack to {self.total:,} and more")
        if self.total > self.room:
            raise UserError(
                f"No space left in {self.folder}: {self.archive} unpacks to {self.total:,} bytes "
                f"or more, {self.room:,} are free; make room or choose another place."
            )

    def refused(self, reason: str) -> UserError:
        """The error for an archive that may be whole, but is not unpacked."""
        return UserError(f"{self.archive} {reason}; it was not unpacked.")


def _extract(archive: Path, partial: Path, checks: _Checks) -> None:
    if zipfile.is_zipfile(archive):
        with _zip(archive, checks) as content:
            for info in content.infolist():
                if info.flag_bits & 1:
                    raise checks.refused("is encrypted; unpack it by hand")
                if (info.external_attr >> 28) not in (0, 4, 8):  # a folder's or a file's
                    raise checks.refused(f"holds {ascii_name(info.filename)}, a link or device")
                checks.member(info.filename, info.file_size, not info.is_dir())
            content.extractall(partial)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as content:
            for member in content:
                if not (member.isfile() or member.isdir()):
                    raise checks.refused(f"holds {ascii_name(member.name)}, a link or device")
                checks.member(member.name, member.size, member.isfile())
            content.extractall(partial, filter="data")
    elif archive.suffix == ".gz":
        checks.member(archive.stem, 0, True)
        with gzip.open(archive) as source, (partial / archive.stem).open("wb") as target:
            while chunk := source.read(CHUNK):
                checks.add(len(chunk))
                target.write(chunk)
    else:
        raise _no_archive(archive)


def _zip(archive: Path, checks: _Checks) -> zipfile.ZipFile:
    """A zip file, whose names are UTF-8 also where it does not say so, as macOS writes them."""
    try:
        return zipfile.ZipFile(archive, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        raise checks.refused("holds names in an unknown encoding; unpack it by hand") from None


def _no_archive(archive: Path) -> UserError:
    reason = web_page_or_pointer(archive)
    if reason is None:
        with archive.open("rb") as stream:
            cut = stream.read(2) == b"PK"
        reason = "cut short" if cut else None
    if reason is not None:
        return UserError(f"{archive} is damaged ({reason}); delete it and download it again.")
    return UserError(
        f"{archive} is no archive that is unpacked here (.zip, .tar, .gz); unpack it by hand."
    )


@contextmanager
def _explained(archive: Path, folder: Path) -> Iterator[None]:
    """Tell what the disk refuses from what is wrong with the archive."""
    try:
        yield
    except NotImplementedError as error:
        raise UserError(f"{archive}: {error}; unpack it by hand.") from error
    except DAMAGE as error:
        remedy = REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
        if isinstance(error, OSError) and remedy:
            place = error.filename2 or error.filename or folder
            raise UserError(
                f"Cannot unpack {archive}: {str(place)[-200:]}: {error.strerror}; {remedy}."
            ) from error
        raise UserError(
            f"{archive} is damaged ({error}); delete it and download it again."
        ) from error


def _move(archive: Path, partial: Path, folder: Path) -> list[Path]:
    """Put what was unpacked into its place; files of an earlier unpacking are replaced."""
    tops = sorted(partial.iterdir())
    if not tops:
        raise UserError(f"{archive} holds no file; delete it and download it again.")
    for path in sorted(partial.rglob("*")):
        place = folder / path.relative_to(partial)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)
    return [folder / top.name for top in tops]
