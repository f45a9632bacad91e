"""Reading weights files of published formats into named tensors, without running their code.

safetensors, torch files (zip and legacy tar), TorchScript archives, ONNX exports, and folders that
transformers wrote. Training checkpoints keep their arguments and numpy scalars beside the weights:
exactly the classes in `ALLOWED` are read, nothing else is unpickled. Containers and prefixes of
common releases (`state_dict`, `module.`, query and momentum encoders, students and teachers) are
peeled off, so that what comes back is one encoder's tensors.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snella.errors import UserError
from snella.files import CHUNK
from snella.models.backbone_files import sniff, weights_files

CONTAINERS = (
    "state_dict", "model", "teacher", "model_state_dict", "model_state", "state_dict_ema",
    "model_ema", "net", "network", "student", "module",
)  # fmt: skip
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
# Encoders inside self-supervised and multi-part models; of two, the one that is published first.
ENCODERS = (
    "base_encoder.", "encoder_q.", "online_encoder.", "teacher.backbone.", "student.backbone.",
    "backbone.", "image_encoder.", "vision_encoder.", "vision_model.", "vit.", "deit.", "dinov2.",
    "dinov2_with_registers.", "swin.", "convnext.", "visual.", "encoder.",
    "momentum_encoder.", "model.",
)  # fmt: skip
CHUNKED = re.compile(r"blocks\.(\d+)\.(\d+)\.")
CLIP_KEPT = ("visual.class_embedding", "visual.trunk.")  # timm renames these itself


def _scalar_classes() -> list[Any]:
    """What a numpy scalar or array unpickles through, under numpy's old and new names."""
    multiarray: Any = importlib.import_module("numpy._core.multiarray")
    named = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")
    ]
    dtypes = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdU"]
    return [*named, np.ndarray, np.dtype, *dict.fromkeys(dtypes)]


ALLOWED = [
    argparse.Namespace, *_scalar_classes(), pathlib.PosixPath, pathlib.PurePosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
]  # fmt: skip


def read_tensors(path: Path, own: Collection[str], key: str | None = None) -> dict[str, Tensor]:
    """The tensors of one encoder in the file or transformers folder ``path``, by name.

    Args:
        path: a weights file, or a folder with ``model.safetensors`` or its shards.
        own: names of the model's tensors, to tell an encoder's names from a container's.
        key: the container to take, where the file has several (``student``, ``state_dict_ema``).

    Raises:
        UserError: the file is no weights file, or holds objects that are not read.
    """
    content: Any = _unpacked(path)
    content = _container(path, content, key)
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    state.pop("n_averaged", None)  # the counter of torch's AveragedModel
    if not state:
        kinds = ", ".join(sorted({type(v).__name__ for v in content.values()})) or "nothing"
        raise UserError(f"Backbone file {path} holds no tensors ({kinds}); choose a weights file.")
    if any(name.endswith("_flat_param") for name in state):
        raise UserError(
            f"Backbone file {path} is one process's part of a training checkpoint (FSDP); name the "
            "whole model's, in DINOv2 eval/training_*/teacher_checkpoint.pth."
        )
    encoder = _without_chunks(_one_encoder(state, own), own)
    for name, tensor in encoder.items():
        _check_tensor(path, name, tensor)
    return encoder


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse what would become other numbers in a model, or none."""
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "no values (a meta tensor)" if tensor.is_meta else "a sparse tensor"
        raise UserError(f"Backbone file {path}: {name} holds {kind}; save the file anew, dense.")
    if tensor.dtype.itemsize == 1 and tensor.dim() > 1:
        raise UserError(f"Backbone file {path} is quantised ({name}); name the original weights.")
    if not name.endswith((".weight", ".bias")):
        return
    if not tensor.is_floating_point():
        raise UserError(
            f"Backbone file {path}: {name} holds {str(tensor.dtype).removeprefix('torch.')} and no "
            "real numbers; name the original weights."
        )
    if not (tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all():
        raise UserError(
            f"Backbone file {path}: {name} holds NaN or infinity; download the file again."
        )


def _unpacked(path: Path) -> Mapping[str, Any]:
    sniff(path)
    merged: dict[str, Any] = {}
    for file in weights_files(path):
        try:
            content = _load(file)
        except UserError as error:
            if str(file) in str(error):
                raise
            raise UserError(f"Backbone file {file}: {error}") from error
        except Exception as error:
            raise UserError(
                f"Backbone file {file} is damaged or not a weights file ({_short(error)}); "
                "download it again."
            ) from error
        if not isinstance(content, dict):
            raise UserError(
                f"Backbone file {file} is not a weights file: it holds a {type(content).__name__} "
                "instead of named tensors."
            )
        merged |= content
    return merged


def _load(file: Path) -> Any:
    if file.suffix == ".onnx":
        from snella.models.onnx_weights import read_onnx

        return read_onnx(file)
    if _is_safetensors(file):  # whatever its name
        from safetensors.torch import load_file

        return load_file(file)
    if zipfile.is_zipfile(file):
        _check_sums(file)
    if is_torchscript(file):
        return torch.jit.load(str(file), map_location="cpu").state_dict()
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            with open(file, "rb") as stream:  # by its path, its name would count
                return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        if found := _refused(file, error):
            raise UserError(
                f"Backbone file {file} holds objects beside its weights that are not read "
                f"({found}). If you trust its source, keep the tensors only: "
                f"python -c \"import torch; c = torch.load('{file}', weights_only=False); "
                "c = getattr(c, 'state_dict', lambda: c)(); t = torch.is_tensor; torch.save("
                "{k: v for k, v in c.items() if t(v) or isinstance(v, dict) and any(map(t, "
                "v.values()))}, 'weights.pth')\""
            ) from error
        raise


def _is_safetensors(file: Path) -> bool:
    """A header of JSON, after its length; a file of that name that is no zip file is damaged."""
    with open(file, "rb") as stream:
        start = stream.read(9)
    length = int.from_bytes(start[:8], "little")
    named = file.suffix == ".safetensors" and start[:2] != b"PK"
    return named or (start[8:9] == b"{" and length < file.stat().st_size)


def _check_sums(file: Path) -> None:
    """Compare the checksums of torch's zip files, which torch does not; 0 stands for none."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                while member.CRC and stream.read(CHUNK):
                    pass


def is_torchscript(file: Path) -> bool:
    """OpenAI's CLIP files are TorchScript archives."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _refused(file: Path, error: Exception) -> str:
    """The classes in a torch file that are not on the allow-list, or an empty string."""
    try:
        with torch.serialization.safe_globals(ALLOWED):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:  # no zip file: of the older format, the error names the first class
        names = re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))
    return ", ".join(sorted(names)[:3])


def _container(path: Path, content: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    if key is not None:
        inner = content.get(key)
        if not isinstance(inner, Mapping):
            named = [str(k) for k, v in content.items() if isinstance(v, Mapping)]
            known = ", ".join(named) or "none"
            raise UserError(f"Backbone file {path} has no container {key!r}; it has: {known}.")
        content = inner
    # Not even where a tensor stands beside it: MoCo keeps its best accuracy as one.
    while inner := next((c for k in CONTAINERS if isinstance(c := content.get(k), Mapping)), None):
        content = inner
    return content


def _one_encoder(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Strip what wraps all names, then keep the first encoder's, until names are the model's."""
    while True:
        wrapper = next((w for w in WRAPPERS if all(n.startswith(w) for n in state)), None)
        if wrapper is not None:
            state = {name.removeprefix(wrapper): t for name, t in state.items()}
            continue
        if any(name in state for name in own) or any(name.startswith(CLIP_KEPT) for name in state):
            return state
        encoder = next(
            (e for e in ENCODERS if any(n.startswith(e) and _deep(n, e) for n in state)), None
        )
        if encoder is None:
            # timm knows OpenAI's visual tower by its name in the whole CLIP
            tower = "visual." if "class_embedding" in state else ""
            return {f"{tower}{name}": t for name, t in state.items()}
        kept = {n.removeprefix(encoder): t for n, t in state.items() if n.startswith(encoder)}
        state = kept


def _without_chunks(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Number blocks through where training had them in chunks: DINOv2's ``blocks.1.3.`` is block 3.

    There the second number counts through already; where it starts anew, order is what counts.
    """
    if any(CHUNKED.match(name) for name in own):  # the model's own names
        return state
    found = {(int(m[1]), int(m[2])) for name in state if (m := CHUNKED.match(name))}
    number = {place: index for index, place in enumerate(sorted(found))}

    def renamed(match: re.Match[str]) -> str:
        return f"blocks.{number[int(match[1]), int(match[2])]}."

    return {CHUNKED.sub(renamed, name, count=1): tensor for name, tensor in state.items()}


def _deep(name: str, encoder: str) -> bool:
    """Whether the prefix is a whole model's: transformers' own `encoder.layer.0` is not."""
    rest = name.removeprefix(encoder)
    return encoder != "encoder." or not rest.startswith(("layer.", "layers.", "stages."))


def _short(error: Exception) -> str:
    printable = "".join(c for c in str(error) if c.isprintable() or c.isspace())
    text = " ".join(printable.split())
    if text.startswith(("Weights only load failed", "Cannot use ``weights_only=True``")):
        text = "neither a torch nor a safetensors file"
    return text if len(text) <= 120 else text[:119].rsplit(" ", 1)[0] + " …"
