"""VQT: learned queries read every block's features and leave them as they are.

    Z'_l = Attention(Q = P_l, K = Z_l, V = Z_l), through block l;  logits = W [ẑ_cls; ẑ'_1; .. ẑ'_L]

Tu et al., Visual Query Tuning: Towards Effective Usage of Intermediate Representations for
Parameter and Memory Efficient Transfer Learning, CVPR 2023 (arXiv 2212.03220). ViT-B/16: 9,216 T
parameters for T queries per block; the classifier sees 768 (1 + 12 T) features, each block's and
the class token's brought to length 1, and is 1 + 12 T times the usual one. No gradient passes
through the backbone's own tokens, because nothing before them trains. ``lasso`` is the group lasso
over the classifier's inputs with which the paper chooses features.
"""

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import Batch, CannotMerge, LossFn, Method, Unsupported, head, replace


class VQT(Method):
    """Query-only tokens in each block, and a linear classifier on all of their outputs."""

    paper: ClassVar[str] = "VQT (CVPR 2023)"
    bibkey: ClassVar[str] = "tu2023vqt"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})
    replaces_head: ClassVar[bool] = True

    queries: int = Field(default=1, gt=0, description="T, per block")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="of the query tokens")
    lasso: float = Field(default=0.0, ge=0, description="weight of the classifier's group lasso")

    def adapt(self, model: nn.Module) -> None:
        linear: Any = head(model)
        plain = all(type(b) is Block and type(b.attn) is Attention for b in model.blocks)  # type: ignore[union-attr]
        if not plain or not isinstance(linear, nn.Linear):
            raise Unsupported("VQT needs plain ViT blocks and a linear classifier.")
        if model.grad_checkpointing or model.global_pool != "token":
            raise Unsupported("VQT reads the class token, without gradient checkpointing.")
        model.blocks = _QueriedBlocks(model.blocks, self, model.patch_embed.proj.weight)  # type: ignore[arg-type]
        features = linear.in_features * (1 + self.queries * len(model.blocks))
        wide = nn.Linear(features, linear.out_features).to(linear.weight)
        nn.init.trunc_normal_(wide.weight, std=0.02)
        nn.init.zeros_(wide.bias)
        path = next(name for name, module in model.named_modules() if module is linear)
        replace(model, path, wide)
        wide.register_forward_pre_hook(model.blocks.features)

    def auxiliary_loss(self, model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor | None:
        """The sum over the classifier's inputs of their weights' lengths."""
        linear = head(model)
        if self.lasso == 0 or not isinstance(linear, nn.Linear):
            return None
        return self.lasso * linear.weight.norm(dim=0).sum()

    def merge(self, model: nn.Module) -> None:
        raise CannotMerge("VQT's queries are tokens, and its classifier reads every block")


class _QueriedBlocks(nn.Sequential):
    """The backbone's own blocks; beside each, its queries go through the same layers."""

    def __init__(self, blocks: nn.Sequential, settings: VQT, kernel: Tensor) -> None:
        super().__init__(*blocks)
        self.training = blocks.training
        self.drop = settings.dropout
        width = kernel.shape[0]
        bound = math.sqrt(6 / (3 * kernel.shape[-1] * kernel.shape[-2] + width))
        start = torch.empty(len(blocks), settings.queries, width).uniform_(-bound, bound)
        self.queries = nn.Parameter(start.to(kernel))
        self.outputs: list[Tensor] = []

    def __iter__(self) -> Any:
        return (m for m in self._modules.values())

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the last pass."""
        return self.__dict__ | {"outputs": []}

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D) as the plain blocks do; keep the queries' outputs (B, T, D)."""
        self.outputs = []
        for block, query in zip(self, self.queries, strict=True):
            prompt = query.to(x.dtype).expand(len(x), -1, -1)  # each image has its own dropout
            self.outputs.append(_queried(block, F.dropout(prompt, self.drop, self.training), x))
            x = block(x)
        return x

    def features(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """What the classifier reads instead of the class token (B, D): all of them (B, F)."""
        parts = [args[0], *(output.flatten(1) for output in self.outputs)]
        self.outputs = []
        return (torch.cat([F.normalize(part, dim=1) for part in parts], dim=1),)


def _queried(block: Block, prompt: Tensor, x: Tensor) -> Tensor:
    """Run ``prompt`` (B, T, D) through ``block`` with keys and values of ``x`` (B, N, D)."""
    attention: Any = block.attn
    query = _heads(attention, block.norm1(prompt))[0]
    _, key, value = _heads(attention, block.norm1(x))
    mixed = F.scaled_dot_product_attention(
        attention.q_norm(query), attention.k_norm(key), value, scale=attention.scale
    )
    mixed = attention.proj(attention.norm(mixed.transpose(1, 2).flatten(2)))
    prompt = prompt + block.drop_path1(block.ls1(mixed))
    return prompt + block.drop_path2(block.ls2(block.mlp(block.norm2(prompt))))


def _heads(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value of tokens (B, N, D), each (B, heads, N, D / heads)."""
    fused = attention.qkv(x).reshape(*x.shape[:2], 3, attention.num_heads, -1)
    return fused.permute(2, 0, 3, 1, 4).unbind(0)
