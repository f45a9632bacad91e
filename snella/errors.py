"""Errors a user can cause: each is one clear line, printed without a traceback, exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
