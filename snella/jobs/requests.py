"""What the jobs of the workflow ask of the machine or the cluster that runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from snella.jobs import slurm
from snella.suite.config import CHECKOUT, Config

LOCAL_MEMORY_MB = 3000
"""Of a run without a cluster: counts only where ``--resources mem_mb=`` sets a limit."""


class Requests:
    """Resources of jobs; ``remote`` says whether a cluster's executor runs them."""

    def __init__(self, config: Config, remote: Callable[[], bool]) -> None:
        self.config, self.remote = config, remote
        self.ceiling_mb: int | None = None

    def check(self, jobs: list[Any]) -> None:
        """Raise :class:`~snella.errors.UserError` for what no node of SLURM could ever meet."""
        slurm.check_jobs(job for job in jobs if not job.is_local)
        self.ceiling_mb = slurm.largest_memory(self.config.cluster.partition)

    def environment(self, wildcards: Any) -> str:
        """The conda environment of a data set's task family, beside ``workflow/rules``."""
        task = self.config.datasets[wildcards.dataset].task
        name = task if (CHECKOUT / "envs" / f"{task}.yaml").is_file() else "core"
        return f"../../envs/{name}.yaml"

    def gpu(self, wildcards: Any) -> int:
        """GPUs of a run: none where its device is the CPU."""
        return self.config.cluster.gpus if self.remote() or _has_gpu() else 0

    def memory(self, wildcards: Any, attempt: int) -> int:
        """MB of main memory of a run; more after each failure, up to what a node has."""
        if not self.remote():
            return LOCAL_MEMORY_MB
        wanted = self.config.cluster.memory_mb
        return max(wanted, min(wanted * attempt, self.ceiling_mb or wanted * attempt))

    def minutes(self, wildcards: Any, attempt: int) -> int:
        """The time limit of a run; more after each failure, which continues from a checkpoint."""
        return self.config.cluster.minutes * attempt

    def partition(self, wildcards: Any) -> str:
        """Where runs go; empty is the cluster's default."""
        return self.config.cluster.partition

    def cpu_partition(self, wildcards: Any) -> str:
        """Where jobs go that use no GPU; empty is the cluster's default."""
        return self.config.cluster.cpu_partition

    def account(self, wildcards: Any) -> str:
        """Whom the cluster charges; empty leaves it to the cluster."""
        return self.config.cluster.account


@cache
def _has_gpu() -> bool:
    """Whether this machine has a GPU, without the seconds that asking PyTorch takes."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
