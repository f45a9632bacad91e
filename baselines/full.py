"""Full fine-tuning: every weight of the backbone trains."""

from typing import ClassVar

from torch import nn

from snella.method import Method


class Full(Method):
    """Train all weights."""

    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam", "sd3"})

    def adapt(self, model: nn.Module) -> None:
        model.requires_grad_(True)

    def merge(self, model: nn.Module) -> None:
        """The weights are plain already."""
