"""Date, command, hardware and versions, for the head of a results file."""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "timm", "peft", "numpy", "snella")


def facts(script: str, device: str) -> dict[str, Any]:
    """What a reader of the figures of ``script`` has to know."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "hardware": hardware(device),
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in PACKAGES},
    }


def installed(package: str) -> str:
    """Its version; of a source tree, nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def hardware(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": platform.platform(), "threads": torch.get_num_threads()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        found["cpu"] = names[0].partition(":")[2].strip() if names else ""
        found["capability"] = torch.backends.cpu.get_cpu_capability()
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found
