"""Partial-k: the last k blocks and the norm after them train as they are.

Yosinski et al., How transferable are features in deep neural networks? (NeurIPS 2014), with the
selection of Jia et al., Visual Prompt Tuning (ECCV 2022). ViT-B/16, k = 1: 7,089,408 parameters.
The released code matches blocks by a substring of the name (``layer.1`` is in ``layer.10`` too)
and leaves the last norm of self-supervised ViTs frozen; here both are taken by position.
"""

from typing import ClassVar

from pydantic import Field
from torch import nn

from snella.method import Method, Unsupported, blocks, family

_FINAL_NORMS = {
    "vit": ("norm", "fc_norm"),
    "swin": ("norm",),
    "convnext": ("norm_pre", "head.norm"),
}


class Partial(Method):
    """Train the ``last`` blocks and every norm between them and the classifier."""

    paper: ClassVar[str] = "Partial-1 (NeurIPS 2014; protocol of VPT, ECCV 2022)"
    bibkey: ClassVar[str] = "yosinski2014transferable"
    supports: ClassVar[frozenset[str]] = frozenset(_FINAL_NORMS)

    last: int = Field(default=1, gt=0)

    def adapt(self, model: nn.Module) -> None:
        found = blocks(model)
        if self.last > len(found):
            raise Unsupported(
                f"Partial-{self.last}: {type(model).__name__} has only {len(found)} blocks; "
                "lower `last`."
            )
        norms = [model.get_submodule(path) for path in _FINAL_NORMS[family(model)]]
        for module in found[-self.last :] + norms:
            module.requires_grad_(True)

    def merge(self, model: nn.Module) -> None:
        """The weights are plain already."""
