"""MLP-3: a three-layer perceptron in place of the linear classifier, on frozen features.

    h_1 = Dropout(BN(ReLU(W_1 f + b_1))),  h_2 likewise from h_1,  logits = W_3 h_2 + b_3

Protocol of Jia et al., Visual Prompt Tuning (ECCV 2022, arXiv 2203.12119). ViT-B/16: 1,184,256
parameters in the hidden layers. The name counts the last layer, which is the head:
the released code has no configuration for it, and two hidden layers give the paper's 1.35x total.
"""

import math
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from snella.method import CannotMerge, Method, Unsupported, head, replace

_PRIOR = 0.01


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm that meets a batch of one with its running statistics.

    A last batch of one image has no variance; torch would raise.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) == 1:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


def _projection(width: int, hidden_layers: int, dropout: float) -> nn.Sequential:
    """Map features (B, width) through ``hidden_layers`` layers of that width."""
    layers: list[nn.Module] = []
    for _ in range(hidden_layers):
        layers += [_kaiming(nn.Linear(width, width)), nn.ReLU(), _BatchNorm(width)]
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


class MLP3(Method):
    """Put hidden layers before the classifier; the backbone stays frozen.

    They take the place of the dropout that timm applies to the features, so that the last layer
    alone is the head. Their batch-norm statistics are buffers and travel with the weights.
    """

    paper: ClassVar[str] = "MLP-3 (protocol of VPT, ECCV 2022)"
    bibkey: ClassVar[str] = "jia2022vpt"

    hidden_layers: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    def adapt(self, model: nn.Module) -> None:
        linear = head(model)
        if not isinstance(linear, nn.Linear):
            raise Unsupported(
                f"{type(model).__name__} has no linear classifier to put layers before."
            )
        before = next((n for n in ("head_drop", "head.drop") if _has(model, n)), None)
        if before is None:
            raise Unsupported(
                f"{type(model).__name__} has no place between features and classifier."
            )
        layers = _projection(linear.in_features, self.hidden_layers, self.dropout)
        layers.append(model.get_submodule(before))
        replace(model, before, layers.to(linear.weight))
        _kaiming(linear)
        nn.init.constant_(linear.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def merge(self, model: nn.Module) -> None:
        """Always raises: a perceptron is no linear classifier."""
        raise CannotMerge("MLP-3's hidden layers have ReLUs, which no linear classifier computes")


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


def _kaiming(layer: nn.Linear) -> nn.Linear:
    nn.init.kaiming_normal_(layer.weight, a=0, mode="fan_out")
    return layer
