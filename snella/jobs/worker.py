"""Warm workers: run many short jobs without paying torch's import for each.

Importing torch, timm and peft takes longer than training one cell of the quick suite. A server
imports them once and forks a child per job; ``snella execute --warm`` is a client that hands
over its arguments, environment and output streams and waits. One job stays one process: a
crash, a kill or a memory leak is contained, and if the client dies its job is ended. The
server ends itself when it has been idle for a while. It never touches CUDA before forking.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

IDLE_SECONDS = 20
START_SECONDS = 90
PRELOAD = ("torch", "timm", "peft", "snella.runs.execute")
MESSAGE_BYTES = 2**20
Command = Callable[[list[str]], int]
"""Runs the arguments of ``snella`` and returns the exit status."""


def available() -> bool:
    """Whether warm workers make sense: not inside a cluster job, whose limits must hold."""
    in_cluster_job = any(name in os.environ for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"))
    return hasattr(os, "fork") and hasattr(socket, "send_fds") and not in_cluster_job


def call(arguments: list[str]) -> int | None:
    """Run ``snella ARGUMENTS`` in a warm worker and return its exit status.

    None if no server could be reached, or the worker was lost: the caller does the work itself.
    """
    connection = _connect() or _start()
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
    """A socket of this user, this interpreter and this state of the package's source."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    stamp = [sys.executable, *(f"{p}@{p.stat().st_mtime_ns}" for p in sources)]
    name = hashlib.sha256("\n".join(stamp).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"snella-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder / f"{name}.sock"


def _connect() -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(_address()))
    except OSError:
        connection.close()
        return None
    return connection


def _start() -> socket.socket | None:
    """Start the server unless somebody else just did, and wait until it listens."""
    null = subprocess.DEVNULL
    server = subprocess.Popen(
        [sys.executable, "-m", "snella.cli", "worker"],
        stdin=null,
        stdout=null,
        stderr=null,
        start_new_session=True,
    )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        connection = _connect()
        if connection is not None:
            return connection
        if server.poll() not in (None, 0):  # 0: another server holds the lock and is starting
            return None
        time.sleep(0.1)
    return None


def serve(command: Command) -> None:
    """Listen until idle; ``command`` runs in one forked child per connection."""
    address = _address()
    with open(address.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for name in PRELOAD:
            __import__(name)
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen(64)
            try:
                _loop(listener, command)
            finally:
                address.unlink(missing_ok=True)


def _loop(listener: socket.socket, command: Command) -> None:
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    idle_since = time.monotonic()
    while children or time.monotonic() - idle_since < IDLE_SECONDS:
        for key, _ in selector.select(timeout=0.1):
            if key.fileobj is listener:
                connection, _ = listener.accept()
                child = _fork(connection, listener, command)
                children[child] = connection
                selector.register(connection, selectors.EVENT_READ, child)
            elif _has_gone(children[key.data]):  # end the client's job, gently
                selector.unregister(key.fileobj)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(key.data, signal.SIGTERM)
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                connection = children.pop(child)
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


def _fork(connection: socket.socket, listener: socket.socket, command: Command) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        listener.close()
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
