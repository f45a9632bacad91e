"""Visual prompt tuning: p learned tokens per block, after the class token.

    shallow  [x_1, Z_1, E_1] = L_1([x_0, P, E_0])      the prompts' outputs Z run on
    deep     [x_i, _,  E_i]  = L_i([x_{i-1}, P_{i-1}, E_{i-1}])      fresh prompts in each block

Jia et al., Visual Prompt Tuning, ECCV 2022 (arXiv 2203.12119). ViT-B/16: 768 p (shallow) and
9,216 p (deep) parameters, 38,400 and 460,800 at p = 50; Swin-B deep: 12,032 p. p is chosen per
task in the paper, and the choices are not in its repository.

On Swin the prompts join every window as keys and values and are left out of patch merging, as in
the paper. The released code also averages the last block's prompt outputs into the pooled
feature; here only image tokens are pooled. On ConvNeXt they are ``border`` learned pixels around
the image, as in the paper and its code: 12 b (224 + b) parameters, 13,740 at b = 5.
"""

import math
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from snella.method import CannotMerge, Method, Unsupported, blocks, family, slots

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VPT(Method):
    """Visual prompt tuning on ViT (shallow and deep), Swin (deep) and ConvNeXt (a border)."""

    paper: ClassVar[str] = "VPT (ECCV 2022)"
    bibkey: ClassVar[str] = "jia2022vpt"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext"})

    depth: Literal["shallow", "deep"] = "deep"
    prompts: int = Field(default=50, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    border: int = Field(
        default=5, gt=0, description="ConvNeXt: width of the learned border, pixels"
    )

    def adapt(self, model: nn.Module) -> None:
        kind = family(model)
        if kind == "convnext":
            self._adapt_convnext(model)
        elif kind == "swin":
            self._adapt_swin(model)
        else:
            self._adapt_vit(model)

    def _adapt_vit(self, model: Any) -> None:
        places = blocks(model)
        at = model.num_prefix_tokens
        prompted = places if self.depth == "deep" else places[:1]
        for block, prompt in zip(prompted, self._prompts(model, len(prompted)), strict=True):
            block.prompt = prompt
            put = _insert if block is places[0] else _exchange
            block.register_forward_pre_hook(partial(put, at, self.dropout))
        places[-1].register_forward_hook(partial(_remove, at, self.prompts))

    def _adapt_swin(self, model: nn.Module) -> None:
        if self.depth == "shallow":
            raise Unsupported(
                "VPT-Shallow does not support swin backbones here: its prompts would have to pass "
                "through patch merging; use depth: deep."
            )
        places = blocks(model)
        for block, prompt in zip(places, self._prompts(model, len(places)), strict=True):
            block.prompt = prompt
            block.__class__ = _PromptedSwinBlock
            block.attn.__class__ = _PromptedWindowAttention
            block.prompt_dropout = self.dropout

    def _adapt_convnext(self, model: Any) -> None:
        if self.depth == "shallow":
            raise Unsupported("VPT has one form on convnext backbones: use depth: deep.")
        kernel = model.stem[0].weight
        size = model.default_cfg.get("input_size", (3, 224, 224))[-1]
        model.prompt_border = _Border(size, self.border).to(kernel)
        model.stem.register_forward_pre_hook(model.prompt_border.put)

    def merge(self, model: nn.Module) -> None:
        """Always raises: prompts are tokens."""
        raise CannotMerge("VPT's prompts are tokens, which no weight of the backbone can hold")

    def _prompts(self, model: Any, count: int) -> list[nn.Parameter]:
        """Prompts (p, width) of the first blocks, uniform within the authors' Xavier bound."""
        widths = [model.get_submodule(s.path).out_features for s in slots(model, ("proj",))]
        kernel = model.patch_embed.proj.weight
        bound = math.sqrt(6 / (3 * kernel.shape[-2] * kernel.shape[-1] + widths[0]))
        return [
            nn.Parameter(torch.empty(self.prompts, width).uniform_(-bound, bound).to(kernel))
            for width in widths[:count]
        ]


def _expanded(block: Any, x: Tensor, dropout: float) -> Tensor:
    prompt = block.prompt.to(x.dtype).expand(len(x), -1, -1)
    return F.dropout(prompt, dropout, block.training)


def _insert(at: int, dropout: float, block: nn.Module, args: tuple) -> tuple:
    x = args[0]
    return (torch.cat([x[:, :at], _expanded(block, x, dropout), x[:, at:]], dim=1), *args[1:])


def _exchange(at: int, dropout: float, block: Any, args: tuple) -> tuple:
    x, after = args[0], at + len(block.prompt)
    return (torch.cat([x[:, :at], _expanded(block, x, dropout), x[:, after:]], dim=1), *args[1:])


def _remove(at: int, prompts: int, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Drop the prompts after the last block, so that pooling sees the backbone's own tokens."""
    return torch.cat([output[:, :at], output[:, at + prompts :]], dim=1)


class _Border(nn.Module):
    """Learned pixels around images (B, 3, S, S), drawn from [0, 1] and ImageNet-normalised.

    Images of another size get the border stretched to their sides.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.width = width
        mean, std = (torch.tensor(v)[:, None, None] for v in (_MEAN, _STD))
        rows, columns = torch.rand(3, 2 * width, size + 2 * width), torch.rand(3, size, 2 * width)
        self.rows = nn.Parameter((rows - mean) / std)
        self.columns = nn.Parameter((columns - mean) / std)

    def put(self, stem: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x, p = args[0], self.width
        height, width = x.shape[-2:]
        columns = _stretched(self.columns, (height, 2 * p)).to(x.dtype).expand(len(x), -1, -1, -1)
        rows = _stretched(self.rows, (2 * p, width + 2 * p)).to(x.dtype).expand(len(x), -1, -1, -1)
        x = torch.cat([columns[..., :p], x, columns[..., p:]], dim=-1)
        return (torch.cat([rows[..., :p, :], x, rows[..., p:, :]], dim=-2),)


def _stretched(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if pixels.shape[-2:] == size:
        return pixels
    return F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]


class _PromptedSwinBlock(SwinTransformerBlock):
    """A Swin block whose windows attend to ``prompt`` (p, C), normalised like any token."""

    def _attn(self, x: Tensor) -> Tensor:
        prompt = self.prompt.expand(len(x), -1, -1)
        prompt = F.dropout(prompt, self.prompt_dropout, self.training)  # one mask per image
        self.attn.context = self.norm1(prompt)
        try:
            return super()._attn(x)
        finally:
            self.attn.context = None


class _PromptedWindowAttention(WindowAttention):
    """Window attention with extra keys and values from each image's ``context`` (B, p, C).

    Prompts ask nothing themselves, because the next block replaces what they would answer;
    they carry no position bias and no mask.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map windows (B * windows, N, C) to the same shape; mask is (windows, N, N)."""
        q, k, v = self._heads(x)
        images, prompts = self.context.shape[:2]
        keys, values = (
            t.repeat_interleave(len(x) // images, 0) for t in self._heads(self.context)[1:]
        )
        bias = self._get_rel_pos_bias()
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        out = F.scaled_dot_product_attention(
            q,
            torch.cat([keys, k], dim=2),
            torch.cat([values, v], dim=2),
            attn_mask=F.pad(bias, (prompts, 0)).to(q.dtype),
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value of (B, N, C) tokens, each (B, heads, N, C / heads)."""
        fused = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        return fused.permute(2, 0, 3, 1, 4).unbind(0)
