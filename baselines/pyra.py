"""PYRA: tokens are merged block by block, and re-activated by learned weights before they are.

    a = 2σ(w_a^T LN(s + t)),  b = 2σ(LN(s + t) w_b) - 1,  s <- s + (s · a) · b, then merged into t

Xiong et al., PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task
Adaptation, ECCV 2024 (arXiv 2403.09192), on LoRA of the fused qkv and ToMe's merging of similar
tokens (Bolya et al., ICLR 2023). s and t are the merged pairs (r, D), w_a has r entries per block,
w_b D, zero at the start. ViT-B/16, LoRA-8, ``low``: 294,912 + 8,448 + 176 = 303,536 parameters,
0.30 million as published; ``norm_affine``, which the public code has and the paper does not count,
adds 16,896. The last block's 778, which the class token cannot see, are left out. ``low`` and
``high`` are the released numbers of merged tokens per block, those of 12 blocks in proportion for
depths other than 12 and 24.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import CannotMerge, Method, Unsupported

SCHEDULES = {
    ("low", 12): (*[16] * 11, 10),
    ("low", 24): (*[8] * 23, 6),
    ("high", 12): (40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3),
    ("high", 24): (20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1),
}
"""Name and depth: those of ViT-B and ViT-L for 196 patches."""
_PATCHES = 196


class PYRA(Method):
    """LoRA with token merging whose merged tokens are re-activated."""

    paper: ClassVar[str] = "PYRA (ECCV 2024)"
    bibkey: ClassVar[str] = "xiong2024pyra"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    schedule: Literal["low", "high"] = "low"
    rank: int = Field(default=8, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1, description="before LoRA")
    norm_affine: bool = Field(default=False, description="train the norm of the pairs")

    def adapt(self, model: nn.Module) -> None:
        blocks: Any = model.blocks
        if any(type(b) is not Block or type(b.attn) is not Attention for b in blocks):
            raise Unsupported("PYRA needs plain ViT blocks.")
        if model.cls_token is None or model.num_prefix_tokens != 1:
            raise Unsupported("PYRA needs exactly one class token, which is never merged.")
        if model.grad_checkpointing:
            raise Unsupported("PYRA: gradient checkpointing would bypass the merging.")
        numbers = merged_tokens(self.schedule, len(blocks), model.patch_embed.num_patches)  # type: ignore[union-attr, arg-type]
        for block, number in zip(blocks, numbers, strict=True):
            like = block.attn.qkv.weight
            block.attn.lora = _LoRA(like, self.rank, self.dropout).to(like)
            if number and block is not blocks[-1]:  # nothing reads those of the last block
                block.reactivate = _Reactivate(number, like.shape[1], self.norm_affine).to(like)
        model.blocks = _MergingBlocks(blocks, numbers)

    def merge(self, model: nn.Module) -> None:
        raise CannotMerge("which tokens PYRA merges depends on the image")


def merged_tokens(schedule: str, depth: int, patches: int) -> list[int]:
    """How many tokens each block merges: the published numbers, in proportion."""
    published = SCHEDULES.get((schedule, depth), SCHEDULES[schedule, 12])
    places = [round(i * (len(published) - 1) / max(1, depth - 1)) for i in range(depth)]
    picked = [published[place] for place in places]
    share = sum(published) / _PATCHES * patches / sum(picked)
    numbers, left = [], patches + 1
    for count in picked:
        number = min(math.floor(count * share + 0.5), (left - 1) // 2)
        numbers.append(number)
        left -= number
    return numbers


class _MergingBlocks(nn.Sequential):
    """The backbone's own blocks with merging between attention and MLP."""

    def __init__(self, blocks: nn.Sequential, numbers: list[int]) -> None:
        super().__init__(*blocks)
        self.training = blocks.training
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D), class token first, to (B, M, D) with M < N."""
        size = x.new_ones(*x.shape[:2], 1)
        for block, number in zip(self, self.numbers, strict=True):
            mixed, keys = _attend(block.attn, block.norm1(x), size)
            x = x + block.drop_path1(block.ls1(mixed))
            if number:
                reactivate = getattr(block, "reactivate", None)
                x, size = merge_similar(x, size, keys, number, reactivate)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x


def _attend(attention: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in which a token counts as often as tokens went into it; and the mean key."""
    fused = attention.qkv(x) + attention.lora(x)
    fused = fused.reshape(*x.shape[:2], 3, attention.num_heads, -1)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=size.log()[:, None, None, :, 0].to(q.dtype), scale=attention.scale
    )
    return attention.proj(attention.norm(mixed.transpose(1, 2).flatten(2))), k.mean(1)


def merge_similar(
    x: Tensor, size: Tensor, keys: Tensor, number: int, reactivate: "_Reactivate | None"
) -> tuple[Tensor, Tensor]:
    """ToMe's step: every second token looks for its most similar other; the best pairs merge.

    ``x`` (B, N, D), ``size`` (B, N, 1), ``keys`` (B, N, d). The class token, the first, stays.
    """
    with torch.no_grad():
        metric = F.normalize(keys, dim=-1)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        scores[:, 0] = -math.inf
        best, partner = scores.max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        source, stay = order[:, :number], order[:, number:].sort(-1).values
        target = partner.gather(1, source)
    weighted = _merge(x * size, source, stay, target, reactivate)
    size = _merge(size, source, stay, target, None)
    return weighted / size, size


def _merge(
    x: Tensor, source: Tensor, stay: Tensor, target: Tensor, reactivate: "_Reactivate | None"
) -> Tensor:
    even, odd = x[:, ::2], x[:, 1::2]
    moved, partner = _pick(even, source), _pick(odd, target)
    if reactivate is not None:
        moved = reactivate(moved, partner)
    index = target[..., None].expand(-1, -1, x.shape[2])
    return torch.cat([_pick(even, stay), odd.scatter_add(1, index, moved.to(odd.dtype))], dim=1)


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


class _Reactivate(nn.Module):
    """Scale pairs (B, r, D) by channel and by token; the identity at the start."""

    def __init__(self, number: int, dim: int, affine: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(number, 1))
        self.channels = nn.Parameter(torch.zeros(1, dim))
        nn.init.kaiming_uniform_(self.tokens, a=math.sqrt(5))
        self.norm = nn.LayerNorm(dim, elementwise_affine=affine)

    def forward(self, moved: Tensor, partner: Tensor) -> Tensor:
        pairs = self.norm(moved + partner)
        by_channel = 2 * (self.tokens.T @ pairs).sigmoid()
        by_token = 2 * (pairs @ self.channels.T).sigmoid() - 1
        return moved + moved * by_channel * by_token


class _LoRA(nn.Module):
    """B A dropout(x) for the fused qkv."""

    def __init__(self, like: Tensor, rank: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(like.shape[1], rank, bias=False)
        self.up = nn.Linear(rank, like.shape[0], bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(self.dropout(x)))
