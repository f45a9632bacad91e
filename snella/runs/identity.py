"""Identity: what can move a number makes a run stale, and nothing else.

A stage depends on the source of every module that it imports, found by following imports from
its entry points; on the versions of the libraries these import; on the resolved settings; and on
the contents of data and weights. Comments, docstrings, blank lines and the order of imports are no
part of a source, nor are modules that only carry messages and files. All is by content and never by
a local path, so that two laboratories can compare identities.
"""

from __future__ import annotations

import ast
import io
import os
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, TypeGuard

from snella.errors import UserError, one_line
from snella.files import digest_file, digest_json, sha256
from snella.models.backbone_files import RANDOM, file_digest, require, weights_path
from snella.runs.run import Run
from snella.tasks import TaskInfo, find_task, task_names

PACKAGE = Path(__file__).resolve().parents[1]
_PLUMBING = (
    "errors",
    "files",
    "validation",
    "records",
    "runs.identity",
    "runs.run",
    "runs.stopping",
)
PLUMBING = frozenset(f"snella.{name}" for name in _PLUMBING)
"""Modules that carry messages, files and settings, and compute nothing of a result."""
METHOD = "method"
TRAINING = ("runs/train.py",)
EVALUATION = ("runs/evaluate.py",)
_SHARED: dict[str, Any] = {
    **dict.fromkeys(("backbone", "method", "protocol", "settings", "tasks"), True),
    "dataset": {"task"},
}
_Stats = tuple[tuple[Path, int, int], ...]
_digests: dict[str, str] = {}
_latest: list[tuple[tuple[object, ...], str]] = []
ALWAYS = ("numpy", "torch")
DISTRIBUTIONS = {
    "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml",
    "segment_anything": "segment-anything", "open_clip": "open_clip_torch",
}  # fmt: skip
NO_RESULT = frozenset({"rich", "pydantic", "yaml", "typing_extensions"})


@dataclass(frozen=True)
class Sources:
    """The digest of each source by module name, and the versions of the imported libraries."""

    code: dict[str, str]
    libraries: dict[str, str]

    @cached_property
    def key(self) -> dict[str, object]:
        """What of it enters an identity."""
        return {"code": digest_json(self.code), "libraries": self.libraries}


def training_sources(run: Run) -> Sources:
    """What the training of a run executes; the method's ``merge`` comes after training."""
    task = run.task
    return _stage(run.method.file, task.implementation, task.name, run.tasks, TRAINING)


def evaluation_sources(run: Run) -> Sources:
    """What scoring a run's predictions executes."""
    task = run.task
    return _stage("", task.scorer, task.name, run.tasks, EVALUATION)


@cache
def _stage(method: str, entry: str, task: str, tasks: str, own: tuple[str, ...]) -> Sources:
    roots = {"snella": PACKAGE}
    if (Path(tasks) / task / "__init__.py").exists():
        roots[task] = (Path(tasks) / task).resolve()
    starts = [_Module(METHOD, Path(method))] if method else []
    starts += [_Module(f"snella/{name}", PACKAGE / name) for name in own]
    name = entry.partition(":")[0]
    starts += _find(name, roots[name.partition(".")[0]])
    return _closure(starts, roots)


def preload() -> None:
    """Read the sources that runs of the shipped tasks share, for processes that are forked off."""
    for name in task_names():
        info = find_task(name)
        _stage("", info.implementation, name, "tasks", TRAINING)
        _stage("", info.scorer, name, "tasks", EVALUATION)


def prepare_key(task: TaskInfo) -> dict[str, object]:
    """What preparing a family's data executes."""
    module = task.prepare.__module__
    file = Path(sys.modules[module].__file__ or "")
    top = module.partition(".")[0]
    if top == "snella":
        return _closure([_Module("prepare", file)], {top: PACKAGE}).key
    folder = Path(sys.modules[top].__file__ or "").parent
    return _closure([_Module(module, file)], {"snella": PACKAGE, top: folder}).key


def merge_code(file: str) -> str:
    """The digest of a method file's ``merge`` methods, which run after training."""
    return _merge_code(file, os.stat(file).st_mtime_ns)


@cache
def _merge_code(file: str, changed: int) -> str:
    tree, lines = _parse(Path(file))
    statements = list(_statements(tree))
    merge = {n for node in statements if _is_merge(node) for n in _lines(node)}
    rest = set(range(1, len(lines) + 1)) - merge
    return sha256(_normalised(lines, rest | _docstrings(tree, statements, lines)).encode())


def settings_digest(run: Run) -> str:
    """SHA-256 of the resolved settings; what a row's runs share of them is digested once."""
    dataset = run.dataset.model_dump(exclude={"prepared"}, exclude_defaults=True)
    return digest_json([_shared_digest(run), dataset, run.base_seed, run.seed])


def _shared_digest(run: Run) -> str:
    """The seeds of a cell follow each other and have these objects in common."""
    parts = (run.backbone, run.method, run.protocol, run.settings, run.dataset, run.tasks)
    if not (_latest and all(a is b for a, b in zip(parts, _latest[0][0], strict=True))):
        key = run.model_dump_json(include=_SHARED)
        if key not in _digests:
            _digests[key] = digest_json(run.shared())
        _latest[:] = [(parts, _digests[key])]
    return _latest[0][1]


def training_key(run: Run) -> dict[str, object]:
    """The part of the training identity that is known before data and weights are there."""
    return {"settings": settings_digest(run), **training_sources(run).key}


def evaluation_key(run: Run) -> dict[str, object]:
    """The same for scoring."""
    task = run.task
    metrics = [[m.name, m.unit, m.higher_is_better] for m in task.metrics]
    key = {**evaluation_sources(run).key, "metrics": metrics}
    scoring = set(task.settings.scoring)
    if not scoring:
        return key
    settings = run.task_settings
    files = {
        name: _content(Path(path)) if path else ""
        for name, path in settings.scoring_files().items()
    }
    own = settings.model_dump(mode="json", include=scoring - files.keys())
    return {**key, "settings": digest_json(own), **({"files": files} if files else {})}


def _content(path: Path) -> str:
    """The digest of a file's or folder's contents; empty where there is none."""
    return _content_of(path, found) if (found := stats(path)) else ""


@cache
def _content_of(path: Path, stats: _Stats) -> str:
    return digest_json([[p.relative_to(path).as_posix(), digest_file(p)] for p, *_ in stats])


def stats(path: Path) -> _Stats:
    """Size and time of a file, or of all files of a folder."""
    parts = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = ((p, p.stat()) for p in parts)
    return tuple((p, s.st_size, s.st_mtime_ns) for p, s in found)


def code_key(run: Run) -> list[object]:
    """All that a run's job executes: training, scoring, merging."""
    return [training_key(run), evaluation_key(run), merge_code(run.method.file)]


def identity(run: Run, data: str, backbone: str) -> dict[str, object]:
    """All parts of a run's identity, given the digests of its data and of its weights."""
    training, evaluation = training_key(run), evaluation_key(run)
    trained = digest_json([training, data, backbone])
    merge = merge_code(run.method.file)
    scored = digest_json([trained, evaluation, merge])
    return {
        "run": scored,
        "training": trained,
        "evaluation": digest_json(evaluation),
        "settings": training["settings"],
        "code": training["code"],
        "libraries": training["libraries"],
        "data": data,
        "backbone": backbone,
        "merge": merge,
    }


def backbone_digest(run: Run) -> str:
    """SHA-256 of the weights' file, or of a folder's weights; ``random`` for random weights.

    Raises :class:`~snella.errors.UserError` if there is no such file.
    """
    path = weights_path(run.backbone.entry)
    if path is None:
        return RANDOM
    require(path)
    return weights_digest(path, stats(path))


@cache
def weights_digest(path: Path, changed: _Stats) -> str:
    """The same of a file or folder with such :func:`stats`."""
    return file_digest(path)


@dataclass(frozen=True)
class _Module:
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


def _closure(starts: Iterable[_Module], roots: dict[str, Path]) -> Sources:
    """Follow imports from ``starts``; modules outside the roots count by their version."""
    code: dict[str, str] = {}
    libraries: set[str] = set(ALWAYS)
    waiting = list(starts)
    while waiting:
        module = waiting.pop()
        if module.name in code or module.name in PLUMBING:
            continue
        text, imports, companions = _read(
            module.file, module.file.stat().st_mtime_ns, module.name == METHOD
        )
        code[module.name] = sha256("\n".join((text, *companions)).encode())
        for name in (module.absolute(name) for name in imports):
            top = name.partition(".")[0]
            beside = module.file.with_name(f"{top}.py")
            if top in roots:
                waiting += _find(name, roots[top])
            elif not top or top in sys.stdlib_module_names or top in NO_RESULT:
                continue
            elif _version(top) is None and beside.is_file():  # a helper that the file finds itself
                waiting.append(_Module(top, beside))
            else:
                libraries.add(top)
    return Sources(code, {name: v for name in sorted(libraries) if (v := _version(name))})


@cache
def _find(name: str, folder: Path) -> tuple[_Module, ...]:
    """The module ``name`` and the packages it lies in; a trailing attribute is no module.

    Top packages state public names, and those of tasks describe them: both compute nothing.
    ``folder`` is that of the top package.
    """
    top, *parts = name.split(".")
    found = []
    for depth, part in enumerate(parts, 1):
        path = ".".join((top, *parts[:depth]))
        if (folder / part / "__init__.py").is_file():
            folder = folder / part
            if not path.startswith("snella.tasks"):  # which only describe, and import `prepare`
                found.append(_Module(path, folder / "__init__.py"))
        elif (folder / f"{part}.py").is_file():
            found.append(_Module(path, folder / f"{part}.py"))
            break
    return tuple(found)


def _parse(file: Path) -> tuple[ast.Module, list[str]]:
    """A source and its lines; raises ``UserError`` for one that Python would not read."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
        with tokenize.open(file) as stream:
            return tree, stream.read().split("\n")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} does not import: {one_line(error)}; correct the file.") from error


@cache
def _read(file: Path, changed: int, method: bool) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """A file's normalised text, the names it imports, and the digests of companion sources.

    The ``merge`` of a method file, which training does not call, is left out.
    """
    tree, lines = _parse(file)
    statements = list(_statements(tree))
    imports = [n for n in statements if isinstance(n, ast.Import | ast.ImportFrom)]
    dropped = _docstrings(tree, statements, lines)
    dropped |= {n for node in imports for n in _whole_lines(node, lines)}
    if method:
        dropped |= {n for node in statements if _is_merge(node) for n in _lines(node)}
    text = "\n".join((*sorted(map(ast.unparse, _single(imports))), _normalised(lines, dropped)))
    companions: tuple[str, ...] = ()
    if ".cpp" in text or ".cu" in text:
        companions = tuple(
            sha256((file.parent / node.value).read_bytes())
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if node.value.endswith((".cpp", ".cu")) and (file.parent / node.value).is_file()
        )
    return text, tuple(dict.fromkeys(_imports(imports))), companions


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements, without looking into expressions, and those that only a type checker sees."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(tree, field, ()):
            yield node
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node = ast.Module(node.orelse, [])
            yield from _statements(node)


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


def _is_merge(node: ast.AST) -> TypeGuard[ast.FunctionDef]:
    """Whether this is the hook, and no function of that name that training may call."""
    if not isinstance(node, ast.FunctionDef) or node.name != "merge":
        return False
    return [argument.arg for argument in node.args.args] == ["self", "model"]


def _lines(node: ast.stmt) -> range:
    """Of a statement, with its decorators."""
    first = min(n.lineno for n in (node, *getattr(node, "decorator_list", ())))
    return range(first, (node.end_lineno or first) + 1)


def _normalised(source: Sequence[str], dropped: set[int]) -> str:
    """The source without comments, the lines ``dropped``, trailing space and blank lines.

    Within a string of several lines space is part of it.
    """
    lines, strings = list(source), set[int]()
    for token in tokenize.generate_tokens(io.StringIO("\n".join(source)).readline):
        (row, column), (end, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif end > row and token.string.strip():
            strings.update(range(row, end))
    numbered = [(n, line) for n, line in enumerate(lines, 1) if n not in dropped]
    kept = (line if n in strings else line.rstrip() for n, line in numbered)
    return "\n".join(
        line for (n, _), line in zip(numbered, kept, strict=True) if line or n in strings
    )


def _single(imports: Iterable[ast.Import | ast.ImportFrom]) -> Iterator[ast.stmt]:
    """A statement for each imported name: how they are grouped and ordered is of no consequence."""
    for node in imports:
        for name in node.names:
            if isinstance(node, ast.Import):
                yield ast.Import([name])
            else:
                yield ast.ImportFrom(node.module, [name], node.level)


def _imports(imports: Iterable[ast.Import | ast.ImportFrom]) -> Iterator[str]:
    """Names of all imported modules."""
    for node in imports:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            module = "." * node.level + (node.module or "")
            yield module
            dot = "." if node.module else ""
            yield from (f"{module}{dot}{alias.name}" for alias in node.names)


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
