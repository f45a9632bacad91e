"""Which GPU a run works on where several are in one machine and no scheduler shares them out.

A slot is a lock on a small file; the kernel lets go of it when the process ends, however it ends,
so a run killed by `kill -9` leaves nothing behind. Under a cluster's scheduler, and with one GPU or
none, nothing is done.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from snella.errors import UserError
from snella.files import try_lock

VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARE = "SNELLA_GPU_SHARE"
"""How many runs may work on one device, from the workflow to its jobs."""
SCHEDULERS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID", "JOB_ID")
POLL_SECONDS = 0.25
QUERY_SECONDS = 60


def to_share(environment: Mapping[str, str]) -> list[str]:
    """The devices that runs of this machine share out among them; empty if that is not ours to do.

    A user may have narrowed them down by ``CUDA_VISIBLE_DEVICES``.
    """
    if any(name in environment for name in SCHEDULERS):
        return []
    if VISIBLE in environment:
        found = [name.strip() for name in environment[VISIBLE].split(",")]
    else:
        found = _installed()
    found = [name for name in found if name]
    return found if len(found) > 1 else []


def _installed() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def announce(share: int) -> None:
    """Tell the jobs that this process starts how many of them may work on one device."""
    os.environ[SHARE] = str(share)


@contextmanager
def lease(
    environment: MutableMapping[str, str] = os.environ, folder: Path | None = None
) -> Iterator[str | None]:
    """Hold a slot of the least loaded device and make it the only visible one.

    Waits until a slot is free. Has to come before anything asks CUDA for its devices. Yields the
    device, or None where there is nothing to share out.
    """
    devices = to_share(environment)
    if not devices:
        yield None
        return
    folder = folder or Path(tempfile.gettempdir()) / f"snella-{os.getuid()}" / "devices"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = {name: environment.get(name) for name in (VISIBLE, "CUDA_DEVICE_ORDER")}
    share = environment.get(SHARE, "1")
    if not (share.isdecimal() and int(share)):
        raise UserError(f"{SHARE}={share!r} is no number of runs; unset it.")
    device, slot = _wait(devices, int(share), folder)
    environment[VISIBLE] = device
    environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts
    try:
        yield device
    finally:
        slot.close()
        for name, value in before.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value


def _wait(devices: Sequence[str], share: int, folder: Path) -> tuple[str, IO[str]]:
    pause = POLL_SECONDS * (1 + os.getpid() % 7 / 7)  # so that waiting processes do not march
    while (found := take(devices, share, folder)) is None:
        time.sleep(pause)
    return found


def take(devices: Sequence[str], share: int, folder: Path) -> tuple[str, IO[str]] | None:
    """A free slot of the device with most of them, locked; None if all are taken.

    Another process that looks at the same moment may make a free slot look taken.
    """
    free: dict[str, list[IO[str]]] = {}
    for device in devices:
        for number in range(share):
            slot: IO[str] = open(folder / f"{device.replace('/', '_')}.{number}", "w")  # noqa: SIM115
            if try_lock(slot) is False:
                slot.close()
            else:
                free.setdefault(device, []).append(slot)
    if not free:
        return None
    best = max(free, key=lambda device: len(free[device]))
    kept = free[best].pop()
    for slots in free.values():
        for slot in slots:
            slot.close()
    return best, kept
