"""Errors a user can cause: each is one clear line, printed without a traceback, exit status 2."""

from __future__ import annotations

import difflib
import textwrap
import traceback
from collections.abc import Iterable
from pathlib import Path

LINE = 300
"""Characters of an exception that a line of ours repeats; PyTorch's can fill pages."""


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do."""


class CannotMerge(Exception):
    """A method's update cannot be folded into plain weights; the message says why."""


class Unsupported(UserError):
    """A method was asked to adapt a backbone that it cannot serve; the message says why."""


class Diverged(Exception):
    """The loss became NaN or infinite; the message says at which epoch and step."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Build the error for a name that does not exist, with the closest match and all choices."""
    choices = sorted(known)
    close = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"Unknown {kind} {str(name)!r}.{hint} Known: {', '.join(choices) or 'none'}.")


def one_line(error: BaseException, file: Path | None = None) -> str:
    """An exception as one line, with the line of ``file`` that it passed through last."""
    text = textwrap.shorten(f"{type(error).__name__}: {error}", LINE, placeholder=" …")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if file is not None and Path(f.filename) == file]
    return f"{text} ({file.name}, line {lines[-1]})" if file is not None and lines else text
