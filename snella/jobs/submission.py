"""Refused by ``sbatch`` is not failed: a job that a limit keeps out is submitted again.

The executor reports such a job as failed, which would use up one of its attempts within seconds.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from snella.jobs.retries import Retries

AGAIN_SECONDS = 60
CODE = re.compile(r"\b(?:QOS|Assoc)[A-Z]\w+")
"""SLURM's name of a limit; it follows a line that is the same for all of them."""
FOR_NOW = re.compile(
    r"submit limit|temporarily|timed out|unable to contact|connection|zero bytes", re.IGNORECASE
)


def temporary(message: str) -> bool:
    """Whether ``sbatch`` may accept tomorrow what it refused with ``message``."""
    limits = CODE.findall(message)
    return any("Submit" in name for name in limits) if limits else bool(FOR_NOW.search(message))


def watch(executor: Any, retries: Retries, say: Callable[[str], None]) -> None:
    """Let the SLURM ``executor`` submit again what was refused for now, and note what failed.

    A job that waits for it keeps its place among those of ``--jobs``. The reason is said when it is
    first heard.
    """
    report, told = executor.report_job_error, ""

    def reported(info: Any, msg: str | None = None, **options: Any) -> None:
        nonlocal told
        reason = "" if info.external_jobid else refusal(msg or "")
        if not temporary(reason):
            retries.note(info.job, info.external_jobid, reason)
            report(info, msg=msg, **options)
            return
        if reason != told:
            told = reason
            say(f"sbatch refuses jobs for now ({reason}); submitting again every minute")
        again(info.job)

    def again(job: Any) -> None:
        timer = threading.Timer(AGAIN_SECONDS, lambda: executor.wait and executor.run_job(job))
        timer.daemon = True
        timer.start()

    executor.report_job_error = reported


def refusal(message: str) -> str:
    """What ``sbatch`` said, in one line, from the executor's report; empty if it said nothing."""
    said = re.search(r"sbatch failed.*?error message was '(.*?)'\.\n", message, re.DOTALL)
    return "; ".join(re.sub(r"(?m)^sbatch: (error: )?", "", said[1]).split("\n")) if said else ""
