"""The rooms of the package import downwards, without circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "snella"
# From the ground up: a room may import those before it, and nothing else.
ROOMS = [
    "errors", "files", "seeds", "validation", "records", "protobuf",
    "equations", "backends", "models", "tuner", "methods", "method",
    "data", "quick", "tasks", "check", "runs", "suite", "report", "results", "jobs", "cli",
]  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, also inside functions; not for types alone."""
    pending = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "snella":
            yield from (f"snella.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_rooms_import_downwards():
    wrong = set()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__" or path.name == "template.py":  # a method file to be copied out
            continue
        assert own in ROOMS, f"{own} has no place in the order of rooms"
        for name in imports(path):
            other = room(name) if name.startswith("snella.") else ""
            if other in ROOMS and ROOMS.index(other) > ROOMS.index(own):
                wrong.add(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_no_circles_between_modules():
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    graph = {
        name: {other for other in imports(path) if other in names and other != name}
        for name, path in names.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            pytest.fail("circle: " + " -> ".join((*above[above.index(name) :], name)))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_methods_import_the_public_interface_only():
    for path in (ROOT / "baselines").glob("*.py"):
        stems = {other.stem for other in path.parent.glob("*.py")} - {"snella", "peft"}
        for name in imports(path):
            public = room(name) in ("method", "tuner", "errors", "SnellaConfig", "convert_to_lora")
            assert public or not name.startswith("snella."), f"{path.name} imports {name}"
            assert name.split(".")[0] not in stems, f"{path.name} imports {name}"


@pytest.mark.parametrize("file", ["runs/trainer.py", "methods/step.py"])
def test_the_trainer_knows_no_label_image_or_method(file):
    tree = ast.parse((PACKAGE / file).read_text())
    words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    words |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    words |= {
        word
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and " " not in n.value
        for word in n.value.split("_")
    }
    assert not words & {"label", "labels", "image", "images", "val200", "train800", "top1"}


def test_rules_hold_no_logic():
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        lines = path.read_text().splitlines()
        assert len(lines) < 150, path.name
        assert not [line for line in lines if line.lstrip().startswith(("def ", "lambda", "for "))]
