"""What installed packages offer, found in their text: to import torch would cost planning seconds.

Where a package's text does not tell, nothing is known and the job says what is wrong.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CLASS = re.compile(rb"^class ([A-Za-z]\w+)", re.MULTILINE)
ENTRY = re.compile(rb"^def ([a-z]\w+)\(pretrained", re.MULTILINE)
"""The function of a timm architecture."""
BUILDER = "build_model_with_cfg"
"""The function that every architecture's file hands its class to."""
INTERNAL = (
    "self", "kwargs", "variant", "model_cls", "model_name", "pretrained", "pretrained_strict",
    "num_classes", "in_chans", "out_indices", "use_naflex", "device", "dtype",
)  # fmt: skip
"""Arguments that are no setting of a backbone: the data, the entry and the run give them."""
CLASSES = ("Callable", "Type[nn.Module]")
"""Annotations of what a configuration cannot hold."""
SAM = Path(__file__).parents[1] / "models/sam.py"


@cache
def optimizers() -> frozenset[str]:
    """The names of torch's optimizers, and of a few classes beside them, lower case.

    Without those that want a closure or sparse gradients.
    """
    names = frozenset(name.decode().lower() for name in CLASS.findall(_text("torch", "optim")))
    return names - {"optimizer", "lbfgs", "sparseadam"}


@cache
def architectures() -> frozenset[str]:
    """The names of timm's architectures, without tags."""
    return frozenset(name.decode() for name in ENTRY.findall(_text("timm", "models")))


@cache
def is_architecture(name: str) -> bool:
    """Whether timm's text speaks of an architecture: a present one, or an older one's new name."""
    text, word = _text("timm", "models"), name.partition(".")[0].encode()
    if not word.isalnum() and not word.replace(b"_", b"").isalnum():
        return False
    return not text or b"def %b(" % word in text or b"'%b'" % word in text


def lacking(tree: ast.Module, folder: Path) -> list[str]:
    """Packages that a file imports at its start and that are not found, nor beside it."""
    names = [alias.name for node in tree.body if isinstance(node, ast.Import)
             for alias in node.names]  # fmt: skip
    names += [node.module for node in tree.body
              if isinstance(node, ast.ImportFrom) and node.module and not node.level]  # fmt: skip
    tops = dict.fromkeys(name.partition(".")[0] for name in names)
    return [
        top for top in tops
        if not any((folder / f"{top}{ending}").exists() for ending in ("", ".py"))
        if not _is_installed(top)
    ]  # fmt: skip


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # of a module that has no specification, such as __main__
        return True


@cache
def arguments(arch: str) -> dict[str, str] | None:
    """What a timm architecture can be built with: names, each with its annotation's text.

    Those of the classes that the architecture's file hands to timm's builder, and of their bases.
    None where the text does not tell.
    """
    file = _file_of(arch)
    if file is None:
        return None
    found: dict[str, str] = {}
    lines = file.read_bytes().splitlines()
    for builder in (node for node in _parsed(file).body if isinstance(node, ast.FunctionDef)):
        if BUILDER.encode() not in b"\n".join(lines[builder.lineno : builder.end_lineno]):
            continue
        found |= dict.fromkeys(_taken(builder), "")
        for node in ast.walk(builder):
            if isinstance(node, ast.Name):
                found |= _initial(node.id, file) or {}
    return {k: v for k, v in found.items() if k not in INTERNAL and v not in CLASSES} or None


@cache
def defaults(arch: str) -> dict[str, Any]:
    """What a timm architecture gives its class, of plain values."""
    file, name = _file_of(arch), arch.partition(".")[0]
    functions = [node for node in _parsed(file).body if isinstance(node, ast.FunctionDef)
                 and node.name == name] if file is not None else []  # fmt: skip
    calls = [node for function in functions for node in ast.walk(function)
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict"]  # fmt: skip
    words = [word for call in calls for word in call.keywords]
    return {w.arg: w.value.value for w in words if w.arg and isinstance(w.value, ast.Constant)}


def _file_of(arch: str) -> Path | None:
    """The file of timm that defines an architecture's function."""
    start = b"\ndef %b(pretrained" % arch.partition(".")[0].encode()
    return next((f for f, text in _files("timm", "models").items() if start in text), None)


@cache
def sam_sizes() -> dict[str, dict[str, str]]:
    """SAM's architectures and what each can be built with, as :func:`arguments`; from our text."""
    found = {
        node.target.id: ast.literal_eval(node.value)
        for node in _parsed(SAM).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if node.value is not None
    }
    sizes = [*found["_COMMON"], "encoder_dim", "encoder_depth", "encoder_heads"]
    known = dict.fromkeys(sizes, "int") | {"global_blocks": "Tuple[int, ...]"}
    return dict.fromkeys([*found["_SIZES"], "sam_vit"], known)


def _initial(name: str, file: Path) -> dict[str, str] | None:
    """The arguments of a class that a file defines or imports from its neighbours, and its bases'.

    None if it is no such class.
    """
    for node in _parsed(file).body:
        if isinstance(node, ast.ImportFrom) and _imports(node, name):
            module = (node.module or "").removeprefix("timm.models.")
            other = file.with_name(f"{module}.py")
            return _initial(name, other) if other.is_file() else None
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [_initial(base.id, file) for base in node.bases if isinstance(base, ast.Name)]
            found = {k: v for base in reversed(bases) for k, v in (base or {}).items()}
            start = next((item for item in node.body if isinstance(item, ast.FunctionDef)
                          and item.name == "__init__"), None)  # fmt: skip
            return found if start is None else found | _annotated(start)
    return None


def _imports(node: ast.ImportFrom, name: str) -> bool:
    return any((alias.asname or alias.name) == name for alias in node.names)


def _annotated(function: ast.FunctionDef) -> dict[str, str]:
    arguments = [*function.args.args, *function.args.kwonlyargs]
    return {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in arguments}


def _taken(function: ast.FunctionDef) -> set[str]:
    """A function's arguments, and what it takes out of its keyword arguments."""
    found = set(_annotated(function))
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("kwargs.pop", "kwargs.get"):
            found |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


@cache
def _text(package: str, folder: str) -> bytes:
    """All Python text of a package's folder; the package is found and not imported."""
    return b"\n".join(_files(package, folder).values())


@cache
def _files(package: str, folder: str) -> dict[Path, bytes]:
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(Path(places[0], folder).glob("*.py")) if places else []
    return {file: file.read_bytes() for file in files}


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())
