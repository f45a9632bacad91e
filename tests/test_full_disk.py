"""A full disk, as a mount of its own: one line, nothing lost, and good again once there is room."""

from __future__ import annotations

import json
import subprocess

import pytest

from snella.cli import main


@pytest.fixture
def disk(tmp_path):
    """A small disk and a function that changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a disk")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    yield folder, resize
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_on_a_full_disk_says_so_keeps_its_result_and_goes_on(disk, make_run, capsys):
    folder, resize = disk
    run = make_run(epochs=2).model_copy(update={"results": str(folder)})
    call = ["execute", "--settings", run.to_json()]
    for size in ("4k", "40k", "150k"):
        resize(size)
        assert main(call) == 2
        assert "No space left on device; make room" in capsys.readouterr().err.splitlines()[-1]
    resize("20m")
    assert main(call) == 0
    before = run.record.read_text()
    used = subprocess.check_output(["df", "--output=used", str(folder)], text=True).split()[-1]
    resize(f"{used}k")
    other = run.model_copy(update={"base_seed": 1})
    assert main(["execute", "--settings", other.to_json()]) == 2
    assert run.record.read_text() == before
    resize("20m")
    assert main(call) == 0
    assert json.loads(run.record.read_text())["status"] == "ok"
