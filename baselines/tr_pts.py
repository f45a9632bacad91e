"""TR-PTS: weights chosen by Fisher information train, and tokens chosen by attention go on.

    F_ij = Σ_images (∂L/∂W_ij)²;   n_l = entries of layer l among the top share of all F;
    each row of layer l trains its n_l / rows largest F;   kept tokens: top k of the class attention

Luo et al., TR-PTS: Task-Relevant Parameter and Token Selection for Efficient Tuning, ICCV 2025
(arXiv 2507.22872). The rest of the tokens is merged into one, weighted by attention. About
``share`` of the blocks' 84,934,656 weights in ViT-B/16: the paper trains 0.34 % (FGVC) and 0.60 %
(VTAB-1k). Its repository holds a README only (November 2026): how many images are scored, where
tokens are dropped and how many stay are this file's defaults, and biases stay frozen.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from snella.method import (
    Batch,
    CannotMerge,
    LossFn,
    Method,
    Unsupported,
    batch_gradients,
    first_images,
    fold_entries,
    slots,
    train_entries,
)


class TRPTS(Method):
    """Score, choose connections per neuron layer by layer, and drop tokens by attention."""

    paper: ClassVar[str] = "TR-PTS (ICCV 2025)"
    bibkey: ClassVar[str] = "luo2025trpts"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    share: float = Field(default=0.006, gt=0, le=1, description="of the blocks' weights")
    keep: float = Field(default=0.7, gt=0, le=1, description="of the tokens, at each of `layers`")
    layers: tuple[Annotated[int, Field(ge=1, le=12)], ...] = Field(
        default=(4, 7, 10), description="of 12 blocks those that drop tokens; in proportion if not"
    )
    images: int = Field(default=512, gt=0, description="training images that are scored")
    scoring_batch_size: int = Field(default=1, gt=0, description="1: the Fisher information itself")

    def adapt(self, model: nn.Module) -> None:
        blocks: Any = model.blocks
        plain = all(type(b) is Block and type(b.attn) is Attention for b in blocks)
        if not plain or model.cls_token is None or model.num_prefix_tokens != 1:
            raise Unsupported("TR-PTS needs plain ViT blocks and exactly one class token.")
        if model.grad_checkpointing:
            raise Unsupported("TR-PTS: gradient checkpointing would bypass the selection.")
        if self.keep < 1:
            layers = tuple(1 + len(blocks) * (layer - 1) // 12 for layer in self.layers)
            model.blocks = _SelectingBlocks(blocks, layers, self.keep)

    def calibrate(self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        names = list(dict.fromkeys(f"{slot.path}.weight" for slot in slots(model)))
        scored = first_images(batches, self.images, self.scoring_batch_size)
        fisher: dict[str, Tensor] = {}
        for gradients in batch_gradients(model, names, scored, loss_fn):
            for name, gradient in gradients.items():
                fisher[name] = fisher.get(name, 0) + gradient.square()
        for name, entries in choose(fisher, self.share).items():
            train_entries(model, name, entries)

    def merge(self, model: nn.Module) -> None:
        if self.keep < 1:
            raise CannotMerge("which tokens TR-PTS drops depends on the image")
        fold_entries(model)


def choose(fisher: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Flat indices that train, by tensor, from scores (rows, columns) of each.

    The global top ``share`` only says how many entries a layer gets; every row then trains the
    same number of its own best ones, the layer's number over its rows, rounded.
    """
    sizes = torch.tensor([score.numel() for score in fisher.values()])
    ranked = torch.cat([score.flatten() for score in fisher.values()])
    best = ranked.topk(max(1, round(share * len(ranked)))).indices
    owners = torch.bucketize(best.cpu(), sizes.cumsum(0), right=True)
    counts = owners.bincount(minlength=len(sizes)).tolist()
    chosen = {}
    for (name, score), count in zip(fisher.items(), counts, strict=True):
        rows, columns = score.shape
        per_row = min(columns, math.floor(count / rows + 0.5))
        if per_row:
            picked = score.topk(per_row, dim=1).indices.sort(dim=1).values
            starts = torch.arange(rows, device=score.device)[:, None] * columns
            chosen[name] = (starts + picked).flatten()
    if not chosen:  # fewer entries than rows everywhere: the best ones of all train
        name, score = max(fisher.items(), key=lambda item: float(item[1].max()))
        chosen[name] = score.flatten().topk(min(len(best), score.numel())).indices.sort().values
    return chosen


class _SelectingBlocks(nn.Sequential):
    """The backbone's own blocks; at some, tokens that the class token ignores merge into one."""

    def __init__(self, blocks: nn.Sequential, layers: tuple[int, ...], keep: float) -> None:
        super().__init__(*blocks)
        self.training = blocks.training
        self.layers, self.keep = layers, keep

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D), class token first, to (B, M, D) with M <= N."""
        for number, block in enumerate(self, start=1):
            kept = math.ceil(self.keep * (x.shape[1] - 1))
            selects = number in self.layers and kept < x.shape[1] - 1
            attention = class_attention(block, x) if selects else None
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            if attention is not None:
                x = merge_rest(x, attention, kept)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x


def class_attention(block: Any, x: Tensor) -> Tensor:
    """Attention of the class token to the others (B, N - 1), mean over heads."""
    attention = block.attn
    fused = attention.qkv(block.norm1(x)).reshape(*x.shape[:2], 3, attention.num_heads, -1)
    query, key, _ = fused.permute(2, 0, 3, 1, 4)
    scores = attention.q_norm(query[:, :, :1]) @ attention.k_norm(key).transpose(-2, -1)
    return (scores * attention.scale).softmax(-1).mean(1)[:, 0, 1:]


def merge_rest(x: Tensor, attention: Tensor, kept: int) -> Tensor:
    """The class token, the ``kept`` best others, and the attention-weighted mean of the rest."""
    rest = x[:, 1:]
    index = attention.topk(kept, dim=1).indices
    chosen = rest.gather(1, index[..., None].expand(-1, -1, rest.shape[2]))
    weights = attention.scatter(1, index, 0.0)
    weights = (weights / weights.sum(1, keepdim=True).clamp_min(1e-12)).to(rest.dtype)
    return torch.cat([x[:, :1], chosen, (weights[..., None] * rest).sum(1, keepdim=True)], dim=1)
