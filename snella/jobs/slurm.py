"""What SLURM says of jobs and partitions, from ``squeue`` and ``sinfo`` alone.

Both work on every cluster, with or without a job accounting database. An answer that does not come
is ``None``: a controller that restarts must not end a workflow.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from snella.errors import MISTAKE, UserError

LIVE = frozenset(
    {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING",
     "STOPPED", "SIGNALING", "STAGE_OUT", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT",
     "RESV_DEL_HOLD"}
)  # fmt: skip
EXECUTOR = "snakemake_executor_plugin_slurm"
TIMEOUT = 60
USUAL = frozenset({"None", "Priority", "Resources", "Dependency", "BeginTime", "Cleaning"})
"""Reasons of a job that simply waits for its turn."""


def require_executor() -> None:
    """End with one line where Snakemake's executor for SLURM is missing; the profile asks."""
    if find_spec(EXECUTOR) is None:
        sys.stderr.write(
            "snella: Snakemake's executor for SLURM is not installed here: "
            'pip install ".[bench,cluster]" in your clone.\n'
        )
        raise SystemExit(MISTAKE)


@dataclass(frozen=True)
class Job:
    """One job: its number, state, and the reason for pending."""

    number: int
    state: str
    reason: str


@dataclass(frozen=True)
class Partition:
    """What the largest node of a partition offers."""

    name: str
    default: bool
    gpus: bool
    cores: int
    memory_mb: int


def jobs(name: str) -> list[Job] | None:
    """All jobs of the name ``name`` that the controller remembers, oldest first."""
    out = _ask("squeue", "--name", name, "-h", "-t", "all", "-o", "%A|%T|%r")
    if out is None:
        return None
    found = []
    for line in out.splitlines():
        number, state, reason = line.split("|", 2)
        found.append(Job(int(number), state, reason))
    return sorted(found, key=lambda job: job.number)


def live(found: Iterable[Job]) -> list[Job]:
    """The jobs that are queued or running."""
    return [job for job in found if job.state in LIVE]


def pending_line(found: Iterable[Job]) -> str:
    """Why jobs wait, as "7 jobs pending: 5 Resources, 2 ReqNodeNotAvail"; empty if none does."""
    reasons = Counter(job.reason for job in found if job.state == "PENDING")
    if not reasons:
        return ""
    parts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    total = sum(reasons.values())
    unusual = set(reasons) - USUAL
    advice = "; `scontrol show job` says more, docs/cluster.md what helps" if unusual else ""
    return f"{total} {'job' if total == 1 else 'jobs'} pending: {parts}{advice}"


def partitions() -> list[Partition] | None:
    """The partitions that SLURM shows this user."""
    out = _ask("sinfo", "-h", "-o", "%P|%G|%c|%m")
    if out is None:
        return None
    found: dict[str, Partition] = {}
    for line in out.splitlines():
        title, gres, cores, memory = line.split("|")
        name, default = title.rstrip("*"), title.endswith("*")
        before = found.get(name, Partition(name, default, False, 0, 0))
        found[name] = Partition(
            name,
            default,
            before.gpus or "gpu" in gres,
            max(before.cores, _number(cores)),
            max(before.memory_mb, _number(memory)),
        )
    return list(found.values())


def largest_memory(wanted: str) -> int | None:
    """MB of the largest node of a partition (of the default one if empty), None if unknown."""
    found = [
        p for p in partitions() or () if (p.name in wanted.split(",") if wanted else p.default)
    ]
    return max((p.memory_mb for p in found), default=None)


def check_jobs(jobs: Iterable[Any]) -> None:
    """Raise :class:`~snella.errors.UserError` for jobs whose request no node could ever meet."""
    known = partitions()
    if not known:  # a controller that does not answer is sbatch's to report
        return
    seen = set()
    for job in jobs:
        r = job.resources
        request = (r.get("slurm_partition") or "", r.get("gpu", 0), job.threads, r.get("mem_mb", 0))
        if request not in seen:
            seen.add(request)
            _check_request(f"rule {job.rule.name}", known, *request)


def _check_request(
    where: str, known: list[Partition], wanted: str, gpus: int, cores: int, memory_mb: int
) -> None:
    found = [p for p in known if (p.name in wanted.split(",") if wanted else p.default)]
    names = ", ".join(sorted(p.name for p in known))
    if not found and wanted:
        raise UserError(f"SLURM has no partition {wanted!r} for {where}. There are: {names}.")
    if not found:
        raise UserError(
            f"No partition for {where}, and SLURM has no default; set cluster.partition and "
            f"cluster.cpu_partition in your configuration. There are: {names}."
        )
    title = " and ".join(repr(p.name) for p in found)
    if gpus and not any(p.gpus for p in found):
        others = ", ".join(p.name for p in known if p.gpus)
        choice = f"name one that has (cluster.partition: {others})" if others else "none has"
        raise UserError(
            f"Partition {title} has no GPU for {where}; {choice}, or set cluster.gpus: 0 in your "
            "configuration to train on CPUs."
        )
    if cores > (most := max(p.cores for p in found)):
        raise UserError(
            f"Partition {title} has at most {most} cores a node, {where} asks for {cores}; lower "
            "the protocol's `threads`."
        )
    if memory_mb > (most := max(p.memory_mb for p in found)):
        raise UserError(
            f"Partition {title} has at most {most} MB a node, {where} asks for {memory_mb}; lower "
            "cluster.memory_mb in your configuration."
        )


def _number(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
