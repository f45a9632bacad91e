"""Where pixels lie while a model trains: on its device if they fit, else they travel pinned.

Pixels are uint8 all the way and normalised where the model is; float32 would be four times the way.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

SHARE = 0.25
"""Of the device's free memory, what one split may take."""
_RESIDENT: list[weakref.ref[Tensor]] = []


def resident(images: Tensor) -> Tensor:
    """A split's images on the device where training happens, if they fit; else as they are."""
    if not torch.cuda.is_available() or images.is_cuda:
        return images
    free, _ = torch.cuda.mem_get_info()
    if images.nbytes > SHARE * free:
        return images
    placed = images.to("cuda")
    _RESIDENT.append(weakref.ref(placed))
    return placed


def travel(values: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor on ``device``, by default where training happens; to a GPU without waiting for it.

    For that its memory is pinned: from other memory the host waits until the device is idle.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if values.is_cuda or device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def resident_bytes() -> int:
    """Device memory that holds data sets, which is none of a method's costs."""
    return sum(images.nbytes for held in _RESIDENT if (images := held()) is not None)
