"""Retry only what a retry can help.

Snakemake's ``retries`` repeat every failure. A method that raises would raise again, and a job that
somebody cancelled is not wanted: neither is submitted again. Running out of memory or time, and the
loss of a node, are retried, with more of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from snella.errors import UserError
from snella.jobs import slurm
from snella.records import FAILURE, FINISHED, read_file


class Retries:
    """Decides for each job of a workflow whether another attempt could end otherwise."""

    def __init__(self, records: Iterable[str], jobs_name: str = "") -> None:
        """Note how the runs stand now; ``jobs_name`` is the name of all SLURM jobs, if any."""
        self.jobs_name = jobs_name
        self._attempts: dict[int, tuple[str | None, str]] = {}
        folders = [Path(record).parent for record in records]
        paths = [folder / name for folder in folders for name in (FAILURE, FINISHED)]
        self._before = {path: _changed(path) for path in paths}

    def note(self, job: Any, number: str | None, refusal: str = "") -> None:
        """Note which SLURM job an attempt that failed was, or why ``sbatch`` refused it."""
        self._attempts[id(job)] = (number, refusal)

    def hopeless(self, job: Any) -> str:
        """Why another attempt at a job, or group of jobs, would end alike; empty if it may not."""
        if not job.is_group() and self._failed_for_good(job):
            return "snella status says why it failed"
        number, refusal = self._attempts.get(id(job), (None, ""))
        if refusal:
            return f"sbatch refused it ({refusal})"
        return f"SLURM job {number} was cancelled" if self._cancelled(number) else ""

    def done(self, job: Any) -> bool:
        """Whether the job finished since the workflow began, also if its group then failed."""
        return self._is_new(_folder(job) / FINISHED)

    def _failed_for_good(self, job: Any) -> bool:
        path = _folder(job) / FAILURE
        try:
            return self._is_new(path) and read_file(path).get("transient") is False
        except UserError:
            return False

    def _is_new(self, path: Path) -> bool:
        return _changed(path) not in (0, self._before.get(path, 0))

    def _cancelled(self, number: str | None) -> bool:
        if not (self.jobs_name and number):
            return False
        states = {str(job.number): job.state for job in slurm.jobs(self.jobs_name) or ()}
        return states.get(number) == "CANCELLED"


def install(retries: Retries, say: Callable[[str], None]) -> None:
    """Let Snakemake ask ``retries`` before it repeats a job or a group of jobs.

    Snakemake has no hook for this; its property of a job is extended.
    """
    from snakemake.jobs import GroupJob, Job

    configured = Job.restart_times.fget

    def of_job(job: Any) -> int:
        times = int(configured(job))
        return 0 if given_up(job, times, str(_folder(job))) else times

    def of_group(group: Any) -> int:
        left = [job for job in group.jobs if not retries.done(job)]
        times = max((of_job(job) for job in left), default=0)
        return 0 if given_up(group, times, f"A job of {len(group.jobs)} cells") else times

    def given_up(job: Any, times: int, title: str) -> bool:
        why = retries.hopeless(job) if job.attempt <= times else ""
        if why:
            say(f"{title} is not tried again: {why}")
        return bool(why)

    Job.restart_times, GroupJob.restart_times = property(of_job), property(of_group)


def _folder(job: Any) -> Path:
    return Path(str(job.output[0])).parent


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
