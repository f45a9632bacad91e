"""Pre-trained backbones: timm architectures, and weights from local files in published formats.

Nothing is downloaded here: a backbone's file is named in ``config/backbones.yaml`` and read
with safetensors, timm's reader of the original Flax ``.npz`` files, or ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from snella.errors import UserError, unknown

PREFIXES = ("module.", "model.", "visual.")
CONTAINERS = ("state_dict", "model", "state_dict_ema")


def build_backbone(entry: dict[str, Any], num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """Create ``entry['arch']`` with a fresh head and load ``entry['file']`` if there is one.

    Raises :class:`~snella.errors.UserError` for an unknown architecture and for a file that is
    missing, damaged or made for another architecture.
    """
    import timm

    if not timm.is_model(entry["arch"]):
        raise unknown("timm architecture", entry["arch"], timm.list_models())
    kwargs = {**entry.get("kwargs", {}), "num_classes": num_classes}
    if drop_path:
        kwargs["drop_path_rate"] = drop_path
    try:
        model = timm.create_model(entry["arch"], pretrained=False, **kwargs)
    except TypeError as error:
        raise UserError(f"Backbone {entry['arch']}: {error}; check `kwargs`.") from error
    if entry.get("file"):
        load_weights(model, Path(entry["file"]))
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load pre-trained weights except the head, in place."""
    if not path.is_file():
        raise UserError(
            f"Backbone file {path} is missing; download it (docs/backbones.md) or "
            "correct `file:` of the backbone."
        )
    if path.suffix == ".npz":
        _load_flax(model, path)
    else:
        _load_state(model, _filtered(model, read_state(path)), path)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name; raises ``UserError`` for one that is damaged."""
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"Backbone file {path} is damaged or not a weights file ({reason}); download it again."
        ) from error
    for container in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    for prefix in PREFIXES:
        if content and all(str(name).startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def _filtered(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published checkpoint's tensors with timm's own filter of that architecture."""
    module = sys.modules[type(model).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    return convert(state, model) if convert else state


def _load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    head = _head_names(model)
    state = {name: t for name, t in state.items() if not name.startswith(head)}
    misfits = [n for n, t in state.items() if n in own and own[n].shape != t.shape]
    missing = [n for n in own if n not in state and not n.startswith(head)]
    if misfits or missing:
        problem = (
            f"{misfits[0]} is {tuple(state[misfits[0]].shape)} there and "
            f"{tuple(own[misfits[0]].shape)} here"
            if misfits
            else f"it lacks {missing[0]} and {len(missing) - 1} more tensors"
        )
        raise UserError(
            f"Backbone file {path} does not fit {type(model).__name__}: {problem}; "
            "check `arch:` and `kwargs:` of the backbone."
        )
    model.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False)


def _load_flax(model: nn.Module, path: Path) -> None:
    load = getattr(model, "load_pretrained", None)
    if load is None:
        raise UserError(f"{path}: {type(model).__name__} cannot read Flax .npz files.")
    try:
        load(str(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"Backbone file {path} is damaged or of another architecture ({reason})."
        ) from error


def _head_names(model: nn.Module) -> tuple[str, ...]:
    get = getattr(model, "get_classifier", None)
    target = get() if get else None
    names = [
        name for name, module in model.named_modules() if target is not None and module is target
    ]
    return tuple(f"{name}." for name in names) or ("head.",)


def file_digest(path: str | Path | None) -> str:
    """SHA-256 of a file's bytes, or an empty string for None."""
    if path is None:
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
