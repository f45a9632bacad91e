"""Identity: what can move a number makes a run stale, and nothing else.

A stage depends on the source of every module that it imports, found by following imports from
its entry points; on the versions of the libraries these import; on the resolved settings; and on
the contents of data and weights. Comments, docstrings and blank lines are no part of a source, nor
are modules that only carry messages and files. All is by content and never by a local path, so
that two laboratories can compare identities.
"""

from __future__ import annotations

import ast
import io
import os
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from snella.errors import UserError, one_line
from snella.files import digest_file, digest_json, sha256
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
TRAINING = ("runs/train.py",)
EVALUATION = ("runs/evaluate.py",)
_SHARED: dict[str, Any] = {
    **dict.fromkeys(("backbone", "method", "protocol", "settings", "tasks"), True),
    "dataset": {"task"},
}
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
    return _stage(run.method.file, run.task.implementation, run.task.name, run.tasks, TRAINING)


def evaluation_sources(run: Run) -> Sources:
    """What scoring a run's predictions executes."""
    return _stage("", run.task.scorer, run.task.name, run.tasks, EVALUATION)


@cache
def _stage(method: str, entry: str, task: str, tasks: str, own: tuple[str, ...]) -> Sources:
    roots = {"snella": PACKAGE}
    if (Path(tasks) / task / "__init__.py").exists():
        roots[task] = (Path(tasks) / task).resolve()
    starts = [_Module("method", Path(method))] if method else []
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
    return _closure([_Module("prepare", file)], {"snella": PACKAGE}).key


def merge_code(file: str) -> str:
    """The digest of a method file's ``merge`` methods, which run after training."""
    return _merge_code(file, os.stat(file).st_mtime_ns)


@cache
def _merge_code(file: str, changed: int) -> str:
    tree = ast.parse(Path(file).read_bytes())
    return digest_json([ast.unparse(node) for node in ast.walk(tree) if _is_merge(node)])


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
    key, scoring = evaluation_sources(run).key, set(run.task.settings.scoring)
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
    parts = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [p.stat() for p in parts if p.is_file()]
    if not stats:
        return ""
    return _content_of(path, tuple(parts), tuple((s.st_size, s.st_mtime_ns) for s in stats))


@cache
def _content_of(path: Path, parts: tuple[Path, ...], changed: tuple[tuple[int, int], ...]) -> str:
    return digest_json([[p.relative_to(path).as_posix(), digest_file(p)] for p in parts])


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


@dataclass(frozen=True)
class _Module:
    name: str
    file: Path


def _closure(starts: Iterable[_Module], roots: dict[str, Path]) -> Sources:
    """Follow imports from ``starts``; modules outside the roots count by their version."""
    code: dict[str, str] = {}
    libraries: set[str] = set(ALWAYS)
    waiting = list(starts)
    while waiting:
        module = waiting.pop()
        if module.name in code or module.name in PLUMBING:
            continue
        text, imports, companions = _read(module.file, module.file.stat().st_mtime_ns)
        code[module.name] = sha256("\n".join((text, *companions)).encode())
        for name in imports:
            top = name.partition(".")[0]
            if top in roots:
                waiting += _find(name, roots[top])
            elif top not in sys.stdlib_module_names and top not in NO_RESULT:
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


@cache
def _read(file: Path, changed: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """A file's normalised text, the names it imports, and the digests of companion sources."""
    source = file.read_bytes()
    try:
        tree = ast.parse(source, str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} does not import: {one_line(error)}; correct the file.") from error
    statements = list(_statements(tree))
    text = _normalised(source.decode("utf-8"), _dropped(tree, statements, file))
    companions: tuple[str, ...] = ()
    if b".cpp" in source or b".cu" in source:
        companions = tuple(
            sha256((file.parent / node.value).read_bytes())
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if node.value.endswith((".cpp", ".cu")) and (file.parent / node.value).is_file()
        )
    return text, tuple(dict.fromkeys(_imports(statements))), companions


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements, without looking into expressions, and those that only a type checker sees."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(tree, field, ()):
            yield node
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                yield from _statements(node)


def _dropped(tree: ast.Module, statements: Iterable[ast.AST], file: Path) -> set[int]:
    """Lines of docstrings, and in method files of ``merge``, which training does not call."""
    lines: set[int] = set()
    outside = PACKAGE not in file.resolve().parents
    for node in (tree, *statements):
        if outside and _is_merge(node):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # type: ignore[attr-defined]
        body = getattr(node, "body", None)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and body and ast.get_docstring(node, clean=False) is not None:
            lines.update(range(body[0].lineno, (body[0].end_lineno or body[0].lineno) + 1))
    return lines


def _is_merge(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "merge"


def _normalised(source: str, dropped: set[int]) -> str:
    """The source without comments, the lines ``dropped``, trailing space and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    kept = (line.rstrip() for number, line in enumerate(lines, 1) if number not in dropped)
    return "\n".join(line for line in kept if line)


def _imports(statements: Iterable[ast.AST]) -> Iterator[str]:
    """Names of all imported modules."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def _version(package: str) -> str | None:
    try:
        return version(DISTRIBUTIONS.get(package, package))
    except PackageNotFoundError:
        return None
