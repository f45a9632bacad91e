"""Train single entries of a frozen tensor: W' = W with W'[indices] = values.

Sparse methods (GPS, SPT) keep their update as one trainable vector per tensor, so that the
gradients they accumulate, the optimizer's state and the saved adapter have the size of what
trains. Training the values is training the tensor under a gradient mask.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize


class Entries(nn.Module):
    """The parametrization of one tensor: ``values`` (n,) at flat row-major ``indices`` (n,)."""

    indices: Tensor

    def __init__(self, tensor: Tensor, indices: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(tensor.detach().flatten()[indices])

    def forward(self, tensor: Tensor) -> Tensor:
        """Return a copy of ``tensor`` with the trained values written into it."""
        return tensor.flatten().scatter(0, self.indices, self.values).view_as(tensor)


def train_entries(model: nn.Module, name: str, indices: Tensor) -> None:
    """Let the entries of parameter ``name`` at flat ``indices`` (n,) int64 train, in place.

    The parameter itself stays frozen; the module that holds it keeps its type. Without indices the
    tensor stays as it is.
    """
    if not indices.numel():
        return
    path, _, tensor = name.rpartition(".")
    module = model.get_submodule(path)
    parametrize.register_parametrization(module, tensor, Entries(getattr(module, tensor), indices))


def restore_entries(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Prepare ``model`` for a ``state`` in which some parameters have trained entries."""
    for name, parameter in list(model.named_parameters()):
        path, _, tensor = name.rpartition(".")
        indices = state.get(f"{path}.parametrizations.{tensor}.0.indices")
        if indices is not None:
            train_entries(model, name, indices.to(parameter.device))


def fold_entries(model: nn.Module) -> None:
    """Write all trained entries into their tensors, in place; the modules are plain again."""
    fold_parametrizations(model, Entries)


def fold_parametrizations(model: nn.Module, kind: type[nn.Module]) -> None:
    """Give each tensor with a parametrization of type ``kind`` its current value, in place."""
    for module in list(model.modules()):
        for tensor in _parametrized_tensors(module, kind):
            parametrize.remove_parametrizations(module, tensor)
            if "bias" in module._parameters:  # comes after weight, as before
                module._parameters["bias"] = module._parameters.pop("bias")


def _parametrized_tensors(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    chains = module.parametrizations.items()  # type: ignore[union-attr, operator]
    return [tensor for tensor, chain in chains if isinstance(chain[0], kind)]
