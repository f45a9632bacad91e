"""Layers of settings: one laid over another, dotted keys, and what differs between two."""

from __future__ import annotations

from typing import Any

from snella.errors import UserError
from snella.suite.reading import Origins
from snella.validation import shown


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, key by key."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = overlay(result[key], value)
        else:
            result[key] = value
    return result


def difference(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """What ``above`` sets that ``below`` does not set to the same value."""
    result: dict[str, Any] = {}
    for key, value in above.items():
        under = below.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            inner = difference(under, value)
            result |= {key: inner} if inner else {}
        elif key not in below or under != value:
            result[key] = value
    return result


def expand(flat: dict[str, Any], base: dict[str, Any], where: str) -> dict[str, Any]:
    """Dotted keys of the top level as nested mappings; names of ``base`` may have dots themselves.

    Raises :class:`~snella.errors.UserError` where a key is given a value and a part of it.
    """
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = _split(key, base) if isinstance(key, str) else (key,)
        target = result
        for parent in parents:
            inner = target.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise UserError(f"{where}: {parent} is given a value and, by {key}, a part of it.")
            target = inner
        before = target.get(last)
        if isinstance(before, dict) and isinstance(value, dict):
            value = overlay(before, value)
        elif last in target:
            raise UserError(f"{where}: {key} is given a value and a part of it.")
        target[last] = value
    return result


def _split(key: str, base: dict[str, Any]) -> list[str]:
    """The parts of a dotted key; the longest name that ``base`` knows wins at each level."""
    waiting = key.split(".")
    if not all(waiting):
        return [key]
    node: Any = base
    rows = base.get("methods") or {}
    parts: list[str] = []
    while waiting:
        known = node if isinstance(node, dict) else {}
        sizes = range(len(waiting), 1, -1)
        joined = (n for n in sizes if (name := ".".join(waiting[:n])) in known or name in rows)
        size = next(joined, 1) if parts else 1
        name = ".".join(waiting[:size])
        parts.append(name)
        waiting = waiting[size:]
        node = known.get(name)
    return parts


def clean(content: Any, origins: Origins, path: tuple[str, ...] = ()) -> None:
    """Refuse control characters, and labels of several lines.

    Raises :class:`~snella.errors.UserError` that names the place.
    """
    if isinstance(content, dict):
        for key, value in content.items():
            _printable(str(key), origins, (*path, str(key)))
            clean(value, origins, (*path, str(key)))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            clean(value, origins, (*path, str(index)))
    elif isinstance(content, str):
        _printable(content, origins, path)


def _printable(text: str, origins: Origins, path: tuple[str, ...]) -> None:
    allowed = "" if path[-1] in ("label", "title") else "\n\t"
    wrong = next((c for c in text if (ord(c) < 32 and c not in allowed) or c == "\x7f"), None)
    if wrong is None and not any("\ud800" <= c <= "\udfff" for c in text):
        return
    place = origins.where(path) or "configuration"
    raise UserError(
        f"{place}: {'.'.join(path)[:80]!r} holds a control character or line break "
        f"({shown(text)}); remove it."
    )
