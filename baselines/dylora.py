"""DyLoRA: LoRA trained at all ranks at once, by cutting it to a random rank in each pass.

    b ~ U{1 .. r} per training pass,    ΔW = s B[:, :b] A[:b]

Valipour et al., DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free
Low Rank Adaptation, EACL 2023 (arXiv 2210.07558). ViT-B/16, rank 8 on query and value: 294,912
parameters. The paper scales by alpha/b; here ``alpha`` left out means s = 1 at every rank.
``update: last`` is its cheaper variant: only row and column b learn in a pass.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import Method, family, fuse_qkv, replace, slots, split_qkv


class DyLoRA(Method):
    """Low-rank updates whose leading columns do most of the work."""

    paper: ClassVar[str] = "DyLoRA (EACL 2023)"
    bibkey: ClassVar[str] = "valipour2023dylora"
    licence: ClassVar[str] = "Apache-2.0"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext"})

    rank: int = Field(default=8, gt=0)
    eval_rank: int | None = Field(default=None, gt=0, description="rank after training; None: all")
    alpha: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    update: Literal["all", "last"] = "all"
    roles: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = ("q", "v")

    def adapt(self, model: nn.Module) -> None:
        split_qkv(model)
        roles = self.roles
        if family(model) == "convnext" and not {"fc1", "fc2"} & set(roles):
            roles = ("fc1", "fc2")
        draw = _Draw(self.rank, min(self.eval_rank or self.rank, self.rank))
        for slot in slots(model, roles):
            replace(model, slot.path, _DynamicLinear(model.get_submodule(slot.path), self, draw))
        model.register_forward_pre_hook(draw)

    def merge(self, model: nn.Module) -> None:
        for path, layer in list(model.named_modules()):
            if isinstance(layer, _DynamicLinear):
                replace(model, path, layer.merged())
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, _Draw):
                del model._forward_pre_hooks[key]
        fuse_qkv(model)


class _Draw:
    """The rank of the current pass: drawn in training, fixed in evaluation."""

    def __init__(self, rank: int, eval_rank: int) -> None:
        self.rank, self.eval_rank = rank, eval_rank
        self.now = eval_rank

    def __call__(self, model: nn.Module, args: Any) -> None:
        self.now = int(torch.randint(self.rank, ()) + 1) if model.training else self.eval_rank


class _DynamicLinear(nn.Linear):
    """y = W x + b + s B[:, :b] A[:b] x with the pass's rank b."""

    def __init__(self, base: nn.Module, settings: DyLoRA, draw: _Draw) -> None:
        assert isinstance(base, nn.Linear)
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.draw, self.alpha, self.last_only = draw, settings.alpha, settings.update == "last"
        self.drop = settings.dropout
        self.lora_a = nn.Parameter(base.weight.new_empty(settings.rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, settings.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B and A cut to ``rank``, the scale in A."""
        a, b = self.lora_a[:rank], self.lora_b[:, :rank]
        if self.last_only and self.training and rank > 1:
            a = torch.cat([a[:-1].detach(), a[-1:]])
            b = torch.cat([b[:, :-1].detach(), b[:, -1:]], dim=1)
        return b, a * (1.0 if self.alpha is None else self.alpha / rank)

    def forward(self, x: Tensor) -> Tensor:
        b, a = self.factors(self.draw.now)
        update = F.linear(F.linear(F.dropout(x, self.drop, self.training), a), b)
        return F.linear(x, self.weight, self.bias) + update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with the weight W + s B A at the rank of evaluation."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        b, a = self.factors(self.draw.eval_rank)
        layer.weight = nn.Parameter(self.weight + b @ a, requires_grad=False)
        layer.bias = self.bias
        return layer
