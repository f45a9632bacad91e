"""Linear probing: only the task head trains."""

from typing import ClassVar

from torch import nn

from snella.method import Method


class Linear(Method):
    """Leave the whole backbone frozen; the trainer trains the head of every method."""

    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam"})
    head_only: ClassVar[bool] = True

    def adapt(self, model: nn.Module) -> None:
        """Nothing but the head trains."""

    def merge(self, model: nn.Module) -> None:
        """The weights are plain already."""
