"""Warm workers: run many short jobs without paying torch's import for each.

Importing torch, timm and peft takes longer than training one cell of the quick suite. Snakemake's
process starts a server (:mod:`snella.cli.worker`) that imports them once and forks a process for
every job: ``snella execute`` then only hands over its arguments, environment and output streams,
and waits. The server is its starter's alone and ends with it; it is found by the environment that
jobs inherit. A job for which there is none does its work itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from snella.errors import BROKEN

PLACE = "SNELLA_WORKER"
"""The environment variable with the folder of the socket."""
TOP, PREFIX = "/tmp", "snella-worker-"
"""Where folders of sockets lie, whose paths have to be short."""
TAKEN = b"taken "
"""What a job answers first; its exit status follows at its end."""
CRASHED = (
    "snella: the run's process ended without a word (killed, or crashed in compiled code); the "
    "same command tries again from its last checkpoint.\n"
)


def start() -> subprocess.Popen[bytes] | None:
    """Start a server for the jobs of this process; None if no socket can be made.

    It ends when the standard input of what is returned is closed, also by this process's end.
    """
    import tempfile  # of no use to jobs, which import this module for each

    null = subprocess.DEVNULL
    try:
        _sweep()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=TOP))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(_address(folder)))
            listener.listen()
            server = subprocess.Popen(
                [sys.executable, "-m", "snella.cli.worker", str(listener.fileno()), str(folder)],
                cwd=Path(__file__).parents[2],  # `-m` would prefer a checkout that is here
                stdin=subprocess.PIPE,
                stdout=null,
                stderr=null,
                start_new_session=True,
                pass_fds=[listener.fileno()],
            )
    except OSError:
        return None
    os.environ[PLACE] = str(folder)
    return server


def _sweep() -> None:
    """Remove what servers left that were killed: nobody listens at their sockets."""
    for place in Path(TOP).glob(f"{PREFIX}*/*"):
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.setblocking(False)
            try:
                probe.connect(str(place))
            except ConnectionRefusedError:
                place.unlink()
                place.parent.rmdir()


def call(arguments: list[str]) -> int | None:
    """Run ``snella ARGUMENTS`` in a warm worker and return its exit status.

    None if no server took it: the caller does the work itself.
    """
    request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    reply = b""
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.connect(str(_address(Path(os.environ[PLACE]))))
        socket.send_fds(connection, [b"\n"], [1, 2])
        connection.sendall(json.dumps(request).encode() + b"\n")
        while part := connection.recv(16):
            reply += part
    status = reply.removeprefix(TAKEN)
    if reply and not status:
        sys.stderr.write(CRASHED)
        return BROKEN
    return int(status) if status else None


def _address(folder: Path) -> Path:
    """The socket of this interpreter and package; jobs in another environment find none."""
    own = f"{sys.executable} {__file__}"
    return folder / hashlib.sha256(own.encode()).hexdigest()[:16]
