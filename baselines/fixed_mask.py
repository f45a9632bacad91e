"""SNELL with a mask fixed before training, by SPT's sensitivity: the ablation of SNELLA's Table 17.

    s_n = Σ_b (∂L_b/∂w_n)²,   M = the share of all weights with the largest s
    ΔW = M ⊙ κ(A, B),   κ = D  or  D + α softmax_out(D) + β,   D = Σ_p c_p ‖A_p,i − B_p,o‖₂

Shen et al. (arXiv 2510.24037), appendix B.4. How many weights the mask keeps, how many images are
scored and whether the sparsified update is also squared is not said: the share is that of SNELL's
default here, images and batches are SPT's, and the kept entries are κ itself. P = 2 pieces share
the rank; ViT-B/16, rank 32: 5,308,416 entries of A and B, two c and, for Mix-K, α and β for each
of 72 matrices.
"""

import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snella.method import (
    Batch,
    LossFn,
    Method,
    batch_gradients,
    first_images,
    fold_parametrizations,
    fuse_qkv,
    slots,
    split_qkv,
)


class FixedMask(Method):
    """Score once, then train a kernelised update of the weights that were chosen."""

    paper: ClassVar[str] = "SNELLA (2025)"
    bibkey: ClassVar[str] = "shen2025snella"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam"})

    rank: int = Field(default=32, gt=1, multiple_of=2)
    kernel: Literal["piecewise-linear", "mix-k"] = "mix-k"
    share: float = Field(default=0.3, gt=0, le=1, description="of the blocks' weights")
    images: int = Field(default=512, gt=0, description="training images that are scored")
    scoring_batch_size: int = Field(default=32, gt=0)

    def adapt(self, model: nn.Module) -> None:
        """Put a kernel on every matrix; :meth:`calibrate` or :meth:`load_state` opens the masks."""
        split_qkv(model)
        for path in dict.fromkeys(slot.path for slot in slots(model)):
            layer = model.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            kernel = _MaskedKernel(layer.weight, self.rank, self.kernel == "mix-k")
            parametrize.register_parametrization(layer, "weight", kernel)

    def calibrate(self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        kernels = {n: m for n, m in model.named_modules() if isinstance(m, _MaskedKernel)}
        originals = {n: f"{n.rpartition('.')[0]}.original" for n in kernels}
        scored = first_images(batches, self.images, self.scoring_batch_size)
        scores: dict[str, Tensor] = {}
        for gradients in batch_gradients(model, originals.values(), scored, loss_fn):
            for name, gradient in gradients.items():
                scores[name] = scores.get(name, 0) + gradient.square()
        masks = largest(list(scores.values()), self.share)
        for kernel, mask in zip(kernels.values(), masks, strict=True):
            kernel.mask.copy_(mask)
        freeze_closed(model)

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        super().load_state(model, state)
        freeze_closed(model)

    def merge(self, model: nn.Module) -> None:
        fold_parametrizations(model, _MaskedKernel)
        fuse_qkv(model)


def largest(scores: list[Tensor], share: float) -> list[Tensor]:
    """Masks, bool like ``scores``, of the ``share`` of all entries that are largest."""
    ranked = torch.cat([score.flatten() for score in scores])
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[ranked.topk(max(1, round(share * len(ranked)))).indices] = True
    parts = chosen.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def freeze_closed(model: nn.Module) -> None:
    """Let the kernels of those matrices train alone in which some weight was chosen."""
    for module in model.modules():
        if isinstance(module, _MaskedKernel):
            module.requires_grad_(bool(module.mask.any()))


class _MaskedKernel(nn.Module):
    """The parametrization W + M ⊙ κ(A, B) of one matrix (out, in); M starts closed."""

    mask: Tensor

    def __init__(self, weight: Tensor, rank: int, mixed: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros_like(weight, dtype=torch.bool))
        self.b, self.a = (_factor(weight, features, rank // 2) for features in weight.shape)
        self.coefficients = nn.Parameter(weight.new_tensor([0.1, -0.1]))
        self.scalars = nn.Parameter(weight.new_tensor([1.0, 0.0])) if mixed else None

    def forward(self, weight: Tensor) -> Tensor:
        distances = torch.cdist(self.b, self.a)
        merged = torch.einsum("p,poi->oi", self.coefficients, distances)
        if self.scalars is not None:
            merged = merged + self.scalars[0] * merged.softmax(dim=0) + self.scalars[1]
        return weight + self.mask * merged


def _factor(weight: Tensor, features: int, coordinates: int) -> nn.Parameter:
    """One factor, (2, features, coordinates), drawn as SNELLA's."""
    bound = 1 / math.sqrt(features * coordinates)
    return nn.Parameter(weight.new_empty(2, features, coordinates).uniform_(-bound, bound))
