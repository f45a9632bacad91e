"""The number type of forward passes, as the protocol's ``precision`` says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Compute matrix products of the block in bf16 or fp16; ``fp32`` changes nothing.

    On a CPU the backward of torch's fused attention takes over ten times its forward in half
    precision, so that training there uses plain matrix products.
    """
    if precision == "fp32":
        yield
        return
    plain = device.type == "cpu" and torch.is_grad_enabled()
    attention = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
    with torch.autocast(device.type, HALF[precision]), attention:
        yield
