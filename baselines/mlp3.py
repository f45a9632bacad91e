"""MLP-3: a three-layer perceptron in place of the linear classifier, on frozen features.

    h_1 = Dropout(BN(ReLU(W_1 f + b_1))),  h_2 likewise from h_1,  logits = W_3 h_2 + b_3

Protocol of Jia et al., Visual Prompt Tuning (ECCV 2022, arXiv 2203.12119). ViT-B/16: 1,184,256
parameters besides the last layer, all of them counted as head. The name counts the last layer:
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


class _Perceptron(nn.Module):
    """Map features (B, in) to logits (B, classes) through ``hidden_layers`` layers of width in."""

    def __init__(self, in_features: int, classes: int, hidden_layers: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Sequential()
        for _ in range(hidden_layers):
            self.projection.append(_kaiming(nn.Linear(in_features, in_features)))
            self.projection.append(nn.ReLU())
            self.projection.append(_BatchNorm(in_features))
            self.projection.append(nn.Dropout(dropout))
        self.last_layer = _kaiming(nn.Linear(in_features, classes))
        nn.init.constant_(self.last_layer.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(self.projection(features))


class MLP3(Method):
    """Replace the classifier by a perceptron; the backbone stays frozen.

    Its batch-norm statistics are buffers, so they travel with the trained weights.
    """

    paper: ClassVar[str] = "MLP-3 (protocol of VPT, ECCV 2022)"
    bibkey: ClassVar[str] = "jia2022vpt"

    hidden_layers: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    def adapt(self, model: nn.Module) -> None:
        linear = head(model)
        if not isinstance(linear, nn.Linear):
            raise Unsupported(f"{type(model).__name__} has no linear classifier to replace.")
        path = next(name for name, module in model.named_modules() if module is linear)
        perceptron = _Perceptron(
            linear.in_features, linear.out_features, self.hidden_layers, self.dropout
        )
        replace(model, path, perceptron.to(linear.weight))

    def merge(self, model: nn.Module) -> None:
        """Always raises: a perceptron is no linear classifier."""
        raise CannotMerge("MLP-3's head has ReLUs, which no linear classifier computes")


def _kaiming(layer: nn.Linear) -> nn.Linear:
    nn.init.kaiming_normal_(layer.weight, a=0, mode="fan_out")
    return layer
