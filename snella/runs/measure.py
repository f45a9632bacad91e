"""Cost of a method, measured the same way for all: memory, GFLOPs, seconds per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snella.data.placement import resident_bytes

MIB = 1024**2


class PeakMemory:
    """Largest memory seen while :meth:`watch` was active, in MiB.

    On CUDA the allocator's peak; on the CPU the process's resident set, whose high-water mark
    Linux lets a process reset. Evaluation is left out, so that the figure is training's alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib: float | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Include what happens inside the block."""
        self._reset()
        try:
            yield
        finally:
            seen = self._read()
            if seen is not None:
                self.mib = max(seen, self.mib or 0.0)

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                self.device = torch.device("meta")  # cannot be measured here: stays None

    def _read(self) -> float | None:
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - resident_bytes()) / MIB
        if self.device.type == "meta":
            return None
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024


@torch.inference_mode()
def gflops(
    model: nn.Module,
    inputs: Any,
    forward: Callable[[nn.Module, Any], Tensor] = lambda model, inputs: model(inputs),
) -> float:
    """Multiply-adds of one forward pass of one example, in units of 10^9, as the papers count.

    ``inputs`` is what ``forward`` takes besides the model, by default an image (1, 3, H, W).
    Convolutions, linear layers and attention products are counted,
    and 5 per element of a layer norm; activations and additions are not, which is fvcore's
    convention (ViT-B/16 at 224 px: 17.58).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model.eval()
    norms = {torch.ops.aten.native_layer_norm: _layer_norm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=norms)
    with counter, sdpa_kernel(SDPBackend.MATH):
        forward(model, inputs)
    return counter.get_total_flops() / 2 / 1e9


def _layer_norm_flops(shape: Sequence[int], *others: Any, **named: Any) -> int:
    """Twice 5 per element, since a multiply-add counts as two operations here."""
    return 10 * math.prod(shape)
