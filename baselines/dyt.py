"""DyT: a dispatcher per block decides which tokens pass the MLP; an adapter sees all of them.

Zhao et al., Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation
(NeurIPS 2024, arXiv 2403.11808). With z the tokens after attention and residual:

    m = [1; 1(w z_patch + b > 0)]        x = z + m FFN(LN(z)) + s W_up ReLU(W_down z)
    training: m from logits with logistic noise over tau = 5, straight-through;
              loss = cross entropy + 2 (mean m - rate)^2

ViT-B/16: 156,768 adapter (0.16 M, as the tables count) and 9,228 dispatcher parameters with
bottleneck 8. With `experts` (the paper's MoE-adapter) the adapters of a block are mixed into one
for each image, by a router on the mean token, here with a softmax: 4,795,440 parameters (4.80 M)
for four of bottleneck 64. The released code (``variant="released"``), which has no experts, adds
the cross entropy of a second pass with all tokens through the MLP and KL(second || first), the
second detached; its VTAB script uses bottleneck 16. At inference the MLP really runs on the chosen
tokens alone.
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from snella.method import Batch, CannotMerge, LossFn, Method, Unsupported


class Dyt(Method):
    """Token dispatchers before the MLPs of a plain ViT, and adapters beside them."""

    paper: ClassVar[str] = "Dynamic Tuning (NeurIPS 2024)"
    bibkey: ClassVar[str] = "zhao2024dyt"
    licence: ClassVar[str] = "MIT"
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    variant: Literal["paper", "released"] = "paper"
    rate: float = Field(0.5, gt=0.0, le=1.0, description="Share of tokens meant to pass the MLP.")
    rate_weight: float = Field(2.0, ge=0.0)
    tau: PositiveFloat = Field(5.0, description="Temperature of the noisy decision in training.")
    bottleneck: PositiveInt = 8
    experts: PositiveInt = Field(1, description="Adapters that are mixed into one per image.")
    scale: PositiveFloat = 1.0
    dropout: float = Field(0.1, ge=0.0, lt=1.0)

    def merge(self, model: nn.Module) -> None:
        raise CannotMerge("which tokens pass the MLP depends on the image")

    def adapt(self, model: nn.Module) -> None:
        if any(type(block) is not Block for block in model.blocks):
            raise Unsupported("DyT needs plain ViT blocks: attention, then an MLP.")
        if model.cls_token is None or model.num_prefix_tokens != 1:
            raise Unsupported("DyT needs exactly one class token, which always passes the MLP.")
        if model.grad_checkpointing:
            raise Unsupported("DyT: gradient checkpointing would bypass the dispatchers.")
        for block in model.blocks:
            weight = block.mlp.fc1.weight
            place = {"device": weight.device, "dtype": weight.dtype}
            width = weight.shape[1]
            block.adapter = self._adapter(width, place)
            block.adapter.train(block.training)
            block.dispatcher = nn.Linear(width, 1, **place)
            nn.init.trunc_normal_(block.dispatcher.weight, std=0.02)
            nn.init.zeros_(block.dispatcher.bias)
        model.blocks = _DynamicBlocks(model.blocks, self.tau)

    def _adapter(self, width: int, place: dict[str, Any]) -> nn.Module:
        sizes = width, self.bottleneck, self.scale, self.dropout, place
        if self.experts == 1:
            return _Adapter(*sizes)
        return _MixedAdapter(nn.Linear(width, self.experts, **place), *sizes)

    def auxiliary_loss(self, model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor | None:
        """The rate loss of the last training pass; released: and those of a complete pass."""
        blocks = model.blocks
        if not blocks.gates:
            return None
        mean = torch.cat(blocks.gates).mean()
        loss = self.rate_weight * (mean - self.rate).square()
        if self.variant == "released":
            loss = loss + self._complete_pass(model, batch, loss_fn)
        blocks.forget()
        return loss

    def _complete_pass(self, model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor:
        blocks = model.blocks
        student = model.forward_head(model.norm(blocks.output))
        teacher: list[Tensor] = []
        blocks.complete = True
        with model.register_forward_hook(lambda module, inputs, out: teacher.append(out)):
            loss = loss_fn(model, batch)
        blocks.complete = False
        target = teacher[0].detach().log_softmax(-1)
        kl = F.kl_div(student.log_softmax(-1), target, reduction="batchmean", log_target=True)
        return loss + kl


class _DynamicBlocks(nn.Sequential):
    """The backbone's own blocks with dispatched MLPs; keeps the last training decisions."""

    def __init__(self, blocks: nn.Sequential, tau: float) -> None:
        super().__init__(*blocks)
        self.training = blocks.training
        self.tau = tau
        self.complete = False
        self.forget()

    def forget(self) -> None:
        """Drop the last pass's decisions (B, N - 1, 1) per block, its tokens, and their graph."""
        self.gates: list[Tensor] = []
        self.output: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the graph of the last pass."""
        return self.__dict__ | {"gates": [], "output": None}

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D), class token first, to the same shape."""
        gates = []
        for block in self:
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            update = block.adapter(x)
            if self.complete:
                x = x + _feed_forward(block, x) + update
            elif self.training:
                gates.append(straight_through(block.dispatcher(x[:, 1:]), self.tau))
                gate = F.pad(gates[-1], (0, 0, 1, 0), value=1.0)
                x = x + gate * _feed_forward(block, x) + update
            else:
                x = _add_chosen(block, x) + update
        if gates:
            self.gates, self.output = gates, x
        return x


def _feed_forward(block: Block, x: Tensor) -> Tensor:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _add_chosen(block: Block, x: Tensor) -> Tensor:
    """Add the MLP to the class token and the chosen patches, and compute it for those alone."""
    chosen = F.pad(block.dispatcher(x[:, 1:])[..., 0] > 0, (1, 0), value=True)
    index = chosen.nonzero(as_tuple=True)
    update = _feed_forward(block, x[index])
    return x.index_put(index, update.to(x.dtype), accumulate=True)


def straight_through(logits: Tensor, tau: float) -> Tensor:
    """Hard decisions of sigmoid((logits + noise) / tau) > 0.5 with the soft ones' gradient."""
    soft = ((logits + logistic_noise(logits)) / tau).sigmoid()
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft


def logistic_noise(like: Tensor) -> Tensor:
    """The difference of two Gumbel variables, in the shape of ``like``."""
    first, second = (torch.empty_like(like).exponential_().log() for _ in range(2))
    return second - first


class _Adapter(nn.Module):
    """s W_up dropout(ReLU(W_down x)), zero at the start."""

    def __init__(
        self, width: int, bottleneck: int, scale: float, dropout: float, place: dict[str, Any]
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(width, bottleneck, **place)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, width, **place)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.dropout(torch.relu(self.down(x))))


class _MixedAdapter(nn.Module):
    """An adapter whose layers are the means of the experts', weighted anew for each image.

    The experts' weights are mixed and not their outputs, which costs what one adapter costs.
    """

    def __init__(self, router: nn.Linear, *sizes: Any) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(_Adapter(*sizes) for _ in range(router.out_features))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x.mean(1)).softmax(-1)
        first: Any = self.experts[0]
        hidden = first.dropout(torch.relu(self._mixed("down", shares, x)))
        return first.scale * self._mixed("up", shares, hidden)

    def _mixed(self, name: str, shares: Tensor, x: Tensor) -> Tensor:
        """Tokens (B, N, in) through the layer ``name``, mixed by ``shares`` (B, experts)."""
        layers: list[Any] = [getattr(expert, name) for expert in self.experts]
        weight = torch.einsum("be,eoi->boi", shares, torch.stack([y.weight for y in layers]))
        bias = shares @ torch.stack([y.bias for y in layers])
        return x @ weight.mT + bias[:, None]
