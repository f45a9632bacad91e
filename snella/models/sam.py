"""Segment Anything as a model that maps images to mask logits without prompts.

The model is segment-anything's own ``Sam``, so a checkpoint has the official layout and a method
finds the encoder's blocks where every SAM has them. Without prompts the sparse embedding is empty
and the dense one is the learned no-mask embedding (Kirillov et al., ICCV 2023); the mask decoder
plays the part of a classifier's head.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from snella.errors import UserError, unknown
from snella.models.checkpoint import read_tensors

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""SAM's pixel statistics (ImageNet's), of pixels in [0, 1]."""

_COMMON: dict[str, Any] = {
    "image_size": 1024, "patch_size": 16, "window_size": 14,
    "decoder_dim": 256, "decoder_mlp_dim": 2048, "decoder_heads": 8,
}  # fmt: skip
_SIZES: dict[str, tuple[int, int, int, list[int]]] = {
    "sam_vit_b": (768, 12, 12, [2, 5, 8, 11]),
    "sam_vit_l": (1024, 24, 16, [5, 11, 17, 23]),
    "sam_vit_h": (1280, 32, 16, [7, 15, 23, 31]),
}
ARCHITECTURES = (*_SIZES, "sam_vit")
"""The published sizes, and ``sam_vit`` whose sizes are all given."""
_KEYS = (*_COMMON, "encoder_dim", "encoder_depth", "encoder_heads", "global_blocks")


def sam_sizes(arch: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes of a SAM called ``arch``, after ``kwargs``.

    Raises :class:`~snella.errors.UserError` for an unknown architecture or argument, for sizes
    that are missing, and for an image that is not a whole number of patches.
    """
    if arch not in ARCHITECTURES:
        raise unknown("SAM architecture", arch, ARCHITECTURES)
    sizes = dict(_COMMON)
    if arch in _SIZES:
        names = ("encoder_dim", "encoder_depth", "encoder_heads", "global_blocks")
        sizes |= dict(zip(names, _SIZES[arch], strict=True))
    for name in kwargs:
        if name not in _KEYS:
            raise unknown(f"argument of {arch}", name, _KEYS)
    sizes |= kwargs
    missing = [name for name in _KEYS if name not in sizes]
    if missing:
        raise UserError(f"Backbone {arch}: kwargs lack {', '.join(missing)}.")
    if sizes["image_size"] % sizes["patch_size"]:
        raise UserError(
            f"Backbone {arch}: image_size {sizes['image_size']} is not a multiple of the patch "
            f"size {sizes['patch_size']}."
        )
    return sizes


def build_sam(arch: str, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """A SAM of segment-anything's classes with random weights.

    Raises :class:`~snella.errors.UserError` as :func:`sam_sizes`, and where the package is not
    installed.
    """
    sizes = sam_sizes(arch, kwargs or {})
    try:
        from segment_anything import modeling
    except ImportError as error:
        raise UserError(
            "Segmentation needs segment-anything: pip install 'snella[segmentation]'."
        ) from error
    width, grid = sizes["decoder_dim"], sizes["image_size"] // sizes["patch_size"]
    encoder = modeling.ImageEncoderViT(
        img_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        embed_dim=sizes["encoder_dim"],
        depth=sizes["encoder_depth"],
        num_heads=sizes["encoder_heads"],
        out_chans=width,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=sizes["window_size"],
        global_attn_indexes=tuple(sizes["global_blocks"]),
    )
    prompts = modeling.PromptEncoder(
        embed_dim=width,
        image_embedding_size=(grid, grid),
        input_image_size=(sizes["image_size"], sizes["image_size"]),
        mask_in_chans=16,
    )
    decoder = modeling.MaskDecoder(
        num_multimask_outputs=3,
        transformer=modeling.TwoWayTransformer(
            depth=2,
            embedding_dim=width,
            mlp_dim=sizes["decoder_mlp_dim"],
            num_heads=sizes["decoder_heads"],
        ),
        transformer_dim=width,
        iou_head_depth=3,
        iou_head_hidden_dim=width,
    )
    sam: nn.Module = modeling.Sam(encoder, prompts, decoder)
    return sam


def load_sam(arch: str, kwargs: Mapping[str, Any], image_size: int, file: str | None) -> nn.Module:
    """A SAM for images of ``image_size`` with the weights of ``file``, in the official layout.

    ``kwargs`` are the sizes of the checkpoint. Where it was trained at another image size, its
    position tables are interpolated: absolute ones bicubic, relative ones linear.
    Raises :class:`~snella.errors.UserError` for a file that is missing, damaged or of another SAM.
    """
    sizes = sam_sizes(arch, kwargs)
    model = build_sam(arch, {**kwargs, "image_size": image_size})
    if file in (None, "random"):
        return model
    path = Path(file)
    if path.is_dir():
        raise UserError(
            f"Backbone file {path} is a folder; name a file in segment-anything's own layout "
            "(docs/segmentation.md)."
        )
    if not path.is_file():
        raise UserError(
            f"Backbone file {path} is missing; download it (docs/segmentation.md) or correct "
            "`file:` of the backbone."
        )
    state = read_tensors(path, model.state_dict().keys())
    if sizes["image_size"] != image_size:
        own, grid = model.state_dict(), sizes["image_size"] // sizes["patch_size"]
        state = {n: _resized(t, own[n], grid) if n in own else t for n, t in state.items()}
    _check_fits(model, state, arch, path)
    model.load_state_dict(state)
    return model


def _resized(table: Tensor, like: Tensor, grid: int) -> Tensor:
    """A position table of ``grid`` x ``grid`` patches at another size; any other tensor as it is.

    Absolute tables are (1, grid, grid, C), relative ones (2 grid - 1, C).
    """
    if table.shape == like.shape or table.shape[-1:] != like.shape[-1:]:
        return table
    if table.ndim == 2 and len(table) == 2 * grid - 1:
        lines = table.float().T[None]
        return functional.interpolate(lines, size=len(like), mode="linear")[0].T.contiguous()
    if table.shape[:-1] != (1, grid, grid):
        return table
    plane = table.float().permute(0, 3, 1, 2)
    size = (like.shape[1], like.shape[2])
    plane = functional.interpolate(plane, size=size, mode="bicubic", align_corners=False)
    return plane.permute(0, 2, 3, 1).contiguous()


def _check_fits(model: nn.Module, state: Mapping[str, Tensor], arch: str, path: Path) -> None:
    own = model.state_dict()
    problem = ""
    if missing := [name for name in own if name not in state]:
        problem = f"it lacks {_first(missing)}"
    elif extra := [name for name in state if name not in own]:
        problem = f"it has {_first(extra)}, which {arch} has not"
    for name in (n for n in own if n in state and own[n].shape != state[n].shape):
        problem = f"{name} is {tuple(state[name].shape)} there and {tuple(own[name].shape)} here"
        break
    if problem:
        hint = _size_of(state)
        raise UserError(
            f"Backbone file {path} is no {arch}: {problem}; "
            + (f"it looks like {hint}; " if hint else "")
            + "correct `arch:`, `kwargs:` or `file:` of the backbone."
        )


def _first(names: list[str]) -> str:
    more = len(names) - 1
    return names[0] + (f" (and {more} more tensor{'s' * (more > 1)})" if more else "")


def _size_of(state: Mapping[str, Tensor]) -> str | None:
    """Which published SAM a checkpoint is, by its encoder's width."""
    table = state.get("image_encoder.pos_embed")
    widths = {dim: name for name, (dim, *_) in _SIZES.items()}
    return None if table is None else widths.get(table.shape[-1])


def pixel_statistics(device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of pixels in [0, 1], each (3, 1, 1)."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return mean, std


def mask_logits(model: Any, image: Tensor) -> Tensor:
    """Mask logits (B, h, w) of normalised images (B, 3, S, S), at the decoder's S / 4."""
    embeddings = model.image_encoder(image)
    sparse, dense = model.prompt_encoder(points=None, boxes=None, masks=None)
    low, _ = model.mask_decoder(  # one set of tokens for the whole batch, spread by broadcasting
        image_embeddings=embeddings,
        image_pe=positions(model),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    logits: Tensor = low[:, 0]
    return logits


def positions(model: Any) -> Tensor:
    """The decoder's position encoding (1, C, h, w), in float32 also under autocast."""
    with torch.autocast(model.device.type, enabled=False):
        table: Tensor = model.prompt_encoder.get_dense_pe()
        return table


def upsample(low: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits (B, h, w) -> (B, H, W), bilinear as SAM's own post-processing, in float32."""
    return functional.interpolate(
        low[:, None].float(), size=size, mode="bilinear", align_corners=False
    )[:, 0]


def mask_loss(logits: Tensor, target: Tensor, reduce: bool = True) -> Tensor:
    """Binary cross-entropy plus one minus soft IoU, as the released code of GPS computes it.

    Both terms are means over the pixels of a mask (..., H, W); the result is their mean over all
    masks, or (...) without ``reduce``. Soft IoU is sum(p t) / (sum p + sum t - sum p t), and 0
    where target and prediction are empty, as the limit of ever smaller predictions is.
    """
    cross = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = torch.sigmoid(logits)
    both = (p * target).sum((-2, -1))
    either = p.sum((-2, -1)) + target.sum((-2, -1)) - both
    loss = cross.mean((-2, -1)) + 1 - both / either.clamp(min=1e-6)
    return loss.mean() if reduce else loss
