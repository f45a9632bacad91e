"""Memory for values that are used up at once, reused from call to call on the CPU."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_local = threading.local()


class Scratch:
    """Named buffers for values that are used up at once.

    On the CPU they outlive the call: fresh memory costs more than the arithmetic on it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.flat: dict[str, Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @staticmethod
    def like(tensor: Tensor, dtype: torch.dtype) -> Scratch:
        """The buffers of this thread for a CPU tensor's kind, or new ones for a device."""
        if tensor.device.type != "cpu":
            return Scratch(tensor.device, dtype)
        pool: dict[torch.dtype, Scratch] = _local.__dict__.setdefault("pool", {})
        if dtype not in pool:
            pool[dtype] = Scratch(tensor.device, dtype)
        return pool[dtype]

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor, valid until its name is taken again."""
        view = self.views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            buffer = self.flat.get(name)
            with torch.inference_mode(False):
                if buffer is None or buffer.numel() < size:
                    self.views = {key: v for key, v in self.views.items() if key[0] != name}
                    buffer = torch.empty(size, device=self.device, dtype=self.dtype)
                    self.flat[name] = buffer
                view = self.views[name, shape] = buffer[:size].view(shape)
        return view


class FreshMemory(Scratch):
    """Hands out memory that stays valid, for tiles that are kept until backward."""

    def take(self, name: str, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)
