"""AdaptFormer: a scaled bottleneck in parallel to the feed-forward network of each block.

    z = x + MHA(LN1(x)),    x <- z + FFN(LN2(z)) + s (W_up ReLU(W_down z + b_down) + b_up)

Chen et al., AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition,
NeurIPS 2022 (arXiv 2205.13535). ViT-B/16: 1,189,632 parameters at bottleneck 64, 156,768 at 8.
Scale 0.1, dropout 0.1 and no norm before the branch are the released code's settings; other
repositories drop the biases or tune s per task.
"""

import math
from typing import ClassVar

from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from snella.method import CannotMerge, Method, Unsupported, blocks


class _Bottleneck(nn.Module):
    """Map tokens (B, N, width) to the scaled update of the same shape."""

    def __init__(self, width: int, bottleneck: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(width, bottleneck)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, z: Tensor) -> Tensor:
        return self.up(self.dropout(self.activation(self.down(z)))) * self.scale


class _ParallelBlock(Block):
    """timm's block with the third branch; the backbone's stochastic depth spares it."""

    def forward(self, x: Tensor) -> Tensor:
        z = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return z + self.drop_path2(self.ls2(self.mlp(self.norm2(z)))) + self.adapter(z)


class AdaptFormer(Method):
    """AdaptFormer, in timm's plain pre-norm blocks."""

    paper: ClassVar[str] = "AdaptFormer (NeurIPS 2022)"
    bibkey: ClassVar[str] = "chen2022adaptformer"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    bottleneck: int = Field(default=64, gt=0)
    scale: float = Field(default=0.1, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    def adapt(self, model: nn.Module) -> None:
        for block in blocks(model):
            if type(block) is not Block:
                raise Unsupported(
                    f"AdaptFormer needs timm's plain pre-norm Block, not {type(block).__name__}: "
                    "its branch starts between attention and feed-forward network."
                )
            weight = block.attn.proj.weight
            adapter = _Bottleneck(weight.shape[0], self.bottleneck, self.scale, self.dropout)
            block.adapter = adapter.to(weight)
            block.__class__ = _ParallelBlock

    def merge(self, model: nn.Module) -> None:
        """Always raises: the activation stands between the two projections."""
        raise CannotMerge("the activation between AdaptFormer's projections is not linear")
