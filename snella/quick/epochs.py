"""What a pre-training has around its epochs: resume after a kill, and weights with a record."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from snella.files import atomic, digest_file, write_text

log = logging.getLogger(__name__)
History = list[dict[str, float]]


def run_epochs(
    config: Any,
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: Callable[[int], dict[str, float]],
    stop_after: int | None = None,
) -> tuple[History, float] | None:
    """Train ``config.epochs`` epochs; each is a call of ``epoch`` and depends on its number alone.

    Goes on from ``out`` + ".checkpoint" where that was made by the same ``config`` (a dataclass).
    Returns the numbers of all epochs and the seconds they took, or None where ``stop_after``
    epochs of this call were not enough.
    """
    checkpoint = checkpoint_of(out)
    settings = json.dumps(asdict(config), sort_keys=True)
    history: History = []
    seconds = 0.0
    if checkpoint.is_file():
        device = next(model.parameters()).device
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["config"] == settings:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            history, seconds = state["history"], state["seconds"]
    first = len(history)
    for number in range(first, config.epochs):
        if stop_after is not None and number - first >= stop_after:
            return None
        started = time.perf_counter()
        history = [*history, {name: round(value, 4) for name, value in epoch(number).items()}]
        seconds += time.perf_counter() - started
        log.info("epoch %d/%d %s", number + 1, config.epochs, history[-1])
        state = {"config": settings, "history": history, "seconds": seconds}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic(checkpoint) as temporary:
            torch.save(state, temporary)
    return history, seconds


def checkpoint_of(out: Path) -> Path:
    """The file from which an interrupted training goes on."""
    return out.with_name(f"{out.name}.checkpoint")


def write(
    out: Path,
    weights: dict[str, Tensor],
    about: dict[str, Any],
    history: History,
    seconds: float,
    versions: dict[str, str],
) -> dict[str, Any]:
    """Write weights as float32 and, beside them, the record (.json); return the record.

    ``about`` says what the weights are and how they were made; ``versions`` those of libraries
    beside Python and torch.
    """
    plain = {name: value.detach().float().cpu().contiguous() for name, value in weights.items()}
    with atomic(out) as temporary:
        save_file(plain, temporary)
    record = {
        **about,
        "final": history[-1],
        "history": history,
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
        "parameters": sum(value.numel() for value in plain.values()),
        "sha256": digest_file(out),
    }
    write_text(out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    checkpoint_of(out).unlink(missing_ok=True)
    return record
