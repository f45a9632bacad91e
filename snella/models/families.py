"""Which family a backbone is of, and where its adaptable linear layers are, by role.

All methods of the benchmark speak of the same six matrices per block (q, k, v, proj, fc1, fc2), as
every paper it reproduces does. Fused ``qkv`` layers are three matrices (row slices, or real layers
after :func:`split_qkv`). Only module names and types are looked at, so timm, segment-anything and
diffusers backbones are described by one table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snella.errors import Unsupported, unknown
from snella.models.names import ROLES, role_of


@dataclass(frozen=True)
class Family:
    """What a class of backbones is.

    head: paths of the task's head where ``get_classifier`` does not say; unused: of what has no
    say in the output of a model without prompts, but for its head.
    """

    name: str
    head: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


_FAMILIES = {
    "VisionTransformer": Family("vit"),
    "SwinTransformer": Family("swin"),
    "ConvNeXt": Family("convnext"),
    "ImageEncoderViT": Family("sam"),
    "Sam": Family("sam", ("mask_decoder", "prompt_encoder.no_mask_embed"), ("prompt_encoder",)),
    "SD3Transformer2DModel": Family("sd3"),
}
_BLOCK = re.compile(r"^(?P<block>(?:.*\.)?(?:blocks|transformer_blocks)\.\d+)\.(?P<name>.+)$")
# Attention and MLP in a block; what else it holds, such as SD3's layers for the text, has no role.
_PARTS = ("attn", "mlp", "ff")


@dataclass(frozen=True)
class Slot:
    """One adaptable matrix: output rows ``rows`` of the linear layer at ``path``.

    ``block`` counts transformer (or ConvNeXt) blocks from 0 in order of depth;
    ``rows`` is ``(0, out_features)`` unless the layer is a fused ``qkv``.
    """

    path: str
    role: str
    block: int
    rows: tuple[int, int]


def family(model: nn.Module) -> str:
    """Return the backbone's family: vit, swin, convnext, sam or sd3.

    Raises :class:`~snella.errors.Unsupported` for any other class.
    """
    if found := _find(model):
        return found.name
    known = sorted({family.name for family in _FAMILIES.values()})
    raise Unsupported(
        f"{type(model).__name__} is not a supported backbone (supported: {', '.join(known)})."
    )


def _find(model: nn.Module) -> Family | None:
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), None)


def block_paths(model: nn.Module) -> list[str]:
    """Module paths of the backbone's blocks, in order of depth."""
    found: dict[str, None] = {}
    for name, _ in model.named_modules():
        if match := _BLOCK.match(name):
            found[match["block"]] = None
    return list(found)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The backbone's blocks, in order of depth."""
    return [model.get_submodule(path) for path in block_paths(model)]


def slots(model: nn.Module, roles: Iterable[str] = ROLES) -> list[Slot]:
    """All adaptable matrices with one of ``roles``, by block and then in the order of ROLES.

    Raises :class:`~snella.errors.Unsupported` if there is none: a method must never adapt
    nothing without saying so, and :class:`~snella.errors.UserError` for an unknown role.
    """
    wanted = tuple(roles)
    for name in wanted:
        if name not in ROLES:
            raise unknown("role", name, ROLES)
    index = {path: i for i, path in enumerate(block_paths(model))}
    found = []
    for path, module in model.named_modules():
        match = _BLOCK.match(path)
        if not match or not isinstance(module, nn.Linear):
            continue
        part, _, layer = match["name"].partition(".")
        role = role_of(layer.removeprefix("qkv.")) if part in _PARTS else None
        if role is None:
            continue
        parts = tuple(role) if role in ("qkv", "kv") else (role,)
        size = module.out_features // len(parts)
        for i, part in enumerate(parts):
            if part in wanted:
                rows = (i * size, (i + 1) * size)
                found.append(Slot(path, part, index[match["block"]], rows))
    if not found:
        raise Unsupported(
            f"{type(model).__name__} has no {'/'.join(wanted)} linear layers to adapt."
        )
    return sorted(found, key=lambda s: (s.block, ROLES.index(s.role)))


def head(model: nn.Module) -> nn.Module | None:
    """The task head, or None where the model has none.

    A timm classifier's, or of SAM the mask decoder with the embedding that stands for no mask.
    """
    if (found := _find(model)) and found.head:
        return nn.ModuleList(model.get_submodule(path) for path in found.head)
    get = getattr(model, "get_classifier", None)
    module = get() if get else None
    return None if module is None or isinstance(module, nn.Identity) else module


def unused_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that have no say in the output, such as SAM's encoders of prompts."""
    of_head = {id(p) for part in [head(model)] if part is not None for p in part.parameters()}
    found = _find(model)
    parts = [model.get_submodule(path) for path in (found.unused if found else ())]
    return [p for part in parts for p in part.parameters() if id(p) not in of_head]


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path`` of ``model``."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class SplitQKV(nn.Module):
    """A fused ``qkv`` layer as three linear layers; same function, same output order."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        for part, weight, bias in zip(
            "qkv", fused.weight.chunk(3), _chunk_bias(fused), strict=True
        ):
            setattr(self, part, _linear(weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., 3 * out)."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def split_qkv(model: nn.Module) -> None:
    """Replace each fused ``qkv`` layer of the blocks by three linear layers, in place.

    Raises :class:`~snella.errors.Unsupported` where the backbone reads ``qkv.weight``
    directly instead of calling the layer (timm's BEiT, EVA, SwinV2): there the split
    layers would be bypassed silently.
    """
    for path in _qkv_paths(model, nn.Linear):
        attention = model.get_submodule(path.rpartition(".")[0])
        if _bypasses_layer(attention):
            raise Unsupported(
                f"{type(model).__name__}: {type(attention).__name__} reads qkv.weight directly, "
                "so adapted query, key and value layers would have no effect."
            )
        replace(model, path, SplitQKV(model.get_submodule(path)))  # type: ignore[arg-type]


def fuse_qkv(model: nn.Module) -> None:
    """Undo :func:`split_qkv` in place, keeping the current weights."""
    for path in _qkv_paths(model, SplitQKV):
        split = model.get_submodule(path)
        assert isinstance(split, SplitQKV)
        parts = [split.q, split.k, split.v]
        bias = None if parts[0].bias is None else torch.cat([p.bias for p in parts]).detach()
        weight = torch.cat([p.weight for p in parts]).detach()
        replace(model, path, _linear(weight, bias))


def _qkv_paths(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, kind) and path.endswith("attn.qkv") and _BLOCK.match(path)
    ]


def _bypasses_layer(attention: nn.Module) -> bool:
    return "weight=self.qkv.weight" in _source(type(attention))


def _source(cls: type) -> str:
    import inspect

    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def _chunk_bias(layer: nn.Linear) -> list[Tensor | None]:
    return [None] * 3 if layer.bias is None else list(layer.bias.chunk(3))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer
