"""What a check found, and the exceptions by which it says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from snella.errors import Unsupported, UserError, one_line

ALL = "all"
"""The family of findings that concern the method as a whole."""


class Failure(Exception):
    """A method does not pass a check: one line that says what is wrong and what to do."""


class Note(Exception):
    """A check cannot demand something of this method: the reason, and what the cell says."""

    def __init__(self, reason: str, text: str = "note") -> None:
        super().__init__(reason)
        self.text = text


@dataclass(frozen=True)
class Finding:
    """The outcome of one check on one backbone family, or on ``ALL`` at once.

    ``text`` fits a report's cell; ``detail`` is one line for the failures and notes below it.
    """

    check: str
    family: str
    status: Literal["passed", "noted", "failed"]
    text: str
    detail: str = ""


def finding(check: str, family: str, file: Path, call: Callable[[], str]) -> Finding:
    """Turn what ``call`` returns or raises into a finding; ``file`` is the method's."""
    try:
        return Finding(check, family, "passed", call())
    except Note as note:
        return Finding(check, family, "noted", note.text, str(note))
    except Unsupported as reason:
        return Finding(check, family, "noted", "refused", str(reason))
    except (Failure, UserError) as failure:
        return Finding(check, family, "failed", "FAILED", str(failure))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a method may raise what it likes
        return Finding(check, family, "failed", "FAILED", one_line(error, file))


def some(names: Iterable[str]) -> str:
    """The first of ``names`` and how many more there are."""
    found = list(names)
    if not found:
        return ""
    return found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"
