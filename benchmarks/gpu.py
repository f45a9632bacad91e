"""All that is measured on a GPU, the most telling first, until the time is up; gpu.sh calls this.

    python benchmarks/gpu.py --output benchmarks/results/step_time_gpu.json

Every part is written when it is done, and what fails is noted, so that a killed or broken call
keeps what it has. Status 3 says that CUDA no longer answers in this process: call again with
--resume, which goes on behind the part that broke it.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import step_time
import torch
from facts import facts
from step_models import CASES
from step_time import DeviceLost, noted, require_device, write

LOST, SECONDS = 3, 150.0
SPARE = 5.0
"""Seconds that are left for writing and drawing."""
Part = Callable[[dict[str, Any], Callable[[], None]], None]


class TimeUp(BaseException):
    """The seconds of the whole call are spent."""


def steps(name: str, options: argparse.Namespace) -> Part:
    case = CASES[name]
    return lambda figures, save: step_time.measure(case, list(case.rows), options, figures, save)


def loop(options: argparse.Namespace) -> Part:
    """The training loop; imported late, for it needs more of the package than the steps do."""

    def part(figures: dict[str, Any], save: Callable[[], None]) -> None:
        figures["failed"] = {}
        with noted(figures, "training loop"):
            import training_loop

            parser = argparse.ArgumentParser()
            training_loop.arguments(parser)
            chosen = parser.parse_args([], argparse.Namespace(device=options.device))
            training_loop.measure(chosen, figures, save)

    return part


def compiled(options: argparse.Namespace) -> Part:
    """What ``torch.compile`` of the whole model makes of a step of ViT-B/16."""

    def part(figures: dict[str, Any], save: Callable[[], None]) -> None:
        figures |= {"title": CASES["vit-b"].title, "failed": {}, "seconds": {}}
        for row in ("snella", "lora"):
            with noted(figures, f"torch.compile of {row}"):
                run = step_time.Run(row, CASES["vit-b"], options.device)
                begin = time.perf_counter()
                run.model = torch.compile(run.model, fullgraph=row == "snella")
                run.loss().backward()
                figures[f"{row} compiles in"] = time.perf_counter() - begin
                runs = {row: run}
                figures["seconds"] |= step_time.interleaved(runs, options.repeats, options.seconds)
            save()

    return part


def parts(options: argparse.Namespace) -> dict[str, Part]:
    """By name, in order."""
    models = {name: steps(name, options) for name in ("vit-b", "vit-l", "vit-h", "sd3", "sam")}
    first = {name: models.pop(name) for name in ("vit-b", "vit-l", "vit-h")}
    return {**first, "loop": loop(options), **models, "compile": compiled(options)}


def run_all(
    found: dict[str, Any], wanted: dict[str, Part], end: float, save: Callable[[], None]
) -> int:
    """Do the parts that ``found`` lacks; the status of the process."""
    found["left_out"] = [name for name in wanted if name not in found["begun"]]
    try:
        for name in list(found["left_out"]):
            if end - time.time() < SPARE:
                raise TimeUp
            found["begun"].append(name)
            own = found["models"] if name in CASES else found
            wanted[name](own.setdefault(name, {}), save)
            found["left_out"].remove(name)
            require_device()
    except TimeUp:
        pass
    except DeviceLost as error:
        traceback.print_exception(error)
        return LOST
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        save()
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--until", type=float, help="when to stop, in seconds since 1970")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", help="default: all")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no NVIDIA GPU here.")
    end = options.until or time.time() + SECONDS
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, max(end - time.time() - SPARE, 0.1))
    each = argparse.Namespace(device=options.device, repeats=12, seconds=4.0, profile=True)
    wanted = parts(each)
    if options.parts:
        wanted = {name: wanted[name] for name in options.parts}
    found = facts("gpu.py", options.device) | {"rank": step_time.RANK, "models": {}, "begun": []}
    if options.resume and options.output.is_file():
        found |= json.loads(options.output.read_text())
    gc.collect()
    sys.exit(run_all(found, wanted, end, partial(write, found, options.output)))


def _stop(number: int, frame: Any) -> None:
    raise TimeUp


if __name__ == "__main__":
    main()
