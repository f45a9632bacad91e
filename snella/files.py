"""Files that are written whole or not at all, and digests of files and trees."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from snella.errors import REMEDIES, UserError

CHUNK = 1 << 24
OWN = f"{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"
"""Begins the ending of temporary files of this machine; the process number follows."""
_canonical = json.JSONEncoder(sort_keys=True).encode
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place if the block succeeds.

    What earlier processes left behind when they were killed is removed.
    Raises :class:`~snella.errors.UserError` when the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{OWN}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, glob.escape(path.name))
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "choose another place")
        raise UserError(
            f"Cannot write {str(path)[:300]}: {error.strerror or error}; {remedy}."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # which would hide what was wrong
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what processes of this machine left behind in ``folder`` when they were killed.

    Others may write to the same folder; whether theirs are alive cannot be told from here.
    """
    for old in folder.glob(f".{name}.{OWN}*"):
        number = old.name.rpartition("-")[2]
        if number.isdigit() and not _alive(int(number)):
            old.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def atomic_folder(folder: Path, *, bytes_needed: int = 0, purpose: str = "") -> Iterator[Path]:
    """Yield a new folder that takes the place of ``folder`` if the block succeeds.

    A folder with content cannot be replaced in one step: killed between the two renames, this
    leaves no folder, which the next call creates.
    Raises :class:`~snella.errors.UserError` when less than ``bytes_needed`` is free.
    """
    token = secrets.token_hex(4)
    partial = folder.with_name(f".{folder.name}.{token}.partial")
    old = folder.with_name(f".{folder.name}.{token}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder.parent).free < bytes_needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.mkdir()
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"No space left in {folder.parent}: {purpose or 'this'} needs about "
                f"{bytes_needed:,} bytes. Free some or choose another folder; nothing was written."
            ) from error
        places = (str(partial), str(partial.parent))
        own = (error.errno or 0) in REMEDIES and str(error.filename) in places
        if own or error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            remedy = REMEDIES[error.errno or 0]
            raise UserError(f"Cannot write {folder}: {error.strerror}; {remedy}.") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing and have it on the disk at the end."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk or quota only here


def try_lock(file: IO[Any]) -> bool | None:
    """Lock a file that is open for writing; whether that succeeded, None where locks do not exist.

    The kernel releases the lock when its holder ends, however it ends. On NFS it holds across
    nodes (Linux turns ``flock`` into the locks that NFS has); a node that vanishes loses it with
    its lease.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def user_path(text: str | Path) -> Path:
    """A path as users write it, ``~`` expanded; of an unknown user it stays as it is."""
    return Path(os.path.expanduser(text))


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """Indented JSON with sorted keys, as files of ours hold it."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(data: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over the names and contents of files, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name}\n".encode())
        with (folder / name).open("rb") as file:
            while chunk := file.read(CHUNK):
                total.update(chunk)
    return total.hexdigest()


def digest_tree(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below ``folder``."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return digest_files(folder, names)


def digest_json(content: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return sha256(_canonical(content).encode())
