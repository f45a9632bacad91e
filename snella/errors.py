"""Errors, and the one place that turns any exception into the line that a user reads.

A user's mistake is one clear line and exit status 2; anything else that ends a command is a broken
run, status 1, whose traceback is in a log and never on the screen.
"""

from __future__ import annotations

import difflib
import errno
import os
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn

LINE = 300
"""Characters of an exception that a line of ours repeats; PyTorch's can fill pages."""
CHOICES, CLOSEST = 25, 10
"""Names that a message lists of those that there are; of more, so many of the closest."""
LISTED = {
    "method": "`snella methods` lists them",
    "data set": "`snella datasets` lists them",
    "download": "`snella data download` lists them",
    "suite": "a shipped one is a file of config/suites/",
    "backbone": "the shipped ones stand in config/backbones.yaml",
    "table": "the shipped ones stand in config/tables/",
    "timm architecture": "`timm.list_models()` lists them",
}
"""Where all names of a kind can be seen."""
LONGEST = 1500
"""Characters of a whole line; what a user wrote can be in it."""
LOG = Path("logs/snella.log")
LOG_BYTES = 2**20
MISTAKE, BROKEN = 2, 1


class UserError(Exception):
    """Something the user can correct. The message says what is wrong, where, and what to do."""


class CannotMerge(Exception):
    """A method's update cannot be folded into plain weights; the message says why."""


class Unsupported(UserError):
    """A method was asked to adapt a backbone that it does not support; the message says why."""


class Diverged(Exception):
    """The loss became NaN or infinite; the message says at which epoch and step."""


@dataclass(frozen=True)
class Outcome:
    """What a user reads about an exception, and the exit status."""

    line: str
    status: int


REMEDIES = {
    errno.EACCES: "give yourself access or choose another place",
    errno.EPERM: "give yourself access or choose another place",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.ENOSPC: "make room or choose another place",
    errno.EDQUOT: "your quota is used up; make room or choose another place",
    errno.ENOENT: "correct the path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "a part of the path is a file; correct it",
    errno.EEXIST: "a file stands where a folder is needed; move it or choose another place",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ELOOP: "links lead in a circle; correct them",
    errno.EIO: "the disk reports a fault; choose another place",
    errno.ESTALE: "the network disk lost the file; try again, or choose another place",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f) or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


PATHS = ("Symlink loop", "embedded null byte")
"""What Python calls names that no file can have, where it raises no ``OSError``."""


def explain(error: BaseException) -> Outcome:
    """The line and the exit status for any exception that ends a command."""
    if isinstance(error, UserError):
        return Outcome(_cut(plain(str(error))), MISTAKE)
    if isinstance(error, UnicodeDecodeError):
        where = f"byte {error.start}, {error.reason}"
        return Outcome(f"A text file is not UTF-8 ({where}); save it as UTF-8.", MISTAKE)
    if isinstance(error, UnicodeEncodeError):
        word = ascii(error.object)[:LINE]
        return Outcome(f"{word} holds letters that cannot be written; rename it.", MISTAKE)
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package not in ("", "snella"):
        line = f"The Python package {package!r} is missing; install it (`pip install {package}`)"
        return Outcome(f"{line}, or everything with `make environment`.", MISTAKE)
    if isinstance(error, OSError) and error.errno in REMEDIES:
        place = error.filename2 or error.filename
        where = f"Cannot use {str(place)[:LINE]}: " if place is not None else ""
        remedy = REMEDIES[error.errno]
        return Outcome(plain(f"{where}{error.strerror}; {remedy}."), MISTAKE)
    if isinstance(error, RuntimeError | ValueError) and str(error).startswith(PATHS):
        return Outcome(plain(f"{str(error)[:LINE]}; correct the path."), MISTAKE)
    if isinstance(error, EOFError) and str(error).startswith("marshal"):  # Python's words
        line = "A compiled Python file was cut short, as by a full disk; remove the folders"
        return Outcome(f"{line} `__pycache__` of this package and its environment.", MISTAKE)
    if isinstance(error, MemoryError):
        return Outcome("Out of memory; use smaller batches or a machine with more.", BROKEN)
    place = _last_frame(error)
    text = f"{one_line(error)}{place}. The traceback is in {LOG}; `snella doctor` lists what a"
    return Outcome(plain(f"internal error: {text} report of this needs."), BROKEN)


def record_traceback(error: BaseException, log: Path = LOG) -> None:
    """Append the traceback of ``error`` to the log; a log that cannot be written is no error."""
    stamp = datetime.now().isoformat(timespec="seconds")
    text = "".join(traceback.format_exception(error))
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        grown = log.exists() and log.stat().st_size > LOG_BYTES
        with log.open("w" if grown else "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{stamp}\n{text}\n")
    except OSError:
        return


def plain(text: str) -> str:
    """``text`` on one line, without characters that would move a terminal's cursor."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _cut(line: str) -> str:
    """The line without its middle where it is long: its end says what to do."""
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 500]} … {line[-497:]}"


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Build the error for a name that does not exist, with the closest match and the choices."""
    choices = sorted(known)
    near = _near(str(name), choices, CLOSEST)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if len(choices) <= CHOICES:
        rest = f"Known: {', '.join(choices) or 'none'}"
    elif near:
        rest = f"Closest of {len(choices)}: {', '.join(near)}"
    else:
        where = next((f"; {text}" for of, text in LISTED.items() if kind.startswith(of)), "")
        rest = f"None of the {len(choices)} is like it{where}"
    return UserError(f"Unknown {kind} {ascii_name(name)}.{hint} {rest}.")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of several names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def closest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like ``name``; case, hyphens and underscores count as equal."""
    return next(iter(_near(name, choices, 1)), None)


def _near(name: str, choices: Iterable[str], count: int) -> list[str]:
    folded = {choice.casefold().replace("-", "_"): choice for choice in choices}
    wanted = name.casefold().replace("-", "_")[:200]
    return [folded[found] for found in difflib.get_close_matches(wanted, folded, n=count)]


def ascii_name(name: object) -> str:
    """A name in quotes, cut where it is long."""
    text = repr(str(name))
    return text if len(text) <= 100 else f"{text[:90]}…'"


def one_line(error: BaseException, *places: Path) -> str:
    """An exception as one line, with the line that it passed through last in ``places``.

    These are files or folders, the likeliest first.
    """
    try:
        message = str(error)
    except Exception:  # whose class has a fault of its own
        message = "without a message"
    text = textwrap.shorten(f"{type(error).__name__}: {message}", LINE, placeholder=" …")
    frames = [
        (Path(f.filename).resolve(), f.lineno) for f in traceback.extract_tb(error.__traceback__)
    ]
    for place in places:
        passed = [frame for frame in frames if frame[0].is_relative_to(place.resolve())]
        if passed:
            return f"{text} ({passed[-1][0].name}, line {passed[-1][1]})"
    return text


def _last_frame(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


@contextmanager
def no_silent_end() -> Iterator[None]:
    """Make ``os._exit`` an error in this process: who calls it would leave status 0, no record."""
    end, process = os._exit, os.getpid()

    def refused(status: int) -> NoReturn:
        if os.getpid() != process:  # a child's own affair
            end(status)
        raise SystemExit(f"os._exit({status})")

    os._exit = refused
    try:
        yield
    finally:
        os._exit = end
