"""The server of warm workers, which :func:`snella.jobs.worker.start` starts.

One job is one forked process: a crash, a kill or a leak of memory is contained, and the server may
end before it. A job whose client has gone ends as by SIGTERM. The server never touches CUDA. Once a
source of the package has changed it takes no more jobs: they would run the code that it imported.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

from snella.cli.main import main
from snella.jobs.worker import PLACE, TAKEN
from snella.runs.sources import PACKAGE

PRELOAD = (
    "torch",
    "torch.utils.flop_counter",
    "timm",
    "peft",
    "snella.jobs.cells",
    "snella.runs.execute",
)


def serve(listener: socket.socket) -> None:
    """Fork a process for every connection, until the standard input is closed."""
    imported = _sources()
    _preload()
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        with connection:
            if _sources() == imported and os.fork() == 0:
                listener.close()
                _work(connection)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _sources() -> dict[Path, int]:
    """When each source of the package was written."""
    return {file: file.stat().st_mtime_ns for file in PACKAGE.rglob("*.py")}


def _preload() -> None:
    """Import and read what every job would, before the first is forked off."""
    for name in PRELOAD:
        __import__(name)
    from snella import records
    from snella.cli import parser
    from snella.runs import sources
    from snella.tasks import find_task, task_names

    parser.build_parser()
    records.provenance()
    sources.preload()
    for name in task_names():
        info = find_task(name)
        info.task_class()
        info.scorer_class()
    gc.freeze()  # children would copy the pages on which a collection marks what they share


def _work(connection: socket.socket) -> None:
    """Become the client's job: take its directory, environment and output, and run its command."""
    try:
        _, streams, _, _ = socket.recv_fds(connection, 1, 2)
        with connection.makefile() as file:
            request = json.loads(file.readline())
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
            os.close(stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        del os.environ[PLACE]
        sys.argv = ["snella", *request["arguments"]]
        connection.sendall(TAKEN)
        threading.Thread(target=_end_with, args=[connection], daemon=True).start()
        try:
            status: object = main(request["arguments"])
        except SystemExit as end:  # what the parser ends with
            status = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(str(status).encode())
    finally:
        os._exit(0)


def _end_with(connection: socket.socket) -> None:
    """End this process, gently, when its client has gone."""
    connection.recv(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    number, folder = sys.argv[1:]
    try:
        with socket.socket(fileno=int(number)) as listening:
            serve(listening)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
