"""SVF: of every weight only the singular values train.

    W = U diag(s) Vᵀ,    W' = U diag(s + d) Vᵀ,    d = 0 at the start

Sun et al., Singular Value Fine-tuning: Few-shot Segmentation requires Few-parameters
Fine-tuning, NeurIPS 2022 (arXiv 2206.06122). There for convolutions; here for the six matrices
of a block. ViT-B/16: 55,296 parameters.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella.method import Method, fuse_qkv, replace, slots, split_qkv


class _Spectrum(nn.Module):
    """A linear layer, (..., in) to (..., out), with a learned shift of its singular values."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        self.register_buffer("left", left, persistent=False)  # follows from the frozen weight
        self.register_buffer("right", right, persistent=False)
        self.shift = nn.Parameter(torch.zeros_like(values))

    def weight(self) -> Tensor:
        return self.layer.weight + self.left * self.shift @ self.right

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.layer.bias)


class SVF(Method):
    """Shift the singular values of query, key, value, projection and both MLP layers."""

    paper: ClassVar[str] = "SVF (NeurIPS 2022)"
    bibkey: ClassVar[str] = "sun2022svf"

    def adapt(self, model: nn.Module) -> None:
        split_qkv(model)
        for slot in slots(model):
            replace(model, slot.path, _Spectrum(model.get_submodule(slot.path)))

    @torch.no_grad()
    def merge(self, model: nn.Module) -> None:
        for path, module in list(model.named_modules()):
            if isinstance(module, _Spectrum):
                module.layer.weight.copy_(module.weight())
                replace(model, path, module.layer)
        fuse_qkv(model)
