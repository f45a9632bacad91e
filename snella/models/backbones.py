"""Pre-trained backbones: timm architectures, and weights from local files in published formats.

Nothing is downloaded here: a backbone's ``file`` is named in ``config/backbones.yaml``; the word
``timm`` means the weights of its timm tag in the local cache, and ``random`` none at all.
Every tensor of the file must find its place in the model and every tensor of the model be in the
file, but for the head and what the entry lists under ``ignore`` and ``fresh``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from snella.errors import UserError, unknown
from snella.models.backbone_files import check_release, require, sniff, weights_path
from snella.models.checkpoint import read_tensors
from snella.models.transformers_names import is_transformers, to_timm

# Parts of releases that are no part of a backbone: classifiers, the pre-logits layer, decoders.
IGNORABLE = (
    "head.", "head_dist.", "fc.", "classifier.", "pre_logits.", "decoder_", "decoder.",
    "mask_token", "norm_targets.",
)  # fmt: skip


def build_backbone(entry: Mapping[str, Any], num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """Create ``entry['arch']`` with a fresh head and load the weights of ``entry['file']``.

    Raises :class:`~snella.errors.UserError` for an unknown architecture, an entry without
    ``file:``, and a file that is missing, damaged or made for another architecture.
    """
    import timm

    arch = entry["arch"]
    if not timm.is_model(arch):
        raise unknown("timm architecture", arch, timm.list_models())
    path = weights_path(entry)
    kwargs = {**entry.get("kwargs", {}), "num_classes": num_classes}
    if drop_path:
        kwargs["drop_path_rate"] = drop_path
    try:
        model = timm.create_model(arch, pretrained=False, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"Backbone {arch}: {reason}; check `kwargs`.") from error
    if path is not None:
        load_weights(model, path, entry)
    return model


def load_weights(model: nn.Module, path: Path, entry: Mapping[str, Any] | None = None) -> None:
    """Load pre-trained weights except the head, in place."""
    entry = entry or {}
    require(path)
    check_release(path, entry)
    if path.suffix == ".npz":
        sniff(path)
        _load_flax(model, path, entry)
        return
    state = read_tensors(path, model.state_dict().keys(), entry.get("key"))
    _check_parts(path, state, entry)
    if is_transformers(state):
        state = to_timm(state)
    _check_patches(model, state, path)
    _load_state(model, _filtered(model, state, path), path, entry)


def _check_patches(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse patches of another size, which timm would resample without a word."""
    name = "patch_embed.proj.weight"
    own, theirs = model.state_dict().get(name), state.get(name)
    if own is not None and theirs is not None and theirs.shape[2:] not in ((), own.shape[2:]):
        raise UserError(
            f"Backbone file {path} has patches of {' x '.join(map(str, theirs.shape[2:]))} pixels, "
            f"the model of {' x '.join(map(str, own.shape[2:]))}; correct `arch:` of the backbone."
        )


def _check_parts(path: Path, names: Iterable[str], entry: Mapping[str, Any]) -> None:
    """Tell releases of one architecture apart by parts that only one of them has."""
    names = list(names)
    for key, wanted in (("holds", True), ("lacks", False)):
        for part in entry.get(key) or ():
            if any(part in name for name in names) != wanted:
                state = "lacks" if wanted else "holds"
                raise UserError(
                    f"Backbone file {path} {state} {part!r}, so it is not "
                    f"{entry.get('title') or entry.get('arch')}; see docs/backbones.md."
                )


def _filtered(model: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename a published checkpoint's tensors with timm's own filter of that architecture."""
    module = sys.modules[type(model).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        renamed: dict[str, Tensor] = convert(state, model)
        return renamed
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"Backbone file {path} does not fit {type(model).__name__} "
            f"({' '.join(str(error).split())[:100]}); check `arch:` and `kwargs:` of the backbone."
        ) from error


def _load_state(
    model: nn.Module, state: dict[str, Tensor], path: Path, entry: Mapping[str, Any]
) -> None:
    own = model.state_dict()
    head = _head_names(model)
    ignored = (*head, *IGNORABLE, *(entry.get("ignore") or ()))
    fresh = (*head, *(entry.get("fresh") or ()))
    state = {n: t for n, t in state.items() if not n.startswith(head)}
    misfits = [n for n, t in state.items() if n in own and own[n].shape != t.shape]
    missing = [n for n in own if n not in state and not n.startswith(fresh)]
    extra = [n for n in state if n not in own and not n.startswith(ignored)]
    if misfits or missing or extra:
        problem = _pooling(state, own) or _problem(state, own, misfits, missing, extra)
        raise UserError(f"Backbone file {path} does not fit {type(model).__name__}: {problem}.")
    model.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False)


def _problem(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    misfits: list[str],
    missing: list[str],
    extra: list[str],
) -> str:
    check = "check `arch:` and `kwargs:` of the backbone"
    if misfits:
        name = misfits[0]
        return (
            f"{name} is {tuple(state[name].shape)} there and {tuple(own[name].shape)} here; {check}"
        )
    if missing:
        return f"it lacks {missing[0]}{_more(missing)}; {check}"
    return (
        f"the model has no place for {extra[0]}{_more(extra)}; {check}, or list the beginning of "
        "their names under `ignore:` if they are no part of it"
    )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""


def _pooling(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Explain the one mismatch that is about pooling, as in MAE's releases."""
    theirs, ours = "fc_norm.weight" in state, "fc_norm.weight" in own
    if theirs and not ours:
        return (
            "it was fine-tuned with pooled patch tokens, so its last norm is fc_norm; set "
            "`kwargs: {global_pool: avg}` of the backbone, or take the pre-trained encoder"
        )
    if ours and not theirs and "norm.weight" in state:
        return (
            "the model pools its patch tokens and normalises after pooling (fc_norm), the file's "
            "norm comes before. Set `kwargs: {fc_norm: false}` to keep the file's norm, or "
            "`ignore: [norm.]` and `fresh: [fc_norm.]` to learn a new one as MAE's fine-tuning does"
        )
    return ""


def _load_flax(model: nn.Module, path: Path, entry: Mapping[str, Any]) -> None:
    load = getattr(model, "load_pretrained", None)
    if load is None:
        raise UserError(f"{path}: {type(model).__name__} cannot read Flax .npz files.")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file)
    except Exception as error:
        raise UserError(
            f"Backbone file {path} is damaged ({' '.join(str(error).split())[:100]}); "
            "download it again."
        ) from error
    _check_parts(path, names, entry)
    _check_blocks(model, path, names)
    kept = {n: t.clone() for n, t in model.state_dict().items() if n.startswith(_head_names(model))}
    try:
        load(str(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"Backbone file {path} is damaged or of another architecture ({reason}); "
            "check `arch:` and `kwargs:` of the backbone."
        ) from error
    model.load_state_dict(kept, strict=False)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(
                f"Backbone file {path}: {name} holds NaN or infinity; download the file again."
            )


def _check_blocks(model: nn.Module, path: Path, names: list[str]) -> None:
    """Compare blocks, heads and patches, which timm's reader of the file does not."""
    depth = {match[1] for n in names if (match := re.search(r"encoderblock_(\d+)/", n))}
    blocks: Any = getattr(model, "blocks", ())
    queries = [n for n in names if n.endswith("/query/kernel")]
    patch: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    with np.load(path, allow_pickle=False) as file:
        heads = int(file[queries[0]].shape[1:2][0]) if queries else 0
        pixels = int(file["embedding/kernel"].shape[0]) if "embedding/kernel" in names else 0
    own = blocks[0].attn.num_heads if len(blocks) else 0
    for kind, there, here in (
        ("blocks", len(depth), len(blocks)),
        ("heads", heads, own),
        ("pixels along a patch", pixels, patch[0] if patch and pixels else pixels),
    ):
        if there != here:
            raise UserError(
                f"Backbone file {path} does not fit {type(model).__name__}: it has {there} "
                f"{kind}, the model {here}; check `arch:` and `kwargs:` of the backbone."
            )


def _head_names(model: nn.Module) -> tuple[str, ...]:
    get = getattr(model, "get_classifier", None)
    found = get() if get else None
    targets = found if isinstance(found, tuple) else (found,)
    names = [
        name
        for name, module in model.named_modules()
        if any(module is target for target in targets if target is not None)
    ]
    return tuple(f"{name}." for name in names) or ("head.",)
