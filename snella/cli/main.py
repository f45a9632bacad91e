"""The command line: parse, call, and say in one line what went wrong.

Exit status 2 is a user's mistake, 1 a broken run, 130 an interruption.
"""

from __future__ import annotations

import os
import sys
import threading
from argparse import Namespace
from collections.abc import Sequence

from snella.errors import BROKEN, MISTAKE, UserError, explain, plain, record_traceback

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


# PyTorch reads it at its first large tensor: pages of 2 MB make new batches half as dear.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Figures are files; over a backend that it does not know matplotlib stumbles when it is imported.
os.environ["MPLBACKEND"] = "agg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; whatever ends it is one line on stderr, and a traceback is in the log only."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_streams()
    _speakable()
    status = _do(given)
    if arguments is None:
        _leave_threads(status)
    return status


def _do(given: Sequence[str]) -> int:
    try:
        if given[:1] == ["execute"] and (done := _hand_over(given)) is not None:
            return done
        from snella.cli.parser import OVERVIEW, parse  # imports more than handing over costs

        if not given:
            sys.stdout.write(OVERVIEW)
            return 0
        options = parse(given)  # --help and --version end here
        _check_environment()
        status = _call(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _say("interrupted; the same command resumes.", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except SystemExit:  # of the parser
        raise
    except BaseException as error:  # a method may raise what it likes
        outcome = explain(error)
        if outcome.status != MISTAKE:
            record_traceback(error)
        return _say(outcome.line, outcome.status)


def _leave_threads(status: int) -> None:
    """End a program in which a method left a thread running: Python would wait, maybe forever."""
    main_thread = threading.main_thread()
    if any(not t.daemon for t in threading.enumerate() if t is not main_thread):
        sys.stderr.write("snella: a thread that was left running is ended.\n")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _call(options: Namespace) -> int:
    try:
        return int(options.verb(options) or 0)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # which rich turns into an end
            raise error.__context__ from None
        return _say(f"the program was ended from inside (SystemExit: {error.code}).", BROKEN)


def _hand_over(given: Sequence[str]) -> int | None:
    """Let a warm worker do a run of the workflow; None where there is none."""
    from snella.jobs import worker

    return worker.call(list(given)) if worker.PLACE in os.environ else None


def _say(line: str, status: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"snella: {plain(line)}\n")
    return status


def _check_environment() -> None:
    """Refuse numbers of threads that libraries would stumble over, and a folder that is gone."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("The working directory is gone; change to one that exists.") from None
    for name in THREADS:
        value = os.environ.get(name, "")
        if value and not all(part.strip().isdecimal() and int(part) for part in value.split(",")):
            raise UserError(
                f"{name}={value!r} is no number of threads; unset it, or set it to 1 or more."
            )


def _open_streams() -> None:
    """Python has no object for a standard stream that was closed (`>&-`): give it a sink."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _speakable() -> None:
    """Where the terminal's encoding lacks a letter, print its escape instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
        if encoding != "utf8" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    raise SystemExit(main())
