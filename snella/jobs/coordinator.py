"""One coordinator per results folder: a lock that no crash leaves behind, and jobs that one left.

Snakemake's own lock survives ``kill -9`` and then has to be removed by hand, so the profiles turn
it off; this one is the kernel's and goes with its process. The file also notes the SLURM jobs'
common name: jobs of a coordinator that died are waited for, never submitted a second time.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from snella.errors import UserError
from snella.files import try_lock
from snella.jobs import slurm
from snella.records import now

LOCK = ".coordinator"
POLL_SECONDS = 10
PENDING_SECONDS = 60


class Coordinator:
    """The right to work on one results folder, held as long as this process lives."""

    def __init__(self, results: Path) -> None:
        """Take it; raises :class:`~snella.errors.UserError` where another coordinator works."""
        self.path = results / LOCK
        try:
            results.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"Cannot write results in {results}: {error.strerror}.") from error
        free = try_lock(self._file)
        self._file.seek(0)
        self.former: dict[str, Any] = _parsed(self._file.read())
        if free is False:
            who = self.former
            pid, host, since = (who.get(name, "?") for name in ("pid", "host", "since"))
            raise UserError(
                f"Another Snakemake (process {pid} on {host}, since {since}) works on {results}; "
                "wait for it, end it, or choose another folder with --config results=FOLDER."
            )

    def note(self, jobs: str = "") -> None:
        """Write who holds it, and the common name of the SLURM jobs it is going to submit."""
        content = {"pid": os.getpid(), "host": socket.gethostname(), "since": now(), "jobs": jobs}
        self._file.truncate(0)
        self._file.write(json.dumps(content))
        self._file.flush()

    def wait_for_former(self, say: Callable[[str], None]) -> bool:
        """Wait until no job of a former coordinator is queued or running; True if there was one."""
        name, told, silent = self.former.get("jobs"), "", False
        while name:
            found = slurm.jobs(name)
            if found is None and not silent:
                silent = True
                say(f"squeue does not answer; whether jobs named {name} still run is asked again")
            if found is not None and not (left := slurm.live(found)):
                break
            if found is not None:
                numbers = ", ".join(str(job.number) for job in left)
                line = f"{len(left)} of an earlier Snakemake's jobs still to end (SLURM {numbers})"
                if not told:
                    line += f"; waiting for them. To end them instead: scancel --name {name}"
                if line.partition(";")[0] != told.partition(";")[0]:
                    say(line)
                    told = line
            time.sleep(POLL_SECONDS)
        return bool(told)


def watch_pending(name: str, say: Callable[[str], None]) -> None:
    """Say from now on, in a thread that ends with the process, why jobs do not start."""

    def watch() -> None:
        told, waiting = "", ""
        while True:
            time.sleep(PENDING_SECONDS)
            line = slurm.pending_line(slurm.jobs(name) or ())
            if line and waiting and line != told:
                say(line)
                told = line
            waiting = line

    threading.Thread(target=watch, daemon=True, name="pending").start()


def start_over() -> None:
    """Replace this process by the same command: the plan is another once jobs have ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "snakemake", *sys.argv[1:]])


def _parsed(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
