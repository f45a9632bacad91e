"""SSF: a learned scale and shift per channel after every linear, convolution and norm layer.

    y <- gamma * y + beta,    gamma ~ N(1, 0.02), beta ~ N(0, 0.02) at the start

Lian et al., Scaling & Shifting Your Features, NeurIPS 2022 (arXiv 2210.08823). ViT-B/16: 74
pairs, 205,824 parameters; Swin-B 267,264; ConvNeXt-B 255,232. After training they fold into the
layer before them: W <- diag(gamma) W, b <- gamma * b + beta.

The paper says "after each operation", but the released code puts nothing on the down-sampling
layers of Swin and ConvNeXt (a list is compared with a string); the published accuracies are the
code's, hence ``variant: released`` is the default and has the counts above. ``paper`` adds them.
The released script also trains the norm in ConvNeXt's head (2,048 parameters); here only the
classifier trains with a method. Layers without a bias (Swin's patch reduction) are left out,
because nothing could take their shift when folding; on SD3 the pairs follow the six matrices of
each block.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from snella.method import CannotMerge, Method, family, head, slots

_SMALLEST_SCALE = 1e-3


class SSF(Method):
    """Scale and shift the features of a frozen backbone."""

    paper: ClassVar[str] = "SSF (NeurIPS 2022)"
    bibkey: ClassVar[str] = "lian2022ssf"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam", "sd3"})

    variant: Literal["paper", "released"] = "released"

    def adapt(self, model: Any) -> None:
        for layer in self._layers(model):
            _attach(layer, layer.bias, on_map=_works_on_map(layer))
        if family(model) == "convnext" and isinstance(model.norm_pre, nn.Identity):
            _attach(model.norm_pre, model.stages[-1].blocks[-1].mlp.fc2.bias, on_map=True)

    def merge(self, model: nn.Module) -> None:
        """Fold every pair into its layer, and ConvNeXt's last one into the last stage.

        Raises :class:`~snella.errors.CannotMerge` if that one has lost a channel: folding it
        divides by the scale.
        """
        layers = [m for m in model.modules() if hasattr(m, "ssf_scale")]
        after_last_stage = [m for m in layers if isinstance(m, nn.Identity)]
        for layer in after_last_stage:
            if layer.ssf_scale.abs().min() < _SMALLEST_SCALE:
                raise CannotMerge("a channel's scale after the last stage is too close to zero")
        with torch.no_grad():
            for layer in layers:
                fold = partial(_fold_last_stage, model) if layer in after_last_stage else _fold
                fold(layer, *_detach(layer))

    def _layers(self, model: nn.Module) -> list[Any]:
        """All layers with a bias outside the head, or the matrices of SD3's blocks."""
        if family(model) == "sd3":
            return [model.get_submodule(slot.path) for slot in slots(model)]
        encoder: Any = getattr(model, "image_encoder", model)
        in_head = set(_head_modules(model))
        return [
            layer
            for name, layer in encoder.named_modules()
            if layer not in in_head
            and (isinstance(layer, nn.Linear | nn.LayerNorm) or _works_on_map(layer))
            and layer.bias is not None
            and (self.variant == "paper" or ".downsample." not in name)
        ]


def _works_on_map(layer: nn.Module) -> bool:
    """Whether a layer's channels are dimension 1 of (B, C, H, W) and not the last one.

    Decided by type (timm's and segment-anything's norms share the name): the released code
    compares sizes and scales the wrong axis of a map that is as wide as it has channels.
    """
    return isinstance(layer, nn.Conv2d) or type(layer).__name__ == "LayerNorm2d"


def _attach(layer: Any, like: Tensor, on_map: bool) -> None:
    """Give a layer its pair, as long as ``like`` and of its type, and the hook that applies it."""
    layer.ssf_scale = nn.Parameter(torch.empty(len(like)).normal_(1, 0.02).to(like))
    layer.ssf_shift = nn.Parameter(torch.empty(len(like)).normal_(0, 0.02).to(like))
    hook = partial(_scale_and_shift, (-1, 1, 1) if on_map else (-1,))
    layer.ssf_hook = layer.register_forward_hook(hook).id


def _detach(layer: Any) -> tuple[Tensor, Tensor]:
    """Take the pair and its hook off a layer."""
    scale, shift = layer.ssf_scale.detach(), layer.ssf_shift.detach()
    del layer._forward_hooks[layer.ssf_hook]
    del layer.ssf_scale, layer.ssf_shift, layer.ssf_hook
    return scale, shift


def _scale_and_shift(shape: tuple[int, ...], layer: Any, args: tuple, output: Tensor) -> Tensor:
    """gamma * output + beta in the layer's own precision, so that autocast stays low."""
    scale = layer.ssf_scale.to(output.dtype).view(shape)
    shift = layer.ssf_shift.to(output.dtype).view(shape)
    return torch.addcmul(shift, output, scale)


def _head_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the backbone's head: classifier (and ConvNeXt's norm before it), decoder."""
    task_head = head(model)
    if task_head is not None:
        yield from getattr(model, "head", task_head).modules()


def _fold(layer: Any, scale: Tensor, shift: Tensor) -> None:
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.mul_(scale).add_(shift)


def _fold_last_stage(model: Any, _: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Fold the pair after ConvNeXt's last stage, which a residual sum and no layer precedes.

    The whole residual stream of the stage is scaled: where it starts (down-sampling), where
    blocks read it (depthwise weights, divided) and where they add to it (layer scale). The last
    block's layer scale moves into fc2, whose bias then takes the shift.
    """
    stage = model.stages[-1]
    _fold(stage.downsample[1], scale, torch.zeros_like(shift))
    for block in stage.blocks:
        block.conv_dw.weight.div_(scale.view(-1, 1, 1, 1))
        if block.gamma is None:
            _fold(block.mlp.fc2, scale, torch.zeros_like(shift))
        else:
            block.gamma.mul_(scale)
    last = stage.blocks[-1]
    if last.gamma is None:
        last.mlp.fc2.bias.add_(shift)
    else:
        _fold(last.mlp.fc2, last.gamma, shift)
        last.gamma.fill_(1)
