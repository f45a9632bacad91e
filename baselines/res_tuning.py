"""Res-Tuning: tuners beside the frozen operations, whose sum with them is the block's output.

    z = x + MHA(x̂) + Prefix(x̂),   y = z + FFN(ẑ) + Adapter(ẑ),   out = y + Prompt(x̂)
    Prefix: W_o Attn(Q, K_p, V_p);   Prompt: W_o Attn(Q, W_k P, W_v P);   Adapter: W_2 GELU(W_1 .)

Jiang et al., Res-Tuning: A Flexible and Efficient Tuning Paradigm via Unbinding Tuner from
Backbone, NeurIPS 2023 (arXiv 2310.19859): prefix tuning, adapters and prompts in unbound form, here
beside attention, MLP and block. ViT-B/16, length and width 10: 470,136 parameters; with the mean
VTAB-1k classifier 508,182, the 0.51 million that Sparse-Tuning's table prints. The authors' library
(ms-swift) has the adapter alone, with this initialisation; how the three attach is this file's
reading of the paper's equations, W_o included, and its memory-saving bypass is not here.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import CannotMerge, Method, Unsupported, blocks


class ResTuning(Method):
    """Three residual tuners per block; a length of 0 leaves one out."""

    paper: ClassVar[str] = "Res-Tuning (NeurIPS 2023)"
    bibkey: ClassVar[str] = "jiang2023restuning"
    licence: ClassVar[str] = "Apache-2.0"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    prefix: int = Field(default=10, ge=0, description="learned keys and values beside attention")
    adapter: int = Field(default=10, ge=0, description="width of the adapter beside the MLP")
    prompt: int = Field(default=10, ge=0, description="learned tokens beside the block")

    def adapt(self, model: nn.Module) -> None:
        for block in blocks(model):
            if type(block) is not Block or type(block.attn) is not Attention:
                raise Unsupported(f"Res-Tuning needs plain ViT blocks, not {type(block).__name__}.")
            like = block.attn.proj.weight
            dim = like.shape[0]
            tuners = nn.Module()
            if self.prefix:
                tuners.keys, tuners.values = (_tokens(self.prefix, dim) for _ in range(2))
            if self.adapter:
                tuners.adapter = _adapter(dim, self.adapter)
            if self.prompt:
                tuners.prompt = _tokens(self.prompt, dim)
            block.tuners = tuners.to(like)
            block.__class__ = _TunedBlock

    def merge(self, model: nn.Module) -> None:
        raise CannotMerge("Res-Tuning's tuners attend and activate beside the backbone")


def _tokens(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(count, dim)))


def _adapter(dim: int, width: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
    for layer in (layers[0], layers[2]):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(layer.bias, std=1e-6)
    return layers


class _TunedBlock(Block):
    """timm's block with the tuners' outputs added; stochastic depth spares them."""

    def forward(self, x: Tensor) -> Tensor:
        normed, tuners = self.norm1(x), self.tuners
        z = x + self.drop_path1(self.ls1(self.attn(normed)))
        if hasattr(tuners, "keys"):
            z = z + _attend(self.attn, normed, tuners.keys, tuners.values)
        hidden = self.norm2(z)
        y = z + self.drop_path2(self.ls2(self.mlp(hidden)))
        if hasattr(tuners, "adapter"):
            y = y + tuners.adapter(hidden)
        if hasattr(tuners, "prompt"):
            _, keys, values = self.attn.qkv(self.norm1(tuners.prompt)).chunk(3, dim=-1)
            y = y + _attend(self.attn, normed, keys, values)
        return y


def _attend(attention: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of tokens (B, N, D) to given keys and values (n, D), through W_o."""
    heads = attention.num_heads

    def split(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (heads, -1)).transpose(-3, -2)

    query = attention.q_norm(split(attention.qkv(x).chunk(3, dim=-1)[0]))
    key = attention.k_norm(split(keys.to(x.dtype).expand(len(x), -1, -1)))
    value = split(values.to(x.dtype).expand(len(x), -1, -1))
    mixed = F.scaled_dot_product_attention(
        query, key.to(query.dtype), value.to(query.dtype), scale=attention.scale
    )
    return attention.proj(attention.norm(mixed.transpose(1, 2).flatten(2)))
