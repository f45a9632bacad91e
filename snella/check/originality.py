"""No two methods are the same code: neither by their source, nor by what they train to."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from snella.check.findings import Failure
from snella.check.subject import Subject
from snella.errors import UserError
from snella.methods.base import build_method


def original(
    path: Path, hyperparameters: dict[str, Any], trained: list[Subject], others: Iterable[Path]
) -> str:
    """Compare the method of ``path`` with the files ``others``; the first of ``trained`` is used.

    Raises :class:`~snella.check.findings.Failure` for a file with the same code, or with
    another code that trains to the same output under the same settings or its own.
    """
    files = [other for other in others if other.resolve() != path.resolve()]
    ours = fingerprint(path)
    for other in files:
        if fingerprint(other) == ours:
            raise Failure(f"same code as {other}: make it one file and two rows of the config")
    for other in files:
        if trained and _same_outcome(trained[0], hyperparameters, other):
            raise Failure(f"trains to the same output as {other}: is it the same method?")
    return f"{len(files)} others"


def fingerprint(path: Path) -> str | None:
    """A hash of a file's code without comments, docstrings and layout; None if it has no code."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            del body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _same_outcome(ours: Subject, hyperparameters: dict[str, Any], other: Path) -> bool:
    """Whether ``other`` trains to what ``ours`` did; a file that cannot be compared differs."""
    for settings in (hyperparameters, {}):
        try:
            theirs = Subject(build_method(other, settings), ours.kind, ours.lr, **ours.overrides)
        except UserError:
            continue
        except Exception:
            return False
        try:
            same = theirs.counts == ours.counts and bool(
                torch.allclose(theirs.answer, ours.answer, rtol=0, atol=1e-6)
            )
        except Exception:
            return False
        if same:
            return True
    return False
