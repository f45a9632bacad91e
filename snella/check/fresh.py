"""Restore saved adapters in a new process, which knows nothing but the file and the settings.

``python -m snella.check.fresh FOLDER`` reads ``request.json`` and ``<family>.safetensors`` and
writes ``<family>.answer.safetensors`` and ``reply.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from snella.check.contract import restore
from snella.check.findings import Failure
from snella.check.subject import Subject
from snella.errors import contained, one_line
from snella.methods.base import build_method

SECONDS = 120
Answer = tuple[Tensor, list[str]]


def restore_elsewhere(
    path: Path, hyperparameters: dict[str, Any], states: dict[str, dict[str, Tensor]]
) -> Callable[[str], Answer]:
    """Load the ``states`` by family in one new process; a function that gives each its answer.

    The function raises :class:`~snella.check.findings.Failure` where restoring failed.
    """
    request = {
        "file": str(path.resolve()),
        "hyperparameters": hyperparameters,
        "families": list(states),
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="snella-check-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        for kind, state in states.items():
            save_file(state, folder / f"{kind}.safetensors")
        reply = _call(folder)
        answers = {
            kind: load_file(folder / f"{kind}.answer.safetensors")["answer"]
            for kind in reply.get("names", {})
        }

    def answer(kind: str) -> Answer:
        if kind not in answers:
            problem = reply["problems"].get(kind, reply["problems"].get("", "it stopped"))
            raise Failure(f"restoring in a new process failed: {problem}")
        return answers[kind], reply["names"][kind]

    return answer


def _call(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "snella.check.fresh", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"problems": {"": f"it took more than {SECONDS} seconds"}}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"problems": {"": lines[-1]}}
    reply: dict[str, Any] = json.loads((folder / "reply.json").read_text())
    return reply


def serve(folder: Path) -> None:
    """Answer the request in ``folder``."""
    request = json.loads((folder / "request.json").read_text())
    torch.set_num_threads(request["threads"])
    path = Path(request["file"])
    reply: dict[str, Any] = {"names": {}, "problems": {}}
    for kind in request["families"]:
        try:
            method = build_method(path, request["hyperparameters"])
            found, names = restore(Subject(method, kind), load_file(folder / f"{kind}.safetensors"))
            save_file({"answer": found.contiguous()}, folder / f"{kind}.answer.safetensors")
            reply["names"][kind] = names
        except (Exception, SystemExit) as error:
            reply["problems"][kind] = one_line(error, path)
    (folder / "reply.json").write_text(json.dumps(reply))


if __name__ == "__main__":
    with contained():
        serve(Path(sys.argv[1]))
