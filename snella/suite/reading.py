"""Configuration files with the line of every key, so that a mistake is blamed on its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from snella.errors import UserError, ascii_name, plain

LARGEST = 8 * 2**20
"""Bytes of a configuration file; more is some other file."""
LONGEST_PATH = 200
NODES = 200_000
"""Values of one file, repeated ones counted: a few anchors can stand for billions."""
COMMAND_LINE = "--config"
OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Numbers that YAML 1.1 takes for octal (010 is 8) or sexagesimal (1:30 is 90)."""


class Line(NamedTuple):
    """Where a key stands, and whether its value is a whole: no mapping that others add to."""

    place: str
    whole: bool


Lines = dict[tuple[str, ...], Line]


class Origins:
    """Which file and line set a key: of several the last, as its value is the one that counts."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, ...], tuple[int, Line]] = {}
        self._sources = 0

    def add(self, lines: Lines, prefix: tuple[str, ...] = ()) -> None:
        """Lay what another source set over what is known."""
        self._sources += 1
        for path, line in lines.items():
            self._lines[(*prefix, *path)] = (self._sources, line)

    def include(self, other: Origins) -> None:
        """Lay all that another object knows over what is known."""
        for path, (source, line) in other._lines.items():
            self._lines[path] = (self._sources + source, line)
        self._sources += other._sources

    def where(self, path: Sequence[int | str]) -> str:
        """The place of a key or of the closest one above it; empty if nothing is known."""
        parts = tuple(str(part) for part in path if part != "[key]")
        source, found = 0, Line("", False)
        for size in range(1, len(parts) + 1):
            later, line = self._lines.get(parts[:size], (0, found))
            if later and (later >= source or not found.whole):  # else a later source replaced it
                source, found = later, line
        return found.place


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is there: faster


class _Loader(_Base):  # type: ignore[misc]
    """YAML as Snakemake reads it, but a date stays the text that was written."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith("timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, origins: Origins | None = None, *prefix: str) -> dict[str, Any]:
    """Read a YAML mapping; raises :class:`~snella.errors.UserError` for any fault of the file."""
    content, lines = parse(_text(path), str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of names to settings.")
    if origins is not None:
        origins.add(lines, prefix)
    return content


def parse(text: str, where: str) -> tuple[Any, Lines]:
    """YAML text as a value, and the place of each key by its path."""
    loader = _Loader(text) if not _unreadable(text) else None
    if loader is None:
        raise UserError(f"{where} is not valid YAML: it holds control characters; remove them.")
    lines: Lines = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _walk(node, (), where, lines, [])
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = plain(", ".join(filter(None, (error.context, error.problem))))
        raise UserError(f"{where} is not valid YAML{place}: {reason}; correct it.") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where} is not valid YAML: {plain(str(error))}; correct it.") from error
    except RecursionError as error:
        raise UserError(f"{where} is not valid YAML: nested too deeply; flatten it.") from error
    finally:
        loader.dispose()


def lines_of(content: Any, place: str) -> Lines:
    """The same place for every key of a mapping, such as one given on the command line."""
    if not isinstance(content, dict):
        return {}
    found: Lines = {}
    for key, value in content.items():
        found[(str(key),)] = Line(place, not isinstance(value, dict))
        found |= {(str(key), *path): line for path, line in lines_of(value, place).items()}
    return found


def _text(path: Path) -> str:
    try:
        if not path.is_file() and path.exists() and not path.is_fifo():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"Cannot read the configuration {path}: it is {kind}.")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        shown = str(path) if len(str(path)) <= LONGEST_PATH else ascii_name(path)
        raise UserError(
            f"Cannot read the configuration {shown}: {error.strerror}; correct the path."
        ) from error
    except ValueError as error:  # a NUL in the name
        raise UserError(f"Cannot read the configuration {ascii_name(path)}: {error}.") from error
    if len(content) > LARGEST:
        raise UserError(f"{path} has over {LARGEST >> 20} MB: no configuration; correct the path.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte {content[error.start]:#04x}); "
            "save the file in UTF-8."
        ) from error


def _unreadable(text: str) -> bool:
    return yaml.reader.Reader.NON_PRINTABLE.search(text) is not None


def _check_key(key: yaml.Node, value: yaml.Node, place: str) -> None:
    """Refuse names that YAML reads as true, false or null, and what a decimal comma makes."""
    if key.tag.endswith((":bool", ":null")):
        read = "null" if key.tag.endswith(":null") else "true or false"
        raise UserError(f"{place}: YAML reads the name {key.value} as {read}; put it in quotes.")
    if key.tag.endswith(":int") and value.tag.endswith(":null") and value.value == "":
        raise UserError(
            f"{place}: {key.value} stands where a name is needed; the decimals of a number follow "
            "a point, 0.001, and no comma."
        )


def _walk(
    node: yaml.Node,
    path: tuple[str, ...],
    where: str,
    lines: Lines,
    above: list[yaml.Node],
    count: list[int] | None = None,
) -> None:
    """Note the line of every key; refuse keys given twice, and values without end."""
    count = [0] if count is None else count
    count[0] += 1
    if node in above or count[0] > NODES:
        raise UserError(f"{where}, line {node.start_mark.line + 1}: anchors repeat without end.")
    if path:
        lines.setdefault(path, Line(f"{where}, line {node.start_mark.line + 1}", True))
    if node.tag.endswith((":int", ":float")) and OTHER_BASE.fullmatch(node.value):
        raise UserError(
            f"{where}, line {node.start_mark.line + 1}: YAML reads {node.value} as another number "
            "(base 8 or 60); write it without a leading zero or colon, or in quotes for text."
        )
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, str(index)), where, lines, [*above, node], count)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
            place = f"{where}, line {key.start_mark.line + 1}"
            _check_key(key, value, place)
            if name in seen and name != "<<":
                raise UserError(f"{place}: key {'.'.join((*path, name))!r} stands twice.")
            seen.add(name)
            lines[(*path, name)] = Line(place, not isinstance(value, yaml.MappingNode))
            _walk(value, (*path, name), where, lines, [*above, node], count)
