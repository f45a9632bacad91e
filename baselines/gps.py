"""GPS: of every neuron the K incoming weights with the largest gradient train, and all biases.

    G = Σ_b ∇L_b(W) over one pass of the training set,  row i trains its K largest |G_ij|

Zhang et al., Gradient-based Parameter Selection for Efficient Fine-Tuning, CVPR 2024
(arXiv 2312.10136). L is the supervised contrastive loss of two augmented views, which needs no
head. ViT-B/16: 83,712 (K + 1) parameters, 167,424 for K = 1, of which 83,712 are biases. The
released code trains all weights under a gradient mask, which is exact for Adam without weight
decay only; here the selected entries alone are parameters, with the same result. The paper
speaks of the K connections; that all biases but those of the norms train too is in the code. As
there, scoring shuffles the training images (lists sorted by class would make batches of one class)
and drops a partial last batch; K is 1 to 20 per data set (config/released/gps.yaml).
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from snella.method import (
    Batch,
    LossFn,
    Method,
    Unsupported,
    batch_gradients,
    fold_entries,
    train_entries,
)

_TASK = ("mask_decoder", "no_mask_embed")
_FROZEN = ("norm", "pos_embed", "cls_token", "reg_token", "rel_pos_", "prompt_encoder")
_WHOLE = ("head", "bias", "gamma")


class GPS(Method):
    """Select by the sum of signed gradients, then train the selection."""

    paper: ClassVar[str] = "GPS (CVPR 2024)"
    bibkey: ClassVar[str] = "zhang2024gps"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam"})
    calibration_order: ClassVar[Literal["file", "shuffled"]] = "shuffled"
    calibration_views: ClassVar[int] = 2

    connections: int = Field(default=1, gt=0, description="K, weights trained per neuron")
    score: Literal["supcon", "cross-entropy"] = Field(
        default="supcon",
        description="loss whose gradient selects: supervised contrastive, or the task's own",
    )

    def check_supported(self, model: nn.Module) -> None:
        super().check_supported(model)
        if self.score == "supcon" and not hasattr(model, "forward_head"):
            raise Unsupported(
                f"{type(model).__name__} has no class token or pooled feature for score: supcon; "
                "use score: cross-entropy, which scores with the task's own loss."
            )

    def adapt(self, model: nn.Module) -> None:
        """Train the biases; the weights are chosen by :meth:`calibrate`."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained_part(name, parameter) == "whole")

    def calibrate(self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        loss = augmented_loss if self.score == "supcon" else loss_fn
        names = [n for n, p in model.named_parameters() if trained_part(n, p) == "rows"]
        total: dict[str, Tensor] = {}
        whole = whole_batches(batches)
        for gradients in batch_gradients(model, names, whole, loss, training=True):
            for name, gradient in gradients.items():
                total[name] = total.get(name, 0) + gradient
        for name, gradient in total.items():
            train_entries(model, name, top_entries(gradient, self.connections))

    def merge(self, model: nn.Module) -> None:
        fold_entries(model)


def trained_part(name: str, parameter: Tensor) -> Literal["none", "whole", "rows"]:
    """What trains of a parameter: nothing, everything, or K entries in each output row."""
    if any(part in name for part in _TASK):
        return "whole"
    if any(part in name for part in _FROZEN):
        return "none"
    if any(part in name for part in _WHOLE):
        return "whole"
    return "rows" if parameter.ndim >= 2 else "none"


def top_entries(gradient: Tensor, k: int) -> Tensor:
    """Flat indices (rows * k,) of the ``k`` largest magnitudes in each row of (rows, ...)."""
    rows = gradient.flatten(1)
    columns = rows.abs().topk(min(k, rows.shape[1]), dim=1).indices.sort(dim=1).values
    starts = torch.arange(len(rows), device=rows.device).unsqueeze(1) * rows.shape[1]
    return (starts + columns).flatten()


def whole_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """All batches but a smaller last one, which the released loader drops."""
    size = 0
    for batch in batches:
        found = len(next(iter(batch.values())))
        if found >= size:
            size = found
            yield batch


def augmented_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The contrastive loss of two views of each image: those of the batch, or random ones."""
    if "views" in batch:
        return contrastive_loss(model, *batch["views"].unbind(1), batch["label"])
    images = batch["image"]
    return contrastive_loss(model, random_view(images), random_view(images), batch["label"])


def contrastive_loss(model: nn.Module, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss of two views (B, 3, H, W) on the features before the head."""
    tokens = model.forward_features(torch.cat([first, second]))
    features = model.forward_head(tokens, pre_logits=True)
    return supcon(torch.stack(features.chunk(2), dim=1), labels)


def supcon(features: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, L_out), a scalar.

    Args:
        features: (n, views, d), compared by their direction.
        labels: (n,) classes; features of the same class attract each other.
    """
    views = features.shape[1]
    z = F.normalize(features.float(), dim=-1).transpose(0, 1).flatten(0, 1)
    classes = labels.repeat(views)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, float("-inf"))
    log_probability = logits.log_softmax(dim=1).masked_fill(itself, 0.0)
    positive = (classes[:, None] == classes) & ~itself
    return -((log_probability * positive).sum(1) / positive.sum(1)).mean()


def random_view(images: Tensor) -> Tensor:
    """A random crop, flip and colour jitter of each image of normalised ``images`` (B, 3, H, W).

    Colours are changed on the scale from the batch's darkest to its brightest value of each
    channel, because the data's normalisation is not known here.
    """
    low = images.amin((0, 2, 3), keepdim=True)
    span = (images.amax((0, 2, 3), keepdim=True) - low).clamp_min(1e-6)
    view = v2.Compose(
        [
            v2.RandomResizedCrop(images.shape[-2:], scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
        ]
    )
    return torch.stack([view(image) for image in (images - low) / span]) * span + low
