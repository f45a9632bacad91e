"""Bias tuning (BitFit): all bias vectors and the head train.

Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning, ACL 2022 (arXiv 2106.10199).
ViT-B/16: 102,912 parameters, of which the 9,216 key biases cannot change the softmax. Swin-B:
200,760, with its relative position bias tables, whose name has `bias` in VPT's code too.
"""

from typing import ClassVar

from torch import nn

from snella.method import Method


class Bias(Method):
    """Train every parameter with ``bias`` in its name: norms', patch embedding's, Swin's tables."""

    paper: ClassVar[str] = "BitFit (ACL 2022)"
    bibkey: ClassVar[str] = "zaken2022bitfit"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam", "sd3"})

    def adapt(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "bias" in name.rpartition(".")[2]:
                parameter.requires_grad_(True)

    def merge(self, model: nn.Module) -> None:
        """The weights are plain already."""
