"""A SLURM of one node with four pretended GPUs, of the caller's own and without privileges.

munged, slurmctld and slurmd run as the present user on free ports, with all their files in one
folder; no service of the machine is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
GPUS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")  # any character devices pass for GPUs

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=5
MinJobAge=300
OverTimeLimit=0
ReturnToService=2
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000 Gres=gpu:4
PartitionName=gpu Nodes=node1 MaxTime=INFINITE State=UP
PartitionName=cpu Nodes=node1 MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no SLURM here, or an empty string."""
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    return f"no {', '.join(lacking)} here ({PACKAGES})" if lacking else ""


class Cluster:
    """A running SLURM; use it as a context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "PATH": f"{folder}/bin{os.pathsep}{PATH}", "SLURM_CONF": str(folder / "slurm.conf"),
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        self.folder.mkdir(mode=0o700, parents=True)
        for name in ("state", "spool", "bin"):
            (self.folder / name).mkdir()
        # the executor's job steps drop SLURM_CONF, as if the configuration were the machine's
        srun = self.folder / "bin" / "srun"
        real = shutil.which("srun", path=PATH)
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {real} "$@"\n')
        srun.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=host,
                folder=self.folder,
                user=_user(),
                controller=_port(),
                daemon=_port(),
            )
        )
        # without a writable cgroup2 slurmd starts only if told of v1, which it then leaves alone
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "gres.conf").write_text(
            "".join(f"NodeName=node1 Name=gpu File={device}\n" for device in GPUS)
        )
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end_jobs()
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._end_leftovers()

    def _start(self) -> None:
        f = self.folder
        self._spawn(
            "munged", "--foreground", "--force", f"--socket={f}/munge.socket",
            f"--key-file={f}/munge.key", f"--pid-file={f}/munged.pid",
            f"--seed-file={f}/munged.seed", f"--log-file={f}/munged.log",
        )  # fmt: skip
        _wait(lambda: (f / "munge.socket").exists(), f / "munged.log")
        self._spawn("slurmctld", "-D")
        self._spawn("slurmd", "-D", "-N", "node1")
        _wait(self._is_idle, f / "slurmctld.log")

    def _end_jobs(self, seconds: float = 20) -> None:
        """Jobs outlive their daemon, so end them first."""
        self.call("scancel", "--full", "--signal=KILL", f"--user={_user()}")
        self.call("scancel", f"--user={_user()}")
        deadline = time.monotonic() + seconds
        while self.call("squeue", "-h").strip() and time.monotonic() < deadline:
            time.sleep(0.2)

    def _end_leftovers(self) -> None:
        """A lost node's processes may outlive their job; they know this folder by their PATH."""
        mark = f"{self.folder}/bin".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)

    def _is_idle(self) -> bool:
        return set(self.call("sinfo", "-h", "-o", "%t", tries=1).split()) == {"idle"}

    def _spawn(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=PATH)
        with (self.folder / f"{program}.out").open("wb") as out:
            self.processes.append(
                subprocess.Popen(
                    [str(path), *arguments],
                    env={**os.environ, **self.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def call(self, *command: str, tries: int = 3) -> str:
        """What a SLURM command prints; a controller that is busy is asked again."""
        environment = {**os.environ, **self.environment}
        for _ in range(tries):
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                break
            time.sleep(0.5)
        return done.stdout

    def jobs(self, states: str = "all") -> list[dict[str, str]]:
        """All jobs there are or were lately: id, state, name, comment, CPUs, GPUs, partition."""
        fields = {
            "id": "%i", "state": "%T", "name": "%j", "comment": "%k", "partition": "%P",
            "limit": "%l", "memory": "%m", "cpus": "%C", "folder": "%Z",
        }  # fmt: skip
        out = self.call("squeue", "-h", "-t", states, "-o", "|".join(fields.values()))
        return [dict(zip(fields, line.split("|"), strict=True)) for line in out.splitlines()]


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(ready: object, log: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        if time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else "no log"
            raise TimeoutError(f"SLURM does not start: {tail}")
        time.sleep(0.1)
