"""A scheduler's signals end a run: at once, or at the end of what must be whole, such as a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

KINDS = (signal.SIGTERM, signal.SIGUSR1)


class Terminated(BaseException):
    """The run was asked to stop, by a scheduler's time limit or by a person.

    No ``Exception``: who catches those in order to go on must not go on now.
    """


class _Requests:
    """What was asked of this process; signals know no smaller unit."""

    asked: signal.Signals | None = None
    deferred = False


def _stop(number: int, frame: FrameType | None) -> None:
    for kind in KINDS:  # schedulers send several; a checkpoint or the record is being written now
        signal.signal(kind, signal.SIG_IGN)
    _Requests.asked = signal.Signals(number)
    if not _Requests.deferred:
        raise _terminated(_Requests.asked)


def _terminated(asked: signal.Signals) -> Terminated:
    return Terminated(
        f"stopped by {asked.name} (time limit, preemption or cancelled); "
        "rerun to resume where it stopped"
    )


@contextmanager
def terminable() -> Iterator[None]:
    """Turn the first signal within the block into :class:`Terminated`; ignore those after it."""
    _Requests.asked = None
    try:
        previous = [signal.signal(kind, _stop) for kind in KINDS]
    except ValueError:  # not in the main thread: leave signals to whoever is
        yield
        return
    try:
        yield
    finally:
        for kind, handler in zip(KINDS, previous, strict=True):
            signal.signal(kind, handler)
        _Requests.asked = None


@contextmanager
def whole() -> Iterator[None]:
    """Let a signal wait for the end of the block, which then raises :class:`Terminated`."""
    _Requests.deferred = True
    try:
        yield
    finally:
        _Requests.deferred = False
    if _Requests.asked is not None:
        raise _terminated(_Requests.asked)
