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
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import facts
from peft import LoraConfig, get_peft_model
from reference import adapt_reference
from rich.console import Console
from rich.table import Table
from step_models import CASES, Case
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


def measure(case: Case, rows: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every row eagerly and as a graph, and memory."""
    runs: dict[str, Run] = {}
    memory, failed = {}, {}
    for row in rows:
        try:
            run = Run(row, case, options.device)
            for _ in range(3 if options.device == "cuda" else 1):  # warm up, compile
                run.step()
            memory[row] = run.memory()
            runs[row] = run
        except torch.OutOfMemoryError as error:
            failed[row] = str(error).partition("\n")[0]
    figures: dict[str, Any] = {"eager": interleaved(runs, options.repeats, options.seconds)}
    figures["inference"] = inference(runs, options)
    if options.device == "cuda":
        # A step that computes its threshold on the host, as the reference, cannot be captured.
        runs = {row: run for row, run in runs.items() if row in ("full", "lora", "snella")}
        if options.profile and "snella" in runs:
            figures["kernels"] = kernels(runs["snella"])
        if case.graph:
            for run in runs.values():
                run.record()
            figures["graph"] = interleaved(runs, options.repeats, options.seconds)
    return figures | {"memory": memory, "failed": failed, "title": case.title}


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


def show(results: dict[str, Any], device: str) -> None:
    table = Table(title=f"One training step, rank {RANK}, over LoRA-{RANK} of PEFT")
    for column in ("model", "row", "ms", "x LoRA", "graph ms", "x LoRA", "MB", "x LoRA"):
        table.add_column(column, justify="left" if column in ("model", "row") else "right")
    for figures in results.values():
        for row in figures["eager"]:
            cells = [figures["title"], row]
            for kind, unit in (("eager", 1e-3), ("graph", 1e-3), ("memory", 2**20)):
                value = figures.get(kind, {}).get(row)
                over = figures.get(f"{kind}_over_lora", {}).get(row)
                cells.append("" if value is None else f"{value / unit:.1f}")
                cells.append("" if over is None else f"{over:.2f}")
            table.add_row(*cells)
    Console(width=110).print(table)
    sys.stdout.flush()


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and memory over LoRA, per model."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = {"eager": "time, eager", "graph": "time, CUDA graph", "memory": "peak memory"}
    present = {
        k: v for k, v in kinds.items() if any(f"{k}_over_lora" in f for f in results.values())
    }
    figure, axes = pyplot.subplots(1, len(present), figsize=(3.6 * len(present), 3), sharey=True)
    for axis, (kind, title) in zip(
        [axes] if len(present) == 1 else axes, present.items(), strict=True
    ):
        for offset, row in ((-0.2, "full"), (0.2, "snella")):
            found = [f.get(f"{kind}_over_lora", {}).get(row) for f in results.values()]
            places = [place + offset for place, value in enumerate(found) if value is not None]
            values = [value for value in found if value is not None]
            bars = axis.barh(
                places, values, 0.38, label={"full": "full", "snella": "SNELLA-8"}[row]
            )
            axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{title}, over LoRA-8", fontsize=9)
        axis.set_yticks(range(len(results)), [f["title"] for f in results.values()], fontsize=8)
        axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


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
    results: dict[str, Any] = {}
    default = [name for name in CASES if name.endswith("cpu") == (options.device == "cpu")]
    names = options.cases or default
    for name in names:
        case = CASES[name]
        rows = [row for row in case.rows if row in (options.rows or ROWS)]
        try:
            figures = measure(case, rows, options)
        except Exception as error:
            traceback.print_exception(error)
            continue
        results[name] = figures | ratios(figures)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if options.output:
            record = facts("step_time.py", options.device) | {"rank": RANK, "sparsity": SPARSITY}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record | {"models": results}, indent=2) + "\n")
    if options.output and results:
        plot(results, options.output.with_suffix(".png"))
    show(results, options.device)


if __name__ == "__main__":
    main()
