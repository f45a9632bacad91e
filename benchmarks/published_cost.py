"""Time and memory of a training step: each row over its closest published or library code.

    python benchmarks/published_cost.py --authors CLONES --output benchmarks/results/published.json

CLONES is a folder with clones of the repositories in ``REPOSITORIES`` of published_models.py,
each under its own name (``git clone https://github.com/OWNER/NAME``, then ``git checkout`` of the
commit that the committed results were measured with). Without ``--authors`` only the rows of
Hugging Face PEFT are compared (library_models.py). Nothing is downloaded, and weights are random,
which changes neither time nor memory.

Both sides are ViT-B/16 at 224 px with the same hyper-parameters, the same trained parameters
(the JSON has both counts), AdamW and the same batch; ours is the method file with all hooks that
the training loop calls. The two take turns, and the ratio is that of the medians. Memory is what
a step adds to the model: tensors kept for backward, counted storage by storage, gradients, and
optimizer state. ``--peak`` also runs each side alone in a process and reports its peak resident
memory (on CUDA, allocated memory), the model included.

The two differ in one thing besides the method: SSF, SPT, GPS, VPT, AdaptFormer, FacT, SNELL(A)
and Sparse-Tuning write attention out and keep its matrices, where timm, and so ours, calls
torch's fused attention. ``TIMM_FUSED_ATTN=0`` in the environment makes ours write it out as well.
Rows of PEFT that adapt q, k and v apart do so on a split ``qkv`` on both sides. Where the numbers
of trained parameters differ, ``note`` in the JSON says why.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import timm.layers
import torch
from facts import facts
from library_models import LIBRARY
from measuring import (
    CLOCKS,
    MIB,
    Setup,
    Training,
    configured_method,
    configured_row,
    interleaved,
    medians,
)
from published_models import NOT_COMPARED, PUBLISHED, Published
from rich.console import Console
from rich.table import Table

from snella.runs.measure import PeakMemory

TIME_TARGET, MEMORY_TARGET = 1.3, 1.1


def comparisons(options: argparse.Namespace) -> dict[str, Published]:
    known = PUBLISHED | LIBRARY if options.authors else LIBRARY
    return {name: entry for name, entry in known.items() if name in (options.rows or known)}


def build_ours(entry: Published, options: argparse.Namespace) -> Training:
    return configured_row(configured_method(entry.row, **entry.settings), setup_of(options))


def build_theirs(entry: Published, options: argparse.Namespace, ours: Training) -> Training:
    root = (options.authors or Path()) / entry.repository
    return entry.build(root, setup_of(options), ours)


def setup_of(options: argparse.Namespace) -> Setup:
    return Setup(batch=options.batch, device=options.device)


def compare(name: str, entry: Published, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one row."""
    ours = build_ours(entry, options)
    theirs = build_theirs(entry, options, ours)
    steps = {"ours": ours.step, "theirs": theirs.step}
    samples = interleaved(steps, options.repeats, setup_of(options), options.clock)
    seconds = medians(samples)
    memory = {"ours": ours.memory(), "theirs": theirs.memory()}
    totals = {side: sum(parts.values()) for side, parts in memory.items()}
    figures = {
        "row": entry.row,
        "settings": dict(entry.settings),
        "against": entry.repository,
        "commit": commit(options.authors, entry.repository),
        "note": entry.note,
        "time_ratio": round(seconds["ours"] / seconds["theirs"], 3),
        "memory_ratio": round(totals["ours"] / totals["theirs"], 3),
        "seconds": seconds,
        "samples": samples,
        "memory_bytes": memory,
        "trainable": {"ours": ours.trainable(), "theirs": theirs.trainable()},
    }
    if options.peak:
        figures["peak_mib"] = {side: peak_alone(name, side) for side in ("ours", "theirs")}
    return figures


def commit(authors: Path | None, repository: str) -> str:
    if repository == "peft" or authors is None:
        return f"peft {peft.__version__}"
    command = ["git", "-C", str(authors / repository), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found or "unknown: not a clone"


def peak_alone(name: str, side: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name, side]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(name: str, side: str, options: argparse.Namespace) -> float | None:
    """Peak memory of this process in its second step, in MiB."""
    entry = comparisons(options)[name]
    training = build_ours(entry, options)
    if side == "theirs":
        training = build_theirs(entry, options, training)
        gc.collect()
    training.step()
    memory = PeakMemory(torch.device(options.device))
    with memory.watch():
        training.step()
    return memory.mib


def show(rows: dict[str, dict[str, Any]], failed: dict[str, str]) -> None:
    title = "Training step on ViT-B/16: ours over published or library code"
    table = Table("Comparison", "Code", title=title)
    for column in ("Ours s", "Theirs s", "Time", "Ours MiB", "Theirs MiB", "Memory", "Parameters"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        sides = row["seconds"].values()
        sizes = [sum(parts.values()) / MIB for parts in row["memory_bytes"].values()]
        table.add_row(
            name,
            row["against"],
            *(f"{value:.3f}" for value in sides),
            marked(row["time_ratio"], TIME_TARGET),
            *(f"{size:.0f}" for size in sizes),
            marked(row["memory_ratio"], MEMORY_TARGET),
            "equal" if len(set(row["trainable"].values())) == 1 else "differ",
        )
    console = Console()
    console.print(table)
    for name, why in (failed | NOT_COMPARED).items():
        console.print(f"{name}: {why}", markup=False)


def marked(ratio: float, target: float) -> str:
    return f"{ratio:.2f}" if ratio <= target else f"[red]{ratio:.2f}[/red]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--authors", type=Path, help="folder with clones of the authors' code")
    parser.add_argument("--rows", nargs="+", choices=[*PUBLISHED, *LIBRARY], metavar="ROW")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu, with one thread, on a busy machine"
    )
    parser.add_argument("--peak", action="store_true", help="also each side's peak, in a process")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if missing := set(options.rows or ()) - set(comparisons(options)):
        parser.error(f"{', '.join(sorted(missing))}: needs --authors")
    torch.set_num_threads(options.threads)
    if options.peak_of:
        sys.stdout.write(json.dumps(peak(*options.peak_of, options)))
        return
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    progress = Console(stderr=True)
    for name, entry in comparisons(options).items():
        try:
            rows[name] = compare(name, entry, options)
        except Exception as error:  # another's code, of another time: report it and go on
            failed[name] = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        progress.print(f"{name}: {rows[name]['time_ratio'] if name in rows else failed[name]}")
    show(rows, failed)
    if options.output:
        write(rows, failed, options)


def write(
    rows: dict[str, dict[str, Any]], failed: dict[str, str], options: argparse.Namespace
) -> None:
    about = facts("published_cost.py", options.device)
    about["command"] = about["command"].replace(str(options.authors), "CLONES")
    settings = {key: getattr(options, key) for key in ("batch", "repeats", "clock", "device")}
    settings["fused_attention"] = bool(timm.layers.use_fused_attn())
    targets = {"time": TIME_TARGET, "memory": MEMORY_TARGET}
    rest = {"failed": failed, "not_compared": NOT_COMPARED}
    content = about | {"settings": settings, "targets": targets, "rows": rows} | rest
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
