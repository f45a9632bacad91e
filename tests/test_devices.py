"""Runs share out the GPUs of a workstation: one slot each, the emptiest device first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from snella.jobs import devices

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys
from pathlib import Path
from snella.jobs import devices
with devices.lease({"CUDA_VISIBLE_DEVICES": "0,1", devices.SHARE: sys.argv[2]},
                   Path(sys.argv[1])) as device:
    print(device, flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, share: int = 1) -> subprocess.Popen[str]:
    """Another process that holds a slot of two pretended devices until its stdin ends."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(share)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def device_of(holder: subprocess.Popen[str]) -> str:
    assert holder.stdout is not None
    return holder.stdout.readline().strip()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0, 1"}, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,MIG-b/1"}, ["GPU-a", "MIG-b/1"]),
        ({"CUDA_VISIBLE_DEVICES": "3"}, []),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_ID": "7"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "PBS_JOBID": "7"}, []),
    ],
)
def test_what_is_shared_out(environment, expected):
    assert devices.to_share(environment) == expected


def test_devices_of_the_driver(monkeypatch, tmp_path):
    """As nvidia-smi lists them; one that fails is none."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert devices.to_share({}) == ["0", "1", "2"]
    fake.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert devices.to_share({}) == []


def test_nothing_is_done_where_there_is_nothing_to_share(tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": "1"}
    with devices.lease(environment, tmp_path / "slots") as device:
        assert device is None and environment == {"CUDA_VISIBLE_DEVICES": "1"}
    assert not (tmp_path / "slots").exists()


def test_a_lease_sets_the_visible_device_and_gives_it_back(tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": "4,7"}
    with devices.lease(environment, tmp_path) as device:
        assert environment["CUDA_VISIBLE_DEVICES"] == device
        assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert environment == {"CUDA_VISIBLE_DEVICES": "4,7"}


def test_slots_are_taken_evenly_and_no_more_than_there_are(tmp_path):
    names = ["0", "1", "2"]
    taken = [devices.take(names, 2, tmp_path) for _ in range(7)]
    assert taken[-1] is None
    held = [found for found in taken if found]
    assert sorted(device for device, _ in held[:3]) == names  # one each before a second on any
    assert sorted(device for device, _ in held) == sorted(names * 2)
    device, slot = held[2]
    slot.close()
    again = devices.take(names, 2, tmp_path)
    assert again is not None and again[0] == device
    for _, slot in [*held, again]:
        slot.close()


def test_kill_9_frees_the_slot_and_who_waits_gets_it(tmp_path):
    first, second = hold(tmp_path), hold(tmp_path)
    assert {device_of(first), device_of(second)} == {"0", "1"}
    got: list[str | None] = []
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}

    def wait() -> None:
        with devices.lease(environment, tmp_path) as device:
            got.append(device)

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(timeout=0.6)
    assert waiting.is_alive() and not got
    first.send_signal(signal.SIGKILL)
    waiting.join(timeout=30)
    assert got and not waiting.is_alive()
    second.communicate("")
    first.wait()


def test_a_job_learns_how_many_share_a_device(tmp_path, monkeypatch):
    """The configuration's `gpu_share` reaches jobs through the environment."""
    monkeypatch.setenv(devices.SHARE, "1")
    devices.announce(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    held = [hold(tmp_path, 2) for _ in range(3)]
    assert sorted(device_of(holder) for holder in held)[0] == "0"
    with devices.lease(folder=tmp_path) as device:
        assert device in ("0", "1")
    for holder in held:
        holder.communicate("")
