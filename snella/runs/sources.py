"""What a piece of code depends on: the sources of all modules that it imports, and libraries.

Imports are followed from entry points. Comments, docstrings, blank lines and the order of imports
are no part of a source. A name that a module only hands on (it stands in its ``__all__`` and is not
used there) counts for those who ask for it: so an edit of one thing behind a public interface makes
only its users stale. Importing must therefore have no effect on numbers but through names.
"""

from __future__ import annotations

import ast
import io
import os
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import decode_source, find_spec, resolve_name
from itertools import chain, pairwise
from pathlib import Path
from typing import TypeGuard

from snella.errors import UserError, one_line
from snella.files import digest_json, sha256

PACKAGE = Path(__file__).resolve().parents[1]
_PLUMBING = (
    *("errors", "files", "validation", "records"),
    *("runs.identity", "runs.run", "runs.sources", "runs.stopping"),
)
PLUMBING = frozenset(f"snella.{name}" for name in _PLUMBING)
"""Modules that carry messages, files and settings, and compute nothing of a result."""
METHOD = "method"
"""What a method's file is called here, wherever it lies; its ``merge`` is no part of training."""
ALWAYS = ("numpy", "torch")
DISTRIBUTIONS = {
    "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml",
    "segment_anything": "segment-anything", "open_clip": "open_clip_torch",
}  # fmt: skip
COMPANION = re.compile(r"""["']([^"'\n]+\.(?:cpp|cu))["']""")
MARKS = ("#", '"""', "'''", "\\\n")
"""What a source has wherever it has a comment or a string of several lines."""
NO_RESULT = frozenset({"rich", "pydantic", "yaml", "typing_extensions"})
_ALL = "*"
_Step = tuple["Module", str]
"""A module, and the name that is asked of it: all, or none of a package on the way."""


@dataclass(frozen=True)
class Sources:
    """The digest of each source by module name, and the versions of the imported libraries."""

    code: dict[str, str]
    libraries: dict[str, str]

    @cached_property
    def key(self) -> dict[str, object]:
        """What of it enters an identity."""
        return {"code": digest_json(self.code), "libraries": self.libraries}


@dataclass(frozen=True)
class Module:
    """A module's full name and its file."""

    name: str
    file: Path

    def absolute(self, name: str) -> str:
        """The full name of an import, which begins with dots where it is relative."""
        if not name.startswith("."):
            return name
        package = self.name if self.file.stem == "__init__" else self.name.rpartition(".")[0]
        try:
            return resolve_name(name, package)
        except ImportError:
            return name.strip(".")  # which will not import


@dataclass(frozen=True)
class _Import:
    """``from module import name``; without a name ``import module``."""

    module: str
    name: str = ""


@dataclass(frozen=True)
class _Source:
    """A file as it counts: its text, what it imports for its own use, and the names it hands on."""

    text: str
    imports: tuple[_Import, ...]
    handed: Mapping[str, _Import]


def closure(entries: Iterable[str], roots: Mapping[str, Path], method: str = "") -> Sources:
    """Follow imports from ``entries``, each "module:attribute", and from a method's file.

    ``roots`` are the folders of the packages whose sources count, by name. Others count by their
    version, and a helper that lies beside its user by its source.
    """
    code: dict[str, str] = {}
    libraries: set[str] = set(ALWAYS)
    waiting: list[_Step] = [(Module(METHOD, Path(method)), _ALL)] if method else []
    for entry in entries:
        name, _, attribute = entry.partition(":")
        waiting += _steps(name, attribute, roots[name.partition(".")[0]])
    seen = set(waiting)
    while waiting:
        module, name = waiting.pop()
        source = _read(module.file, module.file.stat().st_mtime_ns, module.name == METHOD)
        handed = {n: i for n, i in source.handed.items() if name in (n, _ALL)}
        code |= {f"{module.name}:{n}": f"{i.module}:{i.name}" for n, i in handed.items()}
        imports = list(handed.values())
        if not (_describes(module) and handed):
            code[module.name] = sha256(source.text.encode())
            imports += source.imports
        for found in imports:
            steps = set(_follow(module, found, roots, libraries)) - seen
            seen |= steps
            waiting += steps
    return Sources(code, {name: v for name in sorted(libraries) if (v := _version(name))})


def _follow(
    module: Module, found: _Import, roots: Mapping[str, Path], libraries: set[str]
) -> Sequence[_Step]:
    """The modules that an import leads to; a library is added to ``libraries``."""
    name = module.absolute(found.module)
    top = name.partition(".")[0]
    if top in roots:
        return _steps(name, found.name, roots[top])
    if not top or top in sys.stdlib_module_names or top in NO_RESULT:
        return ()
    if _version(top) is None:
        beside = module.file.parent / f"{top}.py"
        if beside.is_file():  # a helper that the file finds itself
            return ((Module(top, beside), _ALL),)
    libraries.add(top)
    return ()


@cache
def _steps(name: str, attribute: str, folder: Path) -> tuple[_Step, ...]:
    """The packages and the module that ``from name import attribute`` runs.

    ``folder`` is that of the top package. An attribute may be a module itself.
    """
    path, *rest = [*name.split("."), *filter(None, [attribute])]
    found = [Module(path, folder / "__init__.py")]
    while rest:
        path, folder = f"{path}.{rest[0]}", folder / rest[0]
        files = (folder / "__init__.py", folder.with_suffix(".py"))
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            found.append(Module(path, file))
        elif not folder.is_dir():  # where there is one, a package without a file of its own
            break
        del rest[0]
    asked = _ALL if not rest else attribute if rest == [attribute] else ""
    before = "" if attribute else _ALL  # `import a.b` binds `a`, whose names are there to be used
    steps = [*((module, before) for module in found[:-1]), (found[-1], asked)]
    return tuple(
        (module, name)
        for module, name in steps
        if module.name not in PLUMBING and (name or not _describes(module))
    )


def _describes(module: Module) -> bool:
    """Whether this only states public names, or describes a task and names its ``prepare``.

    Such a package counts no more than its documentation where a module inside is imported.
    """
    package = module.file.name == "__init__.py"
    return package and ("." not in module.name or module.name.startswith("snella.tasks"))


def preload() -> None:
    """Read all sources of the package, for processes that are forked off."""
    for file in PACKAGE.rglob("*.py"):
        _read(file, file.stat().st_mtime_ns, False)


def _parse(file: Path) -> tuple[ast.Module, list[str]]:
    """A source and its lines; raises ``UserError`` for one that Python would not read."""
    try:
        text = decode_source(file.read_bytes())
        return ast.parse(text, str(file)), text.split("\n")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} does not import: {one_line(error)}; correct the file.") from error


@cache
def _read(file: Path, changed: int, method: bool) -> _Source:
    """A file with the digests of the C++ sources that it names.

    The ``merge`` of a ``method``, which training does not call, is left out.
    """
    tree, lines = _parse(file)
    statements = list(_statements(tree))
    imports = [n for n in statements if isinstance(n, ast.Import | ast.ImportFrom)]
    public = [node for node in tree.body if _public_names(node)]
    dropped = _docstrings(tree, statements, lines)
    dropped |= {n for node in (*imports, *public) for n in _whole_lines(node, lines)}
    if method:
        dropped |= _merge_lines(statements)
    names = {name for node in public for name in _public_names(node)}
    if names:
        names -= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    own, handed = [], {}
    for node in imports:
        for alias in node.names:
            bound = alias.asname or alias.name
            if isinstance(node, ast.ImportFrom) and node in tree.body and bound in names:
                handed[bound] = _imported(node, alias)
            else:
                own.append((node, alias))
    code = _normalised(tree, lines, dropped)
    imported = sorted(_statement(node, alias) for node, alias in own)
    text = "\n".join((*imported, code, *_companions(file, code)))
    return _Source(text, tuple(dict.fromkeys(_imported(*pair) for pair in own)), handed)


def merge_code(file: str) -> str:
    """The digest of a method file's ``merge`` methods, which run after training."""
    return _merge_code(file, os.stat(file).st_mtime_ns)


@cache
def _merge_code(file: str, changed: int) -> str:
    tree, lines = _parse(Path(file))
    statements = list(_statements(tree))
    rest = set(range(1, len(lines) + 1)) - _merge_lines(statements)
    return sha256(_normalised(tree, lines, rest | _docstrings(tree, statements, lines)).encode())


def _merge_lines(statements: Iterable[ast.AST]) -> set[int]:
    return {n for node in statements if _is_merge(node) for n in _lines(node)}


def _is_merge(node: ast.AST) -> TypeGuard[ast.FunctionDef]:
    """Whether this is the hook, and no function of that name that training may call."""
    if not isinstance(node, ast.FunctionDef) or node.name != "merge":
        return False
    return [argument.arg for argument in node.args.args] == ["self", "model"]


def _lines(node: ast.stmt) -> range:
    """Of a statement, with its decorators."""
    first = min(n.lineno for n in (node, *getattr(node, "decorator_list", ())))
    return range(first, (node.end_lineno or first) + 1)


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements, without looking into expressions, and those that only a type checker sees."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(tree, field, ()):
            yield node
            if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
                node = ast.Module(node.orelse, [])
            yield from _statements(node)


def _name(node: ast.expr) -> str:
    """The name, or the attribute of a module, that an expression is; empty for any other."""
    return str(getattr(node, "id", getattr(node, "attr", "")))


def _docstrings(tree: ast.Module, statements: Iterable[ast.AST], source: Sequence[str]) -> set[int]:
    """The lines of docstrings."""
    lines: set[int] = set()
    for node in (tree, *statements):
        body = getattr(node, "body", None)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and body and ast.get_docstring(node, clean=False) is not None:
            lines.update(_whole_lines(body[0], source))
    return lines


def _whole_lines(node: ast.stmt, source: Sequence[str]) -> range:
    """The lines of a statement, unless other code shares the first or the last of them."""
    lines = _lines(node)
    before = source[lines[0] - 1].encode()[: node.col_offset].strip()
    after = source[lines[-1] - 1].encode()[node.end_col_offset :].strip()
    return range(0) if before or (after and not after.startswith(b"#")) else lines


def _public_names(node: ast.stmt) -> tuple[str, ...]:
    """The names of ``__all__``, where this statement lists them."""
    if not (isinstance(node, ast.Assign) and _name(node.targets[0]) == "__all__"):
        return ()
    try:
        return tuple(ast.literal_eval(node.value))
    except ValueError:
        return ()


def _imported(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> _Import:
    if isinstance(node, ast.Import):
        return _Import(alias.name)
    return _Import("." * node.level + (node.module or ""), alias.name)


def _statement(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    """One name at a time: how imports are grouped and ordered is of no consequence."""
    if isinstance(node, ast.Import):
        return ast.unparse(ast.Import([alias]))
    return ast.unparse(ast.ImportFrom(node.module, [alias], node.level))


def _companions(file: Path, code: str) -> Iterator[str]:
    """The digests of the C++ and CUDA sources beside a file that it names."""
    for name in COMPANION.findall(code):
        if (beside := file.parent / name).is_file():
            yield sha256(beside.read_bytes())


def _normalised(tree: ast.Module, source: Sequence[str], dropped: set[int]) -> str:
    """The source without comments, the lines ``dropped``, trailing space and blank lines."""
    starts = [*_starts(tree), len(source) + 1]
    parts = (_stripped(source, range(*pair), dropped) for pair in pairwise(starts))
    return "\n".join(chain.from_iterable(parts))


def _starts(tree: ast.Module) -> Iterator[int]:
    """The lines at which a source can be cut into parts that are whole statements."""
    yield 1
    last = 0
    for node in tree.body:
        lines = _lines(node)
        if lines[0] > last:
            yield lines[0]
        last = lines[-1]


def _stripped(source: Sequence[str], rows: range, dropped: set[int]) -> Iterator[str]:
    """Some rows of :func:`_normalised`; within a string of several lines space is part of it.

    Only what may have a comment or such a string is taken apart, which takes Python long.
    """
    lines, strings = {n: source[n - 1] for n in rows if n not in dropped}, set[int]()
    text = "\n".join(lines.values())
    if any(mark in text for mark in MARKS):
        part = io.StringIO("\n".join(source[rows.start - 1 : rows.stop - 1]))
        for token in tokenize.generate_tokens(part.readline):
            first, last = (rows.start - 1 + row for row, _ in (token.start, token.end))
            if token.type == tokenize.COMMENT and first in lines:
                lines[first] = lines[first][: token.start[1]]
            elif last > first and token.string.strip():
                strings.update(range(first, last))
    for n, line in lines.items():
        line = line if n in strings else line.rstrip()
        if line or n in strings:
            yield line


@cache
def _version(package: str) -> str | None:
    """The version of the library that a top-level module belongs to; None if there is none."""
    try:
        return version(DISTRIBUTIONS.get(package, package))
    except PackageNotFoundError:
        pass
    if find_spec(package) is None:
        return None
    names = _distributions().get(package, ())
    return " ".join(f"{name} {version(name)}" for name in sorted(set(names))) or None


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()
