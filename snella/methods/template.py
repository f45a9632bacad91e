"""NAME: one sentence on what the method computes.

    y = (W x + b) (1 + g),    one learned factor per output channel, g = 0 at the start

Replace the equation, the class and its settings by yours. Authors, title, venue (arXiv number).
ViT-B/16: 55,296 parameters, as `snella check NAME` counts them.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from snella.method import Method, replace, slots


class _Scaled(nn.Module):
    """A linear layer whose outputs (..., out) are scaled channel by channel."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(layer.weight.new_zeros(layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * (1 + self.gain).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer, the factors folded into its weight and bias."""
        self.layer.weight.mul_(1 + self.gain[:, None])
        if self.layer.bias is not None:
            self.layer.bias.mul_(1 + self.gain)
        return self.layer


class Template(Method):
    """Scale the outputs of the linear layers with one of ``roles``."""

    paper: ClassVar[str] = ""
    bibkey: ClassVar[str] = ""
    # The backbone families that `snella check` shall try.
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext"})

    # Typed hyper-parameters with their standard values, set by a row of the configuration.
    roles: tuple[Literal["proj", "fc1", "fc2"], ...] = ("proj", "fc1", "fc2")

    def adapt(self, model: nn.Module) -> None:
        """All weights are frozen before; parameters that are added here train."""
        for slot in slots(model, self.roles):
            layer = model.get_submodule(slot.path)
            assert isinstance(layer, nn.Linear)
            replace(model, slot.path, _Scaled(layer))

    def merge(self, model: nn.Module) -> None:
        """Give the plain backbone back, or leave this out if the method cannot."""
        for path, module in list(model.named_modules()):
            if isinstance(module, _Scaled):
                replace(model, path, module.merged())
