"""Time and memory of one training step: SNELLA against full fine-tuning, LoRA and its reference.

    python benchmarks/step_time.py --threads 2                    # CPU: ViT-B/16, batch 8, float32
    python benchmarks/step_time.py --device cuda                  # GPU: five models, bfloat16

Rows: full; lora (Hugging Face PEFT, rank 8, the same layers); snella (rank 8, its defaults); plain
(the same by torch operations); reference (the released algorithm as one would write it, see
reference.py). A step is forward, backward, AdamW and SNELLA's hook. The rows take turns, so that
ratios compare like with like, and medians are reported; on a GPU once more as CUDA graphs. Peak
memory is what a row allocates at most, its model included (CPU: bytes kept for backward).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from facts import facts
from peft import LoraConfig, get_peft_model
from reference import adapt_reference
from step_models import CASES, Case
from step_table import plot, show
from torch import Tensor, nn

from snella import SnellaConfig
from snella.tuner import SnellaLayer

RANK, SPARSITY = 8, 0.5


def snella(model: nn.Module, **settings: Any) -> nn.Module:
    config = SnellaConfig(rank=RANK, initial_sparsity=SPARSITY, **settings)
    adapted = get_peft_model(model, config)
    adapted.on_epoch_start(0, 100)
    return adapted


def plain(model: nn.Module) -> nn.Module:
    return snella(model, compile=False)


def lora(model: nn.Module) -> nn.Module:
    """On the layers that SNELLA adapts."""
    probe = get_peft_model(model, SnellaConfig(rank=2))
    layers = {m.key for m in probe.modules() if isinstance(m, SnellaLayer)}
    model = probe.unload()
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=list(layers)))


def full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def reference(model: nn.Module) -> nn.Module:
    return adapt_reference(model, RANK, SPARSITY)


ROWS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": full,
    "lora": lora,
    "snella": snella,
    "plain": plain,
    "reference": reference,
}


class Run:
    """One row: its model, optimizer and data."""

    def __init__(self, row: str, case: Case, device: str) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated() if device == "cuda" else 0
        torch.manual_seed(0)
        with torch.device(device):
            backbone = case.build()
            self.batch = case.batch(device)
        self.model = ROWS[row](backbone).to(device).train()
        if hasattr(backbone, "head") and isinstance(backbone.head, nn.Linear):
            backbone.head.requires_grad_(True)
        self.case, self.amp = case, device == "cuda"
        self.optimizer = self.adamw()
        self.graph: torch.cuda.CUDAGraph | None = None

    def adamw(self, **settings: Any) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-4, **settings)

    def loss(self) -> Tensor:
        # A cache of casts would not live in a graph; every weight is cast once anyway.
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp, cache_enabled=False):
            return self.case.loss(self.model, self.batch)

    def step(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        self.loss().backward()
        self.optimizer.step()
        if hasattr(self.model, "on_step_end"):
            self.model.on_step_end()
        self.optimizer.zero_grad()

    def record(self) -> None:
        """Capture a step in a CUDA graph, so that the device need not wait for the host."""
        self.optimizer = self.adamw(capturable=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.graph = graph

    def memory(self) -> int:
        """Bytes at most in a step, the model included; on a CPU those kept for backward."""
        if self.device == "cpu":
            return self.kept()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated() - self.before

    def kept(self) -> int:
        """Bytes kept for backward, beyond the model's own parameters and buffers."""
        own = {t.untyped_storage().data_ptr() for t in self.model.state_dict().values()}
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss()
        total = sum(storages.values())
        loss.backward()
        self.optimizer.zero_grad()
        return total


def interleaved(runs: dict[str, Run], repeats: int, seconds: float) -> dict[str, float]:
    """Median seconds of a step of every row; they take turns for about so long."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            wait(run.device)
            start = time.perf_counter()
            run.step()
            wait(run.device)
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    case: Case,
    rows: list[str],
    options: argparse.Namespace,
    figures: dict[str, Any],
    save: Callable[[], None] = lambda: None,
) -> None:
    """Seconds of every row eagerly and as a graph, and memory, into ``figures``, bit by bit.

    What fails is noted there, and the rest goes on.
    """
    figures |= {"title": case.title, "failed": {}, "memory": {}}
    runs: dict[str, Run] = {}
    for row in rows:
        with noted(figures, row):
            run = Run(row, case, options.device)
            for _ in range(3 if options.device == "cuda" else 1):  # warm up, compile
                run.step()
            figures["memory"][row] = run.memory()
            runs[row] = run
    with noted(figures, "eager"):
        figures["eager"] = interleaved(runs, options.repeats, options.seconds)
    save()
    with noted(figures, "inference"):
        figures["inference"] = inference(runs, options)
    if options.device == "cuda":
        # A step that computes its threshold on the host, as the reference, cannot be captured.
        runs = {row: run for row, run in runs.items() if row in ("full", "lora", "snella")}
        if options.profile and "snella" in runs:
            with noted(figures, "profile"):
                figures["kernels"] = kernels(runs["snella"])
        captured = {}
        for row, run in runs.items() if case.graph else ():
            with noted(figures, f"graph of {row}"):
                run.record()
                captured[row] = run
        with noted(figures, "graph"):
            figures["graph"] = interleaved(captured, options.repeats, options.seconds)
    figures |= ratios(figures)
    save()


@contextmanager
def noted(figures: dict[str, Any], what: str) -> Iterator[None]:
    """Note an error of the block and go on, unless the device no longer answers."""
    try:
        yield
    except Exception as error:
        traceback.print_exception(error)
        figures["failed"][what] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        error.__traceback__ = None  # which holds the memory of what failed
        require_device()


class DeviceLost(BaseException):
    """After some errors CUDA answers nothing in this process any more."""


def require_device() -> None:
    if torch.cuda.is_available():
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error


def inference(runs: dict[str, Run], options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a forward pass in evaluation."""
    steps = {}
    for name, run in runs.items():
        run.model.eval()
        steps[name] = run.step
        run.step = torch.no_grad()(run.loss)  # type: ignore[method-assign]
        run.step()
    seconds = interleaved(runs, min(options.repeats, 8), options.seconds / 4)
    for name, run in runs.items():
        run.step = steps[name]  # type: ignore[method-assign]
        run.model.train()
    return seconds


def kernels(run: Run) -> dict[str, list[float]]:
    """Calls and device milliseconds per step of the kernels that take longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            run.step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:24]
    return {e.key[:60]: [e.count / 3, round(e.self_device_time_total / 3e3, 4)] for e in events}


def ratios(figures: dict[str, Any]) -> dict[str, Any]:
    """Every row over LoRA and over full fine-tuning."""
    result: dict[str, Any] = {}
    for base in ("lora", "full"):
        for kind in ("eager", "graph", "memory"):
            values = figures.get(kind, {})
            if base in values:
                shares = {row: round(value / values[base], 3) for row, value in values.items()}
                result[f"{kind}_over_{base}"] = shares
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all on a GPU")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that a case has")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20, help="steps of a row at most")
    parser.add_argument("--seconds", type=float, default=60, help="for all rows of a case, about")
    parser.add_argument("--profile", action="store_true", help="also the longest kernels")
    parser.add_argument("--output", type=Path, help="JSON; a plot is written beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    default = [name for name in CASES if name.endswith("cpu") == (options.device == "cpu")]
    found = facts("step_time.py", options.device)
    found |= {"rank": RANK, "sparsity": SPARSITY, "models": {}}
    for name in options.cases or default:
        case, figures = CASES[name], found["models"].setdefault(name, {})
        rows = [row for row in case.rows if row in (options.rows or ROWS)]
        measure(case, rows, options, figures, partial(write, found, options.output))
        require_device()
    if options.output:
        plot(found["models"], options.output.with_suffix(".png"))
    show(found)


def write(found: dict[str, Any], path: Path | None) -> None:
    """The figures so far, whole or not at all."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(found, indent=2) + "\n")
        temporary.replace(path)


if __name__ == "__main__":
    main()
