"""SPT: sensitive weights train one by one, or through a low-rank module where they are many.

    s_n = Σ_b (∂L_b/∂w_n)²;  the k largest of all s are sensitive. Of these,
    a matrix with at least |module|/α gets a module (LoRA or adapter) instead,
    a vector with at least a share 1/β trains whole, all other entries train one by one.

He et al., Sensitivity-aware Visual Parameter-efficient Fine-tuning, ICCV 2023 (arXiv
2303.08566). k is the multiple of 0.02 units whose total is nearest to the budget. ViT-B/16: the
budget, in millions; 12,288 (LoRA) or 13,064 (adapter) parameters for a square matrix, 30,720 or
52,232 for fc1, and the class token's 768. The paper starts modules at zero and trains every
sensitive entry; the released code overwrites that start with a random one of std 0.02, scores
with stochastic depth on, and counts, but never trains, the entries of norms. In both the adapter
reads its layer's output, except at attn.proj, where it reads the input. Swin and ConvNeXt were
announced, not released: here convolutions, down-sampling and position tables stay frozen.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from snella.method import (
    Batch,
    CannotMerge,
    LossFn,
    Method,
    batch_gradients,
    first_images,
    fold_entries,
    fuse_qkv,
    head,
    replace,
    slots,
    split_qkv,
    train_entries,
)

_EXCLUDED = ("head", "cls_token", "patch_embed", "pos_embed", "stem")
_VIT_B = 85_798_656


class SPT(Method):
    """SPT-LoRA and SPT-Adapter: score, allocate, train."""

    paper: ClassVar[str] = "SPT (ICCV 2023)"
    bibkey: ClassVar[str] = "he2023spt"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext"})

    module: Literal["lora", "adapter"] = "lora"
    rank: int = Field(default=8, gt=0)
    budget: float = Field(default=0.4, gt=0, description="parameters without head, in units")
    unit: int | None = Field(
        default=None, gt=0, description="a million for ViT-B/16, else in proportion, unless given"
    )
    alpha: float = Field(default=10.0, gt=0, description="module size per sensitive entry")
    beta: float = Field(default=5.0, gt=0, description="vector length per sensitive entry")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="before the module")
    drop_path: float = Field(default=0.1, ge=0, lt=1, description="of the module's output")
    scoring_images: int = Field(default=512, gt=0)
    scoring_batch_size: int = Field(default=32, gt=0)
    variant: Literal["paper", "released"] = "paper"

    def adapt(self, model: nn.Module) -> None:
        """Train the class token; :meth:`calibrate` or :meth:`load_state` chooses the rest."""
        split_qkv(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("cls_token"))

    def calibrate(self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        scored = first_images(batches, self.scoring_images, self.scoring_batch_size)
        scores: dict[str, Tensor] = {}
        for gradients in batch_gradients(
            model, candidates(model), scored, loss_fn, training=self.variant == "released"
        ):
            for name, gradient in gradients.items():
                scores[name] = scores.get(name, 0) + gradient.square()
        self.install(model, self.allocate(model, scores))

    def allocate(self, model: nn.Module, scores: dict[str, Tensor]) -> "Allocation":
        """Decide what trains from the ``scores`` of the :func:`candidates`."""
        task_head = head(model)
        in_head = set(task_head.parameters()) if task_head is not None else set()
        total = sum(p.numel() for p in model.parameters() if p not in in_head)
        unit = self.unit or round(1_000_000 * total / _VIT_B)
        matrices = {f"{slot.path}.weight" for slot in slots(model)}
        sizes, thresholds = {}, {}
        for name, score in scores.items():
            if name in matrices:
                sizes[name] = module_size(self.module, self.rank, *score.shape)
                thresholds[name] = sizes[name] / self.alpha
            else:
                sizes[name] = len(score)
                thresholds[name] = len(score) / self.beta
        tokens = sum(p.numel() for n, p in model.named_parameters() if n.endswith("cls_token"))
        return search(scores, sizes, thresholds, unit, self.budget * unit - tokens)

    def install(self, model: nn.Module, allocation: "Allocation") -> None:
        """Put modules and trained entries into ``model`` and unfreeze whole vectors."""
        for name in allocation.whole:
            if name.endswith(".weight") and model.get_parameter(name).ndim == 2:
                self._add_module(model, name.removesuffix(".weight"))
            else:
                model.get_parameter(name).requires_grad_(True)
        for name, indices in allocation.entries.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            if self.variant == "paper" or isinstance(layer, nn.Linear):
                train_entries(model, name, indices)

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        for name in state:
            path, found, _ = name.partition(".branch.down.weight")
            if found and not isinstance(model.get_submodule(path), _BranchLinear):
                self._add_module(model, path)
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.requires_grad_(True)
        super().load_state(model, state)

    def merge(self, model: nn.Module) -> None:
        if self.module == "adapter":
            raise CannotMerge("the adapters of SPT-Adapter are not linear.")
        fold_entries(model)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, _BranchLinear):
                replace(model, path, layer.merged())
        fuse_qkv(model)

    def _add_module(self, model: nn.Module, path: str) -> None:
        layer = _BranchLinear(model.get_submodule(path), self, path.endswith("attn.proj"))
        replace(model, path, layer)


class _BranchLinear(nn.Linear):
    """A frozen layer plus a low-rank branch: y = W x + b + branch(x or W x + b)."""

    def __init__(self, base: nn.Linear, settings: SPT, is_proj: bool) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        lora = settings.module == "lora"
        self.reads_input = lora or is_proj
        width = base.in_features if self.reads_input else base.out_features
        place = {"bias": not lora, "device": base.weight.device, "dtype": base.weight.dtype}
        self.branch = nn.Sequential(
            OrderedDict(
                dropout=nn.Dropout(0.0 if is_proj else settings.dropout),
                down=nn.Linear(width, settings.rank, **place),
                activation=nn.Identity() if lora else nn.GELU(),
                up=nn.Linear(settings.rank, base.out_features, **place),
                drop_path=DropPath(settings.drop_path),
            )
        )
        for factor in (self.branch.down, self.branch.up):
            if settings.variant == "released":
                nn.init.trunc_normal_(factor.weight, std=0.02)
            if factor.bias is not None:
                nn.init.zeros_(factor.bias)
        if settings.variant == "paper":
            nn.init.zeros_(self.branch.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.branch(x if self.reads_input else y)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with the weight W + B A."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.weight + self.branch.up.weight @ self.branch.down.weight
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer


class Allocation(NamedTuple):
    """What trains: tensors as a whole (matrices through modules), and entries of others."""

    top_k: int
    size: int
    whole: list[str]
    entries: dict[str, Tensor]


def candidates(model: nn.Module) -> list[str]:
    """Names of the parameters that are scored: the blocks' matrices, and all vectors."""
    matrices = {f"{slot.path}.weight" for slot in slots(model)}
    return [
        name
        for name, parameter in model.named_parameters()
        if name in matrices or (parameter.ndim == 1 and not any(part in name for part in _EXCLUDED))
    ]


def module_size(module: str, rank: int, d_out: int, d_in: int) -> int:
    """Parameters of a low-rank module for a (d_out, d_in) matrix, as SPT counts them."""
    return rank * (d_in + d_out) if module == "lora" else 2 * rank * d_out + rank + d_out


def search(
    scores: dict[str, Tensor],
    sizes: dict[str, int],
    thresholds: dict[str, float],
    unit: int,
    target: float,
) -> Allocation:
    """Try the top-k masks for k = 0.02, 0.04, .. 1.58 units; keep the total nearest ``target``.

    A tensor with at least ``thresholds`` sensitive entries costs ``sizes`` and trains as a
    whole; any other costs, and trains, its sensitive entries. Of equal totals the last wins.
    """
    names = list(scores)
    ends = torch.tensor([score.numel() for score in scores.values()]).cumsum(0)
    ranked = torch.cat([score.flatten() for score in scores.values()])
    tries = [min(math.ceil(j * 0.02 * unit), len(ranked)) for j in range(1, 80)]
    ranked = ranked.topk(tries[-1]).indices.cpu()
    owners = torch.bucketize(ranked, ends, right=True)
    bar = torch.tensor([thresholds[name] for name in names])
    size = torch.tensor([sizes[name] for name in names])

    def cost(k: int) -> Tensor:
        counts = owners[:k].bincount(minlength=len(names))
        return torch.where(counts >= bar, size, counts)

    totals = [int(cost(k).sum()) for k in tries]
    best = min(range(len(tries)), key=lambda j: (abs(totals[j] - target), -j))
    k = tries[best]
    counts = owners[:k].bincount(minlength=len(names))
    whole = {name for name, n, b in zip(names, counts, bar, strict=True) if n >= b}
    entries = {}
    for i, name in enumerate(names):
        if name not in whole and counts[i] > 0:
            flat = ranked[:k][owners[:k] == i] - (ends[i] - scores[name].numel())
            entries[name] = flat.sort().values.to(scores[name].device)
    return Allocation(k, totals[best], [name for name in names if name in whole], entries)
