"""Memory and time of training Stable Diffusion 3 medium with SNELLA over LoRA, random weights.

The transformer has the shapes of SD3-medium (24 blocks, width 1536, 2.03 billion weights) at 512
pixels (64 x 64 latents, 77 + 77 text tokens): batch 1, 4 accumulation steps, bf16 weights with
float32 adapters, gradient checkpointing, AdamW; text encoders and VAE are not on the device. Each
method runs in a process of its own, so that its peak is its own.

    python benchmarks/generation_cost.py --out benchmarks/results/generation_cost_gpu.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from snella.methods.base import build_method as build
from snella.methods.base import prepare_model, trainable
from snella.methods.step import train_step
from snella.models.parameters import checkpoint_blocks, count_parameters
from snella.suite import config as configuration
from snella.suite import plan
from snella.tasks.generation.task import mean_flow_loss

MEDIUM: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
SMALL = MEDIUM | {
    "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "sample_size": 16,
    "pos_embed_max_size": 16, "joint_attention_dim": 64, "pooled_projection_dim": 64,
}  # fmt: skip
ROWS = ("lora-8", "snella-8")


def measure(row: str, steps: int, small: bool) -> dict[str, Any]:
    """Peak memory in MiB and seconds per optimizer step of one row, on this process's device."""
    from diffusers import SD3Transformer2DModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configuration.load()
    path, hyperparameters = plan.find_method(config, row)
    method = build(path, hyperparameters)
    sizes = SMALL if small else MEDIUM
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = SD3Transformer2DModel(**sizes)
    torch.set_default_dtype(torch.float32)
    prepare_model(method, model)
    model.to(device).train()
    checkpoint_blocks(model)
    method.on_epoch_start(model, 0, 10)
    groups = method.parameter_groups(model, 1e-4, 1e-4)
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    side = 16 if small else 64
    batch = {
        "latent": torch.randn(1, 16, side, side), "noise": torch.randn(1, 16, side, side),
        "sigma": torch.tensor([0.5]), "tokens": torch.randn(1, 154, sizes["joint_attention_dim"]),
        "pooled": torch.randn(1, sizes["pooled_projection_dim"]),
    }  # fmt: skip
    batch = {name: value.to(device) for name, value in batch.items()}
    seconds = []
    for step in range(steps + 2):
        if step == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        train_step(
            model, optimizer, [batch] * 4, mean_flow_loss, method=method, clip_grad=1.0,
            precision=lambda: torch.autocast(device.type, torch.bfloat16),
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    dtypes = sorted({str(p.dtype) for p in trainable(model).values()})
    return {
        "row": row, "trainable": count_parameters(model)["trainable"], "dtypes": dtypes,
        "peak_memory_mib": peak, "seconds_per_step": sorted(seconds[2:])[len(seconds[2:]) // 2],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }  # fmt: skip


def main() -> None:
    """Measure every row in its own process and write the ratios to the first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="tiny shapes: tries the script")
    parser.add_argument("--one", help="measure this row here and print it")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.steps, options.small)))  # noqa: T201
        return
    found = []
    for row in options.rows:
        command = [sys.executable, __file__, "--one", row, "--steps", str(options.steps)]
        command += ["--small"] if options.small else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)  # noqa: T201
    base = found[0]
    for row in found[1:]:
        row["time_ratio"] = row["seconds_per_step"] / base["seconds_per_step"]
        if base["peak_memory_mib"]:
            row["memory_ratio"] = row["peak_memory_mib"] / base["peak_memory_mib"]
    result = {
        "rows": found, "small": options.small, "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
