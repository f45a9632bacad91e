"""MoSA: an adapter's up-projection is split into sparse experts, one of which learns in each pass.

    h = GELU(W_d LN(z)),  training: s (M_e ⊙ W_u) h + s b_e, e random;  after: s (W_u h + Σ b_e) / E
    loss + ½ (KL(p ‖ p') + KL(p' ‖ p)) of two passes

Zhang et al., MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning, 2023 (arXiv 2312.02923).
The masks M_e part W_u's entries at random into E disjoint sets, so E experts cost one adapter: a
branch beside the MLP as in AdaptFormer, with a norm of its own. ViT-B/16, width 16, E = 4: 350,400
parameters. As in the public VTAB-1k scripts the down-projection is shared and every expert has a
bias. There Adam also sees the other experts' zero gradients; here they are parts of one tensor.
"""

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import Batch, CannotMerge, LossFn, Method, Unsupported, blocks


class MoSA(Method):
    """Sparse experts in a parallel adapter of each block."""

    paper: ClassVar[str] = "MoSA (2023)"
    bibkey: ClassVar[str] = "zhang2023mosa"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    bottleneck: int = Field(default=16, gt=0)
    experts: int = Field(default=4, gt=0, description="E")
    scale: float = Field(default=0.1, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    consistency: float = Field(default=1.0, ge=0, description="weight of the two passes' KL")

    def adapt(self, model: nn.Module) -> None:
        for block in blocks(model):
            if type(block) is not Block:
                raise Unsupported(
                    f"MoSA needs timm's plain pre-norm Block, not {type(block).__name__}: "
                    "its branch starts between attention and feed-forward network."
                )
            weight = block.attn.proj.weight
            block.adapter = _SparseExperts(weight.shape[0], self).to(weight)
            block.adapter.train(block.training)
            block.__class__ = _ParallelBlock
        if self.consistency:
            model.register_forward_hook(_Last())

    def auxiliary_loss(self, model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor | None:
        """The symmetric divergence of a second pass, with other experts, from the first."""
        last = next((h for h in model._forward_hooks.values() if isinstance(h, _Last)), None)
        if last is None or last.output is None:
            return None
        first = last.output
        loss_fn(model, batch)
        loss = self.consistency * symmetric_kl(first, last.output)
        last.output = None
        return loss

    def merge(self, model: nn.Module) -> None:
        raise CannotMerge("the activation between MoSA's projections is not linear")


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """½ (KL(p ‖ p') + KL(p' ‖ p)) per image; each target is held fixed, as released."""
    a, b = first.float().log_softmax(-1), second.float().log_softmax(-1)
    there = F.kl_div(a, b.detach(), reduction="batchmean", log_target=True)
    return 0.5 * (there + F.kl_div(b, a.detach(), reduction="batchmean", log_target=True))


class _Last:
    """Keeps the output of the last training pass; copies of the model go without it."""

    def __init__(self) -> None:
        self.output: Any = None

    def __call__(self, model: nn.Module, args: Any, output: Tensor) -> None:
        self.output = output if model.training else None

    def __deepcopy__(self, memo: Any) -> "_Last":
        return _Last()

    def __getstate__(self) -> dict[str, Any]:
        return {"output": None}


class _ParallelBlock(Block):
    """timm's block with the third branch; the backbone's stochastic depth spares it."""

    def forward(self, x: Tensor) -> Tensor:
        z = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return z + self.drop_path2(self.ls2(self.mlp(self.norm2(z)))) + self.adapter(z)


class _SparseExperts(nn.Module):
    """Tokens (B, N, D) to the scaled update: by one expert in training, by their mean after."""

    part: Tensor

    def __init__(self, dim: int, settings: MoSA) -> None:
        super().__init__()
        self.scale, self.experts = settings.scale, settings.experts
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.down = nn.Linear(dim, settings.bottleneck)
        self.dropout = nn.Dropout(settings.dropout)
        self.up = nn.Parameter(torch.zeros(dim, settings.bottleneck))
        self.biases = nn.Parameter(torch.zeros(settings.experts, dim))
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        order = torch.rand(self.up.numel()).argsort()
        self.register_buffer("part", (order % settings.experts).view_as(self.up))

    def forward(self, z: Tensor) -> Tensor:
        h = self.dropout(F.gelu(self.down(self.norm(z))))
        if self.training:
            expert = int(torch.randint(self.experts, ()))
            weight, bias = self.up * (self.part == expert), self.biases[expert]
        else:
            weight, bias = self.up / self.experts, self.biases.mean(0)
        return self.scale * F.linear(h, weight, bias)
