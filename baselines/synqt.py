"""SynQT: synthesised queries collect features from a frozen backbone; no gradient enters it.

    p_l = QSM_l(A_l(e_l + s f_{l-1})),   f_l, g_l, h_l = block l with query p_l,
    logits = W LN(mean_i w_i u_i),  u = [f_L; f_1..f_L; g; h] + A(LN(.)),  w = [1; tanh(V u_0)]

Zhang et al., Parameter-Efficient and Memory-Efficient Tuning for Vision Transformer: A
Disentangled Approach, ECCV 2024 (arXiv 2407.06964). g and h are the attention's and the MLP's
share of f; A is a bottleneck of 48 with a skip connection, QSM single-head attention among the
queries with bottlenecks of 8 in place of its matrices. ViT-B/16: 2,595,181 + 9,216 T parameters,
T = 1, 4 or 16 per data set. The public code holds 18,469 more that it never uses; with them and the
mean classifier the mean over VTAB-1k is 2,735,125, published as 2.73 million.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from timm.layers import DropPath
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import CannotMerge, Method, Unsupported


class SynQT(Method):
    """Task-specific queries beside the frozen tokens, and a head that weighs their features."""

    paper: ClassVar[str] = "SynQT (ECCV 2024)"
    bibkey: ClassVar[str] = "zhang2024synqt"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    queries: int = Field(default=4, gt=0, description="T, 1, 4 or 16 per data set")
    width: int = Field(default=48, gt=0, description="of the bottlenecks")
    attention_width: int = Field(default=8, gt=0, description="of those in the queries' attention")
    feature_scale: float = Field(default=1.0, ge=0, description="s at the start")
    attention_scale: float = Field(default=1.0, ge=0)
    mlp_scale: float = Field(default=1.0, ge=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    drop_path: float = Field(default=0.3, ge=0, lt=1, description="of the features in the head")

    def adapt(self, model: nn.Module) -> None:
        blocks: Any = model.blocks
        if any(type(b) is not Block or type(b.attn) is not Attention for b in blocks):
            raise Unsupported("SynQT needs plain ViT blocks.")
        if model.grad_checkpointing or model.global_pool != "token":
            raise Unsupported("SynQT replaces the class token, without gradient checkpointing.")
        model.blocks = _SynthesisedBlocks(blocks, self)
        model.norm.requires_grad_(True)  # type: ignore[union-attr]

    def merge(self, model: nn.Module) -> None:
        raise CannotMerge("SynQT's queries run beside the backbone and feed the classifier")


class _SynthesisedBlocks(nn.Sequential):
    """The backbone's own blocks; returns the synthesised feature as the only token (B, 1, D)."""

    def __init__(self, blocks: nn.Sequential, settings: SynQT) -> None:
        super().__init__(*blocks)
        like = blocks[0].attn.proj.weight
        dim = like.shape[0]
        self.drop = settings.dropout
        query = torch.empty(len(blocks), settings.queries, dim).uniform_(-1, 1)
        side = nn.Module()
        side.query = nn.Parameter(query)
        side.scale = nn.Parameter(torch.full((1,), settings.feature_scale))
        side.prompt = nn.ModuleList(
            _Bottleneck(dim, settings.width, settings.dropout) for _ in blocks
        )
        side.synthesis = nn.ModuleList(_Synthesis(dim, settings) for _ in blocks)
        side.head = _Combine(dim, 3 * len(blocks) + 1, settings)
        self.side = side.to(like)
        self.train(blocks.training)

    def __iter__(self) -> Any:
        return (m for n, m in self._modules.items() if n != "side")

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D) to the feature (B, 1, D)."""
        side: Any = self.side
        kept: list[list[Tensor]] = [[], [], []]
        for i, block in enumerate(self):
            query = side.query[i].to(x.dtype).expand(len(x), -1, -1)
            if i > 0:
                query = query + kept[0][-1] * side.scale
            query = side.synthesis[i](side.prompt[i](query))
            query = F.dropout(query, self.drop, self.training)
            x, *features = _with_query(block, x, query)
            for store, feature in zip(kept, features, strict=True):
                store.append(feature.mean(1, keepdim=True))
        return side.head(torch.cat([kept[0][-1], *kept[0], *kept[1], *kept[2]], dim=1))


def _with_query(block: Any, x: Tensor, query: Tensor) -> tuple[Tensor, ...]:
    """The block's tokens, and of ``query`` (B, T, D) the outcome and both branches' shares."""
    attention = block.attn
    q, k, v = _heads(attention, block.norm1(x))
    asked = _heads(attention, block.norm1(query))[0]
    mixed = [
        F.scaled_dot_product_attention(
            attention.q_norm(part), attention.k_norm(k), v, scale=attention.scale
        )
        for part in (q, asked)
    ]
    own, read = (
        block.drop_path1(block.ls1(attention.proj(attention.norm(m.transpose(1, 2).flatten(2)))))
        for m in mixed
    )
    x = x + own
    query = query + read
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    change = block.drop_path2(block.ls2(block.mlp(block.norm2(query))))
    return x, query + change, read, change


def _heads(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    fused = attention.qkv(x).reshape(*x.shape[:2], 3, attention.num_heads, -1)
    return fused.permute(2, 0, 3, 1, 4).unbind(0)


class _Bottleneck(nn.Module):
    """x + W_2 GELU(W_1 x), with torch's own initialisation, as released."""

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.up(self.dropout(F.gelu(self.down(x)))))


class _Synthesis(nn.Module):
    """One transformer block on the queries, made of bottlenecks."""

    def __init__(self, dim: int, settings: SynQT) -> None:
        super().__init__()
        names = ("query", "key", "value", "out")
        small = settings.attention_width
        self.attention = nn.ModuleDict({name: _Bottleneck(dim, small, 0.0) for name in names})
        self.norms = nn.ModuleDict({n: nn.LayerNorm(dim) for n in ("attention", "q", "kv", "mlp")})
        self.mlp = _Bottleneck(dim, settings.width, settings.dropout)
        self.scales = nn.Parameter(torch.tensor([settings.attention_scale, settings.mlp_scale]))
        self.drop = settings.dropout

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms["attention"](x)
        asked, other = self.norms["q"](y), self.norms["kv"](y)
        query, key, value = (
            self.attention[name](z)
            for name, z in (("query", asked), ("key", other), ("value", other))
        )
        scores = query @ key.transpose(-2, -1) * x.shape[-1] ** -0.5
        mixed = F.dropout(scores.softmax(-1), self.drop, self.training) @ value
        mixed = F.dropout(self.attention["out"](mixed), self.drop, self.training)
        x = x + mixed * self.scales[0]
        return x + self.mlp(self.norms["mlp"](x)) * self.scales[1]


class _Combine(nn.Module):
    """Features (B, n, D) to their weighted mean (B, 1, D); the first one sets the weights."""

    def __init__(self, dim: int, count: int, settings: SynQT) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.refine = _Bottleneck(dim, settings.width, settings.dropout)
        self.weigh = nn.Linear(dim, count - 1)
        self.dropout = nn.Dropout(settings.dropout)
        self.drop_path = DropPath(settings.drop_path)

    def forward(self, features: Tensor) -> Tensor:
        first, rest = (features + self.refine(self.norm(features))).tensor_split([1], dim=1)
        kept = self.drop_path(rest.flatten(0, 1)).view_as(rest)  # each feature by itself
        weights = self.dropout(F.gelu(self.weigh(first[:, 0]))).tanh()[..., None]
        return torch.cat([first, weights * kept], dim=1).mean(1, keepdim=True)
