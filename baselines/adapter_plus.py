"""Adapter+: a bottleneck adapter after each block, with one learned scale per channel.

    x <- Block(x),    x <- x + s * DropPath(W_up GELU(W_down x + b_down) + b_up),    s in R^width

Steitz and Roth, Adapters Strike Back, CVPR 2024 (arXiv 2406.06820): post position, channel-wise
scaling, and the initialisation of Houlsby et al. (both projections N(0, 0.01) truncated at two
standard deviations, biases 0, s = 1). ViT-B/16: 165,984 parameters at bottleneck 8 and 313,536 at
16. The released code is followed; it trains with drop-path 0.1 in the backbone as well, which
belongs to the protocol here.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from timm.layers import DropPath
from torch import Tensor, nn

from snella.method import CannotMerge, Method, blocks, slots

_STD = 0.01


class _Bottleneck(nn.Module):
    """Map (..., width) to the adapter's scaled update of the same shape."""

    def __init__(self, width: int, bottleneck: int, drop_path: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.activation = nn.GELU()
        self.up = nn.Linear(bottleneck, width)
        self.drop_path = DropPath(drop_path)
        self.scale = nn.Parameter(torch.ones(width))
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=_STD, a=-2 * _STD, b=2 * _STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        update = self.drop_path(self.up(self.activation(self.down(x))))
        return update * self.scale.to(update.dtype)


class AdapterPlus(Method):
    """Adapter+, on the output of each block."""

    paper: ClassVar[str] = "Adapter+ (CVPR 2024)"
    bibkey: ClassVar[str] = "steitz2024adapterplus"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin"})

    bottleneck: int = Field(default=8, gt=0)
    drop_path: float = Field(default=0.1, ge=0, lt=1)

    def adapt(self, model: nn.Module) -> None:
        outputs = slots(model, ("fc2",))
        for block, slot in zip(blocks(model), outputs, strict=True):
            weight = model.get_submodule(slot.path).weight
            adapter = _Bottleneck(weight.shape[0], self.bottleneck, self.drop_path)
            block.adapter = adapter.to(weight)
            block.register_forward_hook(_add_update)

    def merge(self, model: nn.Module) -> None:
        """Always raises: the activation stands between the two projections."""
        raise CannotMerge("the activation between Adapter+'s projections is not linear")


def _add_update(block: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output + block.adapter(output)
