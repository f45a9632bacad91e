"""NOAH: prompts, LoRA and adapters together, each block with widths that a search found.

    x <- [x; P_l],   qkv(x) + B_l A_l x,   x + h + A'_l(h) with h = MLP(LN x)

Zhang et al., Neural Prompt Search, 2022 (arXiv 2206.04673). Here the authors' 19 searched subnets
are trained anew (config/released/noah.yaml has their widths); the supernet and its search are not
repeated. ViT-B/16: 768 p + 3,072 l + (1,537 a + 768) per block for widths p, l, a; mean over the 19
subnets 360,134, as published (0.36 million). Prompts stand behind the patches and are replaced in
every block; adapters follow the MLP with QuickGELU and a start that is not zero. Prompts and
adapters start as slices of the supernet's 100 wide layers (Xavier), as released.
"""

import math
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from snella.method import CannotMerge, Method, Unsupported

_SUPERNET = 100  # width of the released layers; subnets are slices of them, and start as they do


class Noah(Method):
    """Train a subnet with the widths ``prompts``, ``lora`` and ``adapter`` of each block."""

    paper: ClassVar[str] = "NOAH (2022)"
    bibkey: ClassVar[str] = "zhang2022noah"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    prompts: tuple[int, ...] = Field(default=(5,), description="p of each block, or one for all")
    lora: tuple[int, ...] = Field(default=(5,), description="l of each block, or one for all")
    adapter: tuple[int, ...] = Field(default=(5,), description="a of each block, or one for all")
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @field_validator("prompts", "lora", "adapter")
    @classmethod
    def _not_negative(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if not widths or min(widths) < 0:
            raise ValueError("widths must be 0 or more, one for all blocks or one per block")
        return widths

    def adapt(self, model: nn.Module) -> None:
        blocks: Any = model.blocks
        if any(type(block) is not Block for block in blocks):
            raise Unsupported("NOAH needs plain ViT blocks.")
        if model.grad_checkpointing:
            raise Unsupported("NOAH: gradient checkpointing would bypass the prompts.")
        widths = [self._widths(name, len(blocks)) for name in ("prompts", "lora", "adapter")]
        for block, prompts, rank, width in zip(blocks, *widths, strict=True):
            like = block.attn.qkv.weight
            dim = like.shape[1]
            if prompts:
                bound = math.sqrt(6 / (dim * (_SUPERNET + 1)))
                start = torch.empty(prompts, dim).uniform_(-bound, bound)
                block.prompt = nn.Parameter(start.to(like))
            if rank:
                lora = _LoRA(like, rank, self.dropout).to(like).train(block.training)
                block.attn.lora = lora
                block.attn.qkv.register_forward_hook(lora.add)
            if width:
                adapter = _Adapter(dim, width, self.dropout).to(like)
                block.adapter = adapter.train(block.training)
        model.blocks = _PromptedBlocks(blocks, self.dropout)

    def _widths(self, name: str, depth: int) -> tuple[int, ...]:
        widths = getattr(self, name)
        if len(widths) not in (1, depth):
            raise Unsupported(f"NOAH: {len(widths)} widths of `{name}` for {depth} blocks.")
        return widths * depth if len(widths) == 1 else widths

    def merge(self, model: nn.Module) -> None:
        raise CannotMerge("NOAH's prompts are tokens and its adapters are not linear")


class _PromptedBlocks(nn.Sequential):
    """The backbone's own blocks; prompts stand last and are exchanged in every block."""

    def __init__(self, blocks: nn.Sequential, dropout: float) -> None:
        super().__init__(*blocks)
        self.training = blocks.training
        self.drop = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D) to the same shape; prompts are left out at the end."""
        tokens = x.shape[1]
        for block in self:
            if hasattr(block, "prompt"):
                prompt = block.prompt.to(x.dtype).expand(len(x), -1, -1)
                prompt = nn.functional.dropout(prompt, self.drop, self.training)
                x = torch.cat([x[:, :tokens], prompt], dim=1)
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            h = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            x = x + (block.adapter(h) if hasattr(block, "adapter") else h)
        return x[:, :tokens]


class _LoRA(nn.Module):
    """B A dropout(x), added to the output of the fused qkv layer."""

    def __init__(self, like: Tensor, rank: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(like.shape[1], rank, bias=False)
        self.up = nn.Linear(rank, like.shape[0], bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def add(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.up(self.down(self.dropout(args[0])))


class _Adapter(nn.Module):
    """h + W_up dropout(QuickGELU(W_down h))."""

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)
        bound = math.sqrt(6 / (dim + _SUPERNET))
        for layer in (self.down, self.up):
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, h: Tensor) -> Tensor:
        z = self.down(h)
        return h + self.up(self.dropout(z * torch.sigmoid(1.702 * z)))
