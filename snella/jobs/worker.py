"""Warm workers: run many short jobs without paying torch's import for each.

Importing torch, timm and peft takes longer than training one cell of the quick suite. A server
imports them once and forks a child per job; ``snella execute --warm`` is a client that hands
over its arguments, environment and output streams and waits. One job stays one process: a
crash, a kill or a memory leak is contained, and if the client dies its job is ended. The
server ends itself when it has been idle for a while. It never touches CUDA before forking.
Inside a cluster job, whose limits must hold, only a server of that very job is used: one that
:func:`start_in_job` started because the job runs several cells.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import IO, NoReturn

from snella.files import try_lock

IDLE_SECONDS = 20
START_SECONDS = 90
PRELOAD = (
    "torch",
    "torch.utils.flop_counter",
    "timm",
    "peft",
    "snella.cli.parser",
    "snella.jobs.cells",
    "snella.runs.execute",
)
MESSAGE_BYTES = 2**20
SHORT_PLACES = ("/tmp", "/var/tmp")
LONGEST_PLACE = 72
"""Bytes of a temporary folder's path; a socket's whole path may have 107."""
Command = Callable[[list[str]], int]
"""Runs the arguments of ``snella`` and returns the exit status."""


def available() -> bool:
    """Whether a warm worker may be used here: in a cluster job only the job's own."""
    if not (hasattr(os, "fork") and hasattr(socket, "send_fds")):
        return False
    return not _in_job() or _serving()


def _in_job() -> bool:
    return any(name in os.environ for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"))


def start_in_job(command: Sequence[str]) -> None:
    """Start a server in a cluster job of several cells, as Snakemake's ``command`` tells.

    It belongs to the whole job: one that a cell started would end with that cell's step.
    """
    marker = "--target-jobs"
    if "SLURM_JOB_ID" in os.environ and marker in command:
        members = list(takewhile(_is_value, command[command.index(marker) + 1 :]))
        if len(members) > 1 and not _serving():
            _spawn()


def start_early() -> None:
    """Start a server before the first job asks for it, while data are prepared."""
    if available() and not _in_job() and not _serving():
        _spawn()


def _is_value(argument: str) -> bool:
    return not argument.startswith("-")


def call(arguments: list[str]) -> int | None:
    """Run ``snella ARGUMENTS`` in a warm worker and return its exit status.

    None if no server could be reached, or the worker was lost: the caller does the work itself.
    """
    connection = _connect() or _await(None if _in_job() else _spawn())
    if connection is None:
        return None
    with connection:
        request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
        message = json.dumps(request).encode()
        header = len(message).to_bytes(8, "big")
        socket.send_fds(connection, [header], [1, 2])
        connection.sendall(message)
        try:
            reply = connection.recv(16)
        except OSError:
            return None
    return int(reply) if reply else None


def _address() -> Path:
    """A socket of this user, interpreter, cluster job and state of the package's source."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    stamp = [sys.executable, os.environ.get("SLURM_JOB_ID", "")]
    stamp += [f"{p}@{p.stat().st_mtime_ns}" for p in sources]
    name = hashlib.sha256("\n".join(stamp).encode()).hexdigest()[:16]
    return _folder() / f"{name}.sock"


def _folder() -> Path:
    """A folder of this user whose path leaves room for a socket's name."""
    places = (tempfile.gettempdir(), *SHORT_PLACES)
    fitting = [p for p in places if len(os.fsencode(p)) <= LONGEST_PLACE] or places[-1:]
    folder = Path(fitting[0]) / f"snella-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def _connect() -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(_address()))
    except OSError:
        connection.close()
        return None
    return connection


def _serving() -> bool:
    """Whether a server is there or about to be: it holds its lock from its first moment."""
    try:
        with open(_address().with_suffix(".lock"), "a") as lock:
            return try_lock(lock) is False
    except OSError:
        return False


def _spawn() -> subprocess.Popen[bytes]:
    """Start a server of this very package; it gives way if there is one."""
    null = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-m", "snella.cli", "worker"],
        cwd=Path(__file__).parents[2],  # `-m` would prefer a checkout that happens to be here
        stdin=null,
        stdout=null,
        stderr=null,
        start_new_session=True,
    )


def _await(server: subprocess.Popen[bytes] | None) -> socket.socket | None:
    """Wait until a server listens; None if there is none or it does not come."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        connection = _connect()
        if connection is not None:
            return connection
        ended = server is None or server.poll() is not None  # it gives way to one that is first
        if ended and not _serving():
            return None
        time.sleep(0.1)
    return None


def serve(command: Command) -> None:
    """Listen until idle; ``command`` runs in one forked child per connection."""
    address = _address()
    with open(address.with_suffix(".lock"), "w") as lock:
        if try_lock(lock) is False:
            return
        _preload()
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen(64)
            try:
                _loop(listener, lock, command)
            finally:
                address.unlink(missing_ok=True)


def _preload() -> None:
    """Import and read what every job would, before the first is forked off."""
    for name in PRELOAD:
        __import__(name)
    from snella.runs import identity
    from snella.tasks import find_task, task_names

    identity.preload()
    for name in task_names():
        info = find_task(name)
        info.task_class()
        info.scorer_class()
    gc.freeze()  # children would copy the pages on which a collection marks what they share


def _loop(listener: socket.socket, lock: IO[str], command: Command) -> None:
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    ends: dict[int, int] = {}  # by child, a descriptor that wakes the loop when it ends
    idle_since = time.monotonic()
    while children or time.monotonic() - idle_since < IDLE_SECONDS:
        for key, _ in selector.select(timeout=0.1):
            if key.fileobj is listener:
                connection, _ = listener.accept()
                child = _fork(connection, (listener, lock), command)
                children[child] = connection
                selector.register(connection, selectors.EVENT_READ, child)
                if hasattr(os, "pidfd_open"):  # without it the end is seen a little later
                    ends[child] = os.pidfd_open(child)
                    selector.register(ends[child], selectors.EVENT_READ)
            elif key.data and _has_gone(children[key.data]):  # end the client's job, gently
                selector.unregister(key.fileobj)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(key.data, signal.SIGTERM)
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                connection = children.pop(child)
                if end := ends.pop(child, None):
                    selector.unregister(end)
                    os.close(end)
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                with contextlib.suppress(OSError):
                    code = os.waitstatus_to_exitcode(status)
                    connection.sendall(str(code if code >= 0 else 128 - code).encode())
                connection.close()
                idle_since = time.monotonic()


def _has_gone(connection: socket.socket) -> bool:
    """Whether the client closed its end; a request that the child has not read yet is no sign."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _fork(
    connection: socket.socket, servers: tuple[socket.socket | IO[str], ...], command: Command
) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for own in servers:  # a job that outlives its server must not stand for it
            own.close()
        _become_job(connection, command)
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _become_job(connection: socket.socket, command: Command) -> NoReturn:
    """Take over the client's directory, environment and output, and run its command."""
    header, streams, _, _ = socket.recv_fds(connection, 8, 2)
    size = int.from_bytes(header, "big")
    message = b""
    while len(message) < size:
        message += connection.recv(min(MESSAGE_BYTES, size - len(message)))
    request = json.loads(message)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["snella", *request["arguments"]]
    raise SystemExit(command(request["arguments"]))
