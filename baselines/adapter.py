"""Bottleneck adapter after the feed-forward network of each block.

    h = FFN(LN(x)),    x <- x + h + W_up a(W_down h + b_down) + b_up

Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019 (arXiv 1902.00751), with
one adapter per block. ViT-B/16: 156,768 parameters at bottleneck 8, 599,424 at 32.

Two codes share the name. The widely quoted Adapter-8 numbers on VTAB-1k are NOAH's
(``activation: quickgelu, initialisation: xavier, dropout: 0.1``, so the network is perturbed from
the start), while the papers that quote them describe a ReLU; the default is that ReLU with the
usual zero up-projection. Stochastic depth drops h before NOAH's adapter; here it drops both.
VPT's adapter (GELU, width 96) starts with *both* projections at zero: then neither ever receives a
gradient and only the up-projection's bias learns, which is why the "Adapter" rows copied from it
lie close to linear probing. That start is not offered.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from snella.method import CannotMerge, Method, slots


class _QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "quickgelu": _QuickGELU}


class _Bottleneck(nn.Module):
    """Map (..., width) to the adapter's update of the same shape, without the residual."""

    def __init__(self, width: int, bottleneck: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.activation = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.dropout(self.activation(self.down(h))))


class Adapter(Method):
    """Sequential bottleneck adapter.

    ``initialisation``: ``zero_up`` starts as the pre-trained network (Kaiming-uniform down,
    zero up); ``xavier`` starts both projections Xavier-uniform with biases N(0, 1e-6).
    """

    paper: ClassVar[str] = "Adapter (ICML 2019)"
    bibkey: ClassVar[str] = "houlsby2019adapter"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam"})

    bottleneck: int = Field(default=8, gt=0)
    activation: Literal["relu", "gelu", "quickgelu"] = "relu"
    initialisation: Literal["zero_up", "xavier"] = "zero_up"
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def adapt(self, model: nn.Module) -> None:
        for slot in slots(model, ("fc2",)):
            ffn = model.get_submodule(slot.path.rpartition(".")[0])
            weight = model.get_submodule(slot.path).weight
            adapter = _Bottleneck(weight.shape[0], self.bottleneck, self.activation, self.dropout)
            self._initialise(adapter)
            ffn.adapter = adapter.to(weight)
            ffn.register_forward_hook(_add_update)

    def merge(self, model: nn.Module) -> None:
        """Always raises: the activation stands between the two projections."""
        raise CannotMerge("the activation between the adapter's projections is not linear")

    def _initialise(self, adapter: _Bottleneck) -> None:
        if self.initialisation == "xavier":
            for layer in (adapter.down, adapter.up):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)
        else:
            nn.init.kaiming_uniform_(adapter.down.weight, a=math.sqrt(5))
            for zero in (adapter.down.bias, adapter.up.weight, adapter.up.bias):
                nn.init.zeros_(zero)


def _add_update(ffn: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output + ffn.adapter(output)
