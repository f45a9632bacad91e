"""The table and the plot of step_time.py, from its figures alone: no torch, so in a second.

python benchmarks/step_table.py benchmarks/results/step_time_gpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

KINDS = {"eager": (1e-3, "ms"), "graph": (1e-3, "graph ms"), "memory": (2**20, "MB")}
TARGETS = {
    "vit-b": {"eager": 0.95, "graph": 0.85, "memory": 0.9},
    "vit-l": {"eager": 1.35, "graph": 1.35, "memory": 0.9},
    "vit-h": {"eager": 1.35, "graph": 1.35, "memory": 0.9},
}
"""What SNELLA may take at most, over LoRA."""
LOOP_TARGET = 0.95
"""Images per second of the training loop over a plain one, at least."""


def show(found: dict[str, Any]) -> None:
    """Print what was measured, what failed and what was left out."""
    console = Console(width=118)
    table = Table(title=f"One training step, rank {found['rank']}, over LoRA of PEFT")
    table.add_column("model")
    table.add_column("row")
    for _, unit in KINDS.values():
        table.add_column(unit, justify="right")
        table.add_column("x LoRA", justify="right")
    for name, figures in found["models"].items():
        for row in figures.get("eager", {}):
            cells = [figures["title"], row]
            for kind, (unit, _) in KINDS.items():
                value = figures.get(kind, {}).get(row)
                over = figures.get(f"{kind}_over_lora", {}).get(row)
                cells.append("" if value is None else f"{value / unit:.1f}")
                cells.append(
                    _over(over, TARGETS.get(name, {}).get(kind) if row == "snella" else None)
                )
            table.add_row(*cells)
    console.print(table)
    loop = found.get("loop", {})
    if loop.get("rows"):
        console.print(_loop_table(loop))
    for name, figures in {**found["models"], "loop": loop}.items():
        for what, why in figures.get("failed", {}).items():
            console.print(f"{name}, {what}: {why}", style="red", soft_wrap=True)
    if found.get("left_out"):
        console.print(f"No time for {', '.join(found['left_out'])}.", style="yellow")


def _over(value: float | None, target: float | None) -> str:
    if value is None:
        return ""
    if target is None:
        return f"{value:.2f}"
    return f"[{'green' if value <= target else 'red'}]{value:.2f} (≤ {target:.2f})[/]"


def _loop_table(loop: dict[str, Any]) -> Table:
    table = Table(title=f"The training loop over a plain one, {loop['title']}")
    heads = ("row", "images/s", "x plain", "waits/epoch", "same adapter again", "peak MB")
    for head in heads:
        table.add_column(head, justify="left" if head == "row" else "right")
    for row, figures in loop["rows"].items():
        over, colour = figures["over_plain"], "green"
        if over < LOOP_TARGET:
            colour = "red"
        table.add_row(
            row,
            f"{figures['images_per_second']:.0f}",
            f"[{colour}]{over:.2f} (≥ {LOOP_TARGET:.2f})[/]",
            str(figures.get("waits_per_epoch", "")),
            str(figures.get("repeats_exactly", "")),
            f"{figures['peak_memory_mb'] or 0:.0f}",
        )
    return table


def plot(models: dict[str, Any], path: Path) -> None:
    """Time and memory over LoRA, per model."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = {"eager": "time, eager", "graph": "time, CUDA graph", "memory": "peak memory"}
    models = {name: figures for name, figures in models.items() if figures.get("eager")}
    present = {
        k: v for k, v in kinds.items() if any(f"{k}_over_lora" in f for f in models.values())
    }
    if not present:
        return
    figure, axes = pyplot.subplots(1, len(present), figsize=(3.6 * len(present), 3), sharey=True)
    for axis, (kind, title) in zip(
        [axes] if len(present) == 1 else axes, present.items(), strict=True
    ):
        for offset, row in ((-0.2, "full"), (0.2, "snella")):
            found = [f.get(f"{kind}_over_lora", {}).get(row) for f in models.values()]
            places = [place + offset for place, value in enumerate(found) if value is not None]
            values = [value for value in found if value is not None]
            bars = axis.barh(
                places, values, 0.38, label={"full": "full", "snella": "SNELLA-8"}[row]
            )
            axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{title}, over LoRA-8", fontsize=9)
        axis.set_yticks(range(len(models)), [f["title"] for f in models.values()], fontsize=8)
        axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    found = json.loads(file.read_text())
    show(found)
    if found["models"]:
        plot(found["models"], file.with_suffix(".png"))
