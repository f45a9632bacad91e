"""A model's parameters: which train, how many there are, and whether the frozen ones stayed."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from snella.models.families import blocks, head

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def freeze(model: nn.Module) -> None:
    """Freeze every parameter."""
    model.requires_grad_(False)


def no_decay(name: str, parameter: Tensor) -> bool:
    """Whether weight decay spares a parameter: vectors, biases, tokens, position embeddings."""
    return parameter.ndim <= 1 or name.endswith((".bias", "cls_token", "pos_embed"))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of trainable parameters without the head, of the head, and of all."""
    task_head = head(model)
    in_head = {id(p) for p in task_head.parameters()} if task_head is not None else set()
    sizes = [(id(p) in in_head, p.requires_grad, p.numel()) for p in model.parameters()]
    return {
        "trainable": sum(n for of_head, trains, n in sizes if trains and not of_head),
        "head": sum(n for of_head, trains, n in sizes if trains and of_head),
        "total": sum(n for _, _, n in sizes),
    }


def frozen_checksums(model: nn.Module) -> dict[str, int]:
    """The sum of each frozen parameter's bit patterns, by name: cheap enough for every epoch."""
    frozen = [(name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen:
        return {}
    sums = [p.contiguous().view(_BITS[p.element_size()]).sum(dtype=torch.int64) for _, p in frozen]
    return dict(zip((name for name, _ in frozen), torch.stack(sums).tolist(), strict=True))


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Where the generators of :func:`seed_everything` stand, as ``torch.load`` reads it safely."""
    name, key, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(key, np.int64)), *rest),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to where :func:`random_state` found them."""
    name, key, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, key.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu())


def checkpoint_blocks(model: nn.Module) -> None:
    """Recompute each block's activations in backward instead of keeping them, in place."""
    for block in blocks(model):
        _checkpoint(block)


def _checkpoint(block: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    forward = block.forward
    options: dict[str, Any] = {"use_reentrant": False, "context_fn": _recomputing}

    def recomputed(*inputs: Any, **named: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, **options, **named)

    block.forward = recomputed


def _recomputing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a forward and of its recomputation, which chooses attention as it was chosen."""
    fused = torch.backends.cuda.flash_sdp_enabled()
    return nullcontext(), nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
