"""Time and memory of one training step: SNELLA against full fine-tuning, LoRA and its reference.

    python benchmarks/step_time.py --threads 2 --output benchmarks/results/step_time_cpu.json

Rows: full; lora (Hugging Face PEFT, rank 8); snella (paper variant, one product per layer, compiled
arithmetic); plain (the same without compilation); kept (plain, keeping merged matrices for
backward); released (the released variant with its dropout, plain); reference (the released
algorithm as one would write it: see reference.py). A step is forward, backward, optimizer and
SNELLA's hook. The rows take turns within one run, so that ratios compare like with like; medians
are reported. Memory is measured in a process per row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from peft import LoraConfig, get_peft_model
from reference import adapt_reference
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from snella import SnellaConfig

RANK, CLASSES, SPARSITY = 8, 100, 0.5
TARGETS = r".*blocks\.\d+\..*\.(qkv|proj|fc1|fc2)"


def full(model: nn.Module) -> nn.Module:
    return model


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(
        model, LoraConfig(r=RANK, target_modules=TARGETS, modules_to_save=["head"])
    )


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    config = SnellaConfig(
        rank=RANK, modules_to_save=["head"], initial_sparsity=SPARSITY, **settings
    )
    peft_model = get_peft_model(model, config)
    peft_model.on_epoch_start(0, 100)
    return peft_model


def snella(model: nn.Module) -> nn.Module:
    return adapted(model, compile=True)


def plain(model: nn.Module) -> nn.Module:
    return adapted(model, compile=False)


def kept(model: nn.Module) -> nn.Module:
    return adapted(model, keep_merged=True)


def released(model: nn.Module) -> nn.Module:
    return adapted(model, variant="released")


def reference(model: nn.Module) -> nn.Module:
    model = adapt_reference(model, RANK, SPARSITY)
    model.head.requires_grad_(True)
    return model


ROWS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": full,
    "lora": lora,
    "snella": snella,
    "plain": plain,
    "kept": kept,
    "released": released,
    "reference": reference,
}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Run:
    """One row: its model, optimizer and data."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        backbone = timm.create_model(options.model, num_classes=CLASSES)
        size = backbone.patch_embed.img_size[0]
        self.device = torch.device(options.device)
        self.autocast = options.dtype == "bfloat16"
        self.clock = CLOCKS[options.clock]
        self.recorded: torch.cuda.CUDAGraph | None = None
        self.model = ROWS[name](backbone).to(self.device).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=options.graph)
        self.images = torch.randn(options.batch, 3, size, size, device=self.device)
        self.labels = torch.randint(CLASSES, (options.batch,), device=self.device)

    def loss(self) -> Tensor:
        # A cache of casts would not live in the graph; every weight is cast once anyway.
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False
        ):
            logits = self.model(self.images)
        return nn.functional.cross_entropy(logits.float(), self.labels)

    def record(self) -> None:
        """Capture a step in a CUDA graph, so that the device need not wait for the host."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.recorded = graph

    def step(self) -> None:
        if self.recorded is not None:
            self.recorded.replay()
            return
        self.loss().backward()
        self.optimizer.step()
        if hasattr(self.model, "on_step_end"):
            self.model.on_step_end()
        self.optimizer.zero_grad()

    def seconds(self, action: Callable[[], Any]) -> float:
        self.wait()
        start = self.clock()
        action()
        self.wait()
        return self.clock() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def infer(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            self.model(self.images)

    def saved_bytes(self) -> int:
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


def measure_memory(name: str, options: argparse.Namespace) -> dict[str, int]:
    """Of this process, which runs one row only, and no graph."""
    options.graph = False
    run = Run(name, options)
    run.step()
    reset_peak(run.device)
    run.step()
    peak = peak_bytes(run.device)
    return {"peak": peak, "saved": run.saved_bytes(), "trainable": run.trainable}


def reset_peak(device: torch.device) -> None:
    """Forget what building the model took."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Allocated on the device; resident in a CPU process (Linux) since ``reset_peak``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = [row for row in status.read_text().splitlines() if row.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure_steps(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step of every row, taking turns."""
    runs = {name: Run(name, options) for name in options.rows}
    for run in runs.values():
        run.step()
        run.step()  # the second may still compile
        if options.graph:
            run.record()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            samples[name].append(run.seconds(run.step))
    return samples


def measure_inference(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per batch of the backbone alone, of SNELLA merged, and of SNELLA as it is."""
    runs = {"backbone": Run("full", options), "merged": Run("plain", options)}
    runs["merged"].model = runs["merged"].model.merge_and_unload()
    runs["adapted"] = Run("plain", options)
    for run in runs.values():
        run.model.eval()
        run.infer()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            samples[name].append(run.seconds(run.infer))
    return samples


def hardware(options: argparse.Namespace) -> dict[str, Any]:
    facts: dict[str, Any] = {"machine": platform.platform(), "threads": torch.get_num_threads()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        facts["cpu"] = names[0].partition(":")[2].strip() if names else ""
        facts["capability"] = torch.backends.cpu.get_cpu_capability()
    if options.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def report(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run, ratios included."""
    samples = measure_steps(options)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    inference = {n: statistics.median(v) for n, v in measure_inference(options).items()}
    memory = {name: in_own_process(name) for name in options.rows}

    def ratios(base: str) -> dict[str, float]:
        return {name: round(value / medians[base], 3) for name, value in medians.items()}

    packages = ("torch", "timm", "peft", "numpy", "snella")
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
        "hardware": hardware(options),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "model": options.model,
        "batch": options.batch,
        "dtype": options.dtype,
        "clock": options.clock,
        "graph": options.graph,
        "rank": RANK,
        "sparsity": SPARSITY,
        "step_seconds": medians,
        "step_samples": samples,
        "over_lora": ratios("lora") if "lora" in medians else {},
        "over_full": ratios("full") if "full" in medians else {},
        "over_reference": ratios("reference") if "reference" in medians else {},
        "memory_bytes": memory,
        "inference_seconds": inference,
        "inference_over_backbone": {
            name: round(value / inference["backbone"], 3) for name, value in inference.items()
        },
    }


def in_own_process(name: str) -> dict[str, int]:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def show(figures: dict[str, Any]) -> None:
    table = Table(title=f"{figures['model']}, batch {figures['batch']}, {figures['dtype']}")
    for column in ("row", "s/step", "x LoRA", "x full", "kept MB", "peak MB"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, seconds in figures["step_seconds"].items():
        memory = figures["memory_bytes"][name]
        table.add_row(
            name,
            f"{seconds:.3f}",
            f"{figures['over_lora'].get(name, float('nan')):.2f}",
            f"{figures['over_full'].get(name, float('nan')):.2f}",
            f"{memory['saved'] / 2**20:.0f}",
            f"{memory['peak'] / 2**20:.0f}",
        )
    console = Console()
    console.print(table)
    console.print(f"inference over the backbone alone: {figures['inference_over_backbone']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="a ViT of timm")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu, with one thread, on a busy machine"
    )
    parser.add_argument(
        "--graph", action="store_true", help="with CUDA: every row's step as one CUDA graph"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--memory-of", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.graph and options.device != "cuda":
        parser.error("--graph needs --device cuda.")
    torch.set_num_threads(options.threads)
    if options.memory_of:
        sys.stdout.write(json.dumps(measure_memory(options.memory_of, options)))
        return
    figures = report(options)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=2) + "\n")
    show(figures)


if __name__ == "__main__":
    main()
