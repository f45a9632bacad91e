"""Adapters whose tensors accelerate has put elsewhere (``cpu_offload``, ``disk_offload``).

accelerate brings a module's tensors when the module is called. Containers of parameters are never
called, so this does for them what accelerate's hooks do around a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

_CONTAINERS = ("snella_A", "snella_B", "snella_scalars", "snella_gate", "snella_budget")


def loaded(layer: nn.Module) -> AbstractContextManager[Any]:
    """The adapter's tensors are on their device inside."""
    own: Any = layer._modules
    if "_hf_hook" not in own["snella_A"].__dict__:  # all are, or none
        return nullcontext()
    containers = [own[name] for name in _CONTAINERS]
    hooked = [c for c in containers if "_hf_hook" in c.__dict__]
    return _brought(hooked) if hooked else nullcontext()


@contextmanager
def _brought(modules: list[nn.Module]) -> Iterator[None]:
    hooks: list[tuple[nn.Module, Any]] = [(module, module._hf_hook) for module in modules]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)
