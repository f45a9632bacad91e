"""Sparse-Tuning: fewer tokens in deeper layers, and adapters that see three earlier layers.

Liu et al., Sparse-Tuning: Adapting Vision Transformers with Efficient Fine-tuning and Inference
(arXiv 2405.14700), Eq. 3 and Figures 2 and 3. At layer n with attention output and residual z:

    in layers 4, 7, 10 of 12:  keep the ceil(keep (N - 1)) tokens with the largest class attention
        a_j (mean over heads), fuse the others into sum_j a_j z_j; earlier adapter outputs likewise
    DA_n = s (W_up ReLU(W_1 z + W_2 DA_{n-1} + W_3 DA_{n-3}) + b)    (W_2: n > 1, W_3: n > 3)
    x    = z + FFN(LN(z)) + DA_n

ViT-B/16: 279,808 parameters (0.32 M with the mean VTAB head) with bottleneck 8, 1,091,584 with 32;
8.85 / 11.65 / 15.46 GFLOPs for keep 0.5 / 0.7 / 0.9, where the paper states 8.94 / 11.65 / 15.62.
The public code (``variant="public_code"``) is another method: a nested 768-64-32-64-768 adapter
that sees its own layer alone, and after layers 3, 6, 9 and 12 the plain sum of the last adapter
outputs is added once more (after 3 also the embedded input; after 12 without the last output).
``links``, ``fusion`` and ``layers`` are the ablations of Tables 3 to 6.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from snella.method import CannotMerge, Method, Unsupported


class SparseTuning(Method):
    """Token sparsification and Dense Adapters in a plain ViT with a class token."""

    paper: ClassVar[str] = "Sparse-Tuning (arXiv 2405.14700)"
    bibkey: ClassVar[str] = "liu2024sparsetuning"
    licence: ClassVar[str] = "MIT"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    variant: Literal["paper", "public_code"] = "paper"
    keep: float = Field(0.7, gt=0.0, le=1.0, description="Share of tokens kept at each selection.")
    bottleneck: PositiveInt | None = Field(None, description="None: 8, public_code 64.")
    scale: PositiveFloat = 1.0
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    layers: tuple[Annotated[int, Field(ge=1, le=12)], ...] = Field(
        (4, 7, 10), description="Of 12 layers those that drop tokens; in proportion if not 12."
    )
    fuse: Literal["attention", "average", "none"] = Field(
        "attention",
        description="Weights of the dropped tokens in the fused one; average sums to 1.",
    )
    links: tuple[PositiveInt, ...] = Field(
        (1, 3), description="Earlier adapters that one sees, by how many layers before."
    )
    fusion: Literal["input", "inner", "output", "none"] = Field(
        "inner",
        description="Where an adapter's inputs are summed: before a shared down-projection, after "
        "one each, or after a whole adapter each; none: no adapters.",
    )

    @property
    def head_only(self) -> bool:  # type: ignore[override]
        return self.fusion == "none"

    def merge(self, model: nn.Module) -> None:
        raise CannotMerge(
            "which tokens are kept depends on the image, and its adapters are not linear"
        )

    def adapt(self, model: nn.Module) -> None:
        self._check(model)
        depth = len(model.blocks)
        layers = tuple(1 + depth * (layer - 1) // 12 for layer in self.layers)
        public = self.variant == "public_code"
        for number, block in enumerate(model.blocks, start=1):
            weight = block.mlp.fc1.weight
            width, place = weight.shape[1], {"device": weight.device, "dtype": weight.dtype}
            if public:
                block.adapter = _NestedAdapter(width, self.bottleneck or 64, place)
            else:
                inputs = 1 + sum(number > distance for distance in self.links)
                block.adapter = _dense_adapter(self, width, inputs, place)
            block.adapter.train(block.training)
        kind = _PublicBlocks if public else _SparseBlocks
        model.blocks = kind(model.blocks, layers, self.keep, self.fuse, self.links)

    def _check(self, model: nn.Module) -> None:
        plain = all(type(b) is Block and type(b.attn) is Attention for b in model.blocks)
        if not plain or model.cls_token is None or model.num_prefix_tokens != 1:
            raise Unsupported("Sparse-Tuning needs plain ViT blocks and exactly one class token.")
        if model.grad_checkpointing:
            raise Unsupported("Sparse-Tuning: gradient checkpointing would bypass the selection.")
        if self.variant == "public_code" and len(model.blocks) != 12:
            raise Unsupported("Sparse-Tuning's public code is written for exactly 12 blocks.")


class _SparseBlocks(nn.Sequential):
    """The backbone's own blocks, run with token selection and adapters (the paper's variant)."""

    def __init__(
        self,
        blocks: nn.Sequential,
        layers: tuple[int, ...],
        keep: float,
        fuse: str,
        links: tuple[int, ...],
    ) -> None:
        super().__init__(*blocks)
        self.training = blocks.training
        self.layers, self.keep, self.fuse, self.links = layers, keep, fuse, links

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D), class token first, to (B, M, D) with M <= N."""
        earlier: list[Tensor] = []
        for number, block in enumerate(self, start=1):
            x, *earlier = self.attend(number, block, x, earlier)
            linked = [earlier[-distance] for distance in self.links if distance <= len(earlier)]
            update = block.adapter(x, *linked)
            x = x + _feed_forward(block, x) + update
            earlier = [*earlier, update][-max(self.links, default=1) :]
        return x

    def attend(self, number: int, block: Block, x: Tensor, others: list[Tensor]) -> list[Tensor]:
        """Attention with residual, then selection of the same tokens in the result and others."""
        kept = math.ceil(self.keep * (x.shape[1] - 1))
        if number not in self.layers or kept == x.shape[1] - 1:
            return [x + _residual(block, block.attn(block.norm1(x))), *others]
        qkv: list[Tensor] = []
        with block.attn.qkv.register_forward_hook(lambda layer, inputs, out: qkv.append(out)):
            x = x + _residual(block, block.attn(block.norm1(x)))
        attention = class_attention(block.attn, qkv[0])
        index = attention.topk(kept, dim=1).indices
        weights = None if self.fuse == "none" else attention.scatter(1, index, 0.0)
        if self.fuse == "average":
            weights = weights / weights.sum(1, keepdim=True)
        return [sparsify(tokens, index, weights) for tokens in (x, *others)]


class _PublicBlocks(_SparseBlocks):
    """The public code's forward pass: adapters without links, sums between blocks."""

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for number, block in enumerate(self, start=1):
            (x,) = self.attend(number, block, x, [])
            update = block.adapter(x)
            x = x + _feed_forward(block, x) + update
            if number % 3 == 1 and number > 1:
                total = update
            elif number < 12:
                total = total + update
            if number % 3 == 0:
                x = x + total
        return x


def class_attention(attention: Attention, qkv: Tensor) -> Tensor:
    """Attention of the class token to the other tokens, mean over heads.

    ``qkv`` is the output (B, N, 3D) of the fused layer; returns (B, N - 1).
    """
    batch, tokens, _ = qkv.shape
    shape = (batch, tokens, 3, attention.num_heads, attention.head_dim)
    query, key, _ = qkv.reshape(shape).permute(2, 0, 3, 1, 4)
    query = attention.q_norm(query[:, :, :1]) * attention.scale
    scores = query @ attention.k_norm(key).transpose(-2, -1)
    return scores.softmax(-1).mean(1)[:, 0, 1:]


def sparsify(tokens: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """Keep the class token and ``index`` (B, k); append the fused rest unless weights are None.

    ``index`` counts from 0 without the class token; ``weights`` (B, N - 1) are 0 where kept.
    """
    rest = tokens[:, 1:]
    kept = rest.gather(1, index[..., None].expand(-1, -1, rest.shape[2]))
    parts = [tokens[:, :1], kept]
    if weights is not None:
        parts.append((weights[..., None].to(rest.dtype) * rest).sum(1, keepdim=True))
    return torch.cat(parts, dim=1)


def _residual(block: Block, branch: Tensor) -> Tensor:
    return block.drop_path1(block.ls1(branch))


def _feed_forward(block: Block, x: Tensor) -> Tensor:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _dense_adapter(
    method: SparseTuning, width: int, inputs: int, place: dict[str, Any]
) -> nn.Module:
    """The adapter of a layer with this many inputs, by where they are summed."""
    if method.fusion == "none":
        return _NoAdapter()
    sizes = width, method.bottleneck or 8, method.scale, method.dropout, place
    if method.fusion == "output":
        return _Sum(_DenseAdapter(1, *sizes) for _ in range(inputs))
    return _DenseAdapter(1 if method.fusion == "input" else inputs, *sizes)


class _DenseAdapter(nn.Module):
    """One down-projection per input, their sum through ReLU, one up-projection (zero at start).

    With a single down-projection the inputs are summed before it.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        bottleneck: int,
        scale: float,
        dropout: float,
        place: dict[str, Any],
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.ModuleList(nn.Linear(width, bottleneck, **place) for _ in range(inputs))
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, width, **place)
        for layer in self.down:
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, *links: Tensor) -> Tensor:
        inputs = (sum(links, x),) if len(self.down) == 1 else (x, *links)
        parts = [down(part) for down, part in zip(self.down, inputs, strict=True)]
        return self.scale * self.up(self.dropout(torch.relu(sum(parts[1:], parts[0]))))


class _Sum(nn.ModuleList):
    """An adapter for each input, summed."""

    def forward(self, *inputs: Tensor) -> Tensor:
        first, *others = (adapter(x) for adapter, x in zip(self, inputs, strict=True))
        return sum(others, first)


class _NoAdapter(nn.Module):
    """Nothing in an adapter's place."""

    def forward(self, x: Tensor, *links: Tensor) -> Tensor:
        return torch.zeros_like(x)


class _NestedAdapter(nn.Module):
    """up2(down3([s, up1(s)]) + r) with r = ReLU(down1 x), s = down2 r; never zero at start."""

    def __init__(self, width: int, outer: int, place: dict[str, Any]) -> None:
        super().__init__()
        inner = outer // 2
        self.down1 = nn.Linear(width, outer, **place)
        self.down2 = nn.Linear(outer, inner, **place)
        self.up1 = nn.Linear(inner, outer, **place)
        self.down3 = nn.Linear(outer + inner, outer, **place)
        self.up2 = nn.Linear(outer, width, **place)
        for layer in self.children():
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        r = torch.relu(self.down1(x))
        s = self.down2(r)
        return self.up2(self.down3(torch.cat([s, self.up1(s)], dim=-1)) + r)
