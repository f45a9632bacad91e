"""Convpass: a bottleneck with a 3x3 convolution over the token grid beside MHA and FFN.

    C(x) = W_up a(conv3x3(a(W_down x))),  a = QuickGELU
    x <- x + MHA(LN1(x)) + s C_1(LN1(x)),    x <- x + FFN(LN2(x)) + s C_2(LN2(x))

Jie and Deng, Convolutional Bypasses Are Better Vision Transformer Adapters, 2022
(arXiv 2207.07039). ViT-B/16: 327,552 parameters (163,776 for attention only). The class token is
a 1x1 map, so only the convolution's centre reaches it. The released code fixes width 768 and a
14x14 grid, which are read from the backbone here; it draws stochastic depth for bypass and branch
separately, here they are dropped together.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from snella.method import CannotMerge, Method, blocks


class _Bypass(nn.Module):
    """Map tokens (B, prefix + rows * columns, width) to the scaled update of the same shape."""

    def __init__(
        self,
        width: int,
        bottleneck: int,
        scale: float,
        dropout: float,
        grid: tuple[int, int],
        prefix: int,
    ) -> None:
        super().__init__()
        self.grid, self.prefix, self.scale = grid, prefix, scale
        self.down = nn.Linear(width, bottleneck)
        self.conv = nn.Conv2d(bottleneck, bottleneck, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, width)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self._start_as_identity()

    def forward(self, x: Tensor) -> Tensor:
        h = _quick_gelu(self.down(x))
        tokens, patches = h[:, : self.prefix], h[:, self.prefix :]
        image = patches.transpose(1, 2).unflatten(2, self.grid)
        patches = self.conv(image).flatten(2).transpose(1, 2)
        tokens = F.linear(tokens, self.conv.weight[:, :, 1, 1], self.conv.bias)
        h = self.dropout(_quick_gelu(torch.cat([tokens, patches], dim=1)))
        return self.up(h) * self.scale

    @torch.no_grad()
    def _start_as_identity(self) -> None:
        self.conv.weight.zero_()
        self.conv.weight[:, :, 1, 1] += torch.eye(len(self.conv.weight))


class Convpass(Method):
    """Convolutional bypasses beside attention and feed-forward network.

    The authors choose ``scale`` (0.01 to 100) and the convolution's start per task.
    """

    paper: ClassVar[str] = "Convpass (arXiv 2022)"
    bibkey: ClassVar[str] = "jie2022convpass"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    bottleneck: int = Field(default=8, gt=0)
    scale: float = Field(default=1.0, gt=0)
    convolution: Literal["identity", "xavier"] = "identity"
    attention_only: bool = False
    dropout: float = Field(default=0.1, ge=0, lt=1)

    def adapt(self, model: Any) -> None:
        for block in blocks(model):
            for branch in (block.attn,) if self.attention_only else (block.attn, block.mlp):
                bypass = _Bypass(
                    model.embed_dim,
                    self.bottleneck,
                    self.scale,
                    self.dropout,
                    grid=model.patch_embed.grid_size,
                    prefix=model.num_prefix_tokens,
                )
                if self.convolution == "xavier":
                    nn.init.xavier_uniform_(bypass.conv.weight)
                branch.bypass = bypass.to(model.patch_embed.proj.weight)
                branch.register_forward_hook(_add_bypass)

    def merge(self, model: nn.Module) -> None:
        """Always raises: the activation stands between the two projections."""
        raise CannotMerge("the activation between Convpass's projections is not linear")


def _add_bypass(branch: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + branch.bypass(args[0])


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
