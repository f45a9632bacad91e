"""Text files of data sets: read with one clear line for all that is not one."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from snella.errors import UserError

LARGEST = 2**27
"""Bytes of a list: millions of lines; more is some other file, and would fill the memory."""


def read_text(file: Path, needed: str = "") -> str:
    """The content of a UTF-8 text file; ``needed`` says what for where it is missing."""
    try:
        if file.exists() and not file.is_file() and not file.is_dir():  # a pipe hangs
            raise UserError(f"{file} is no regular file; a text file is expected there.")
        if file.is_file() and file.stat().st_size > LARGEST:
            raise UserError(f"{file} has over {LARGEST >> 20} MB: no list; correct the path.")
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        remedy = f": {needed}" if needed else "; unpack the archive completely"
        raise UserError(f"{file} is missing{remedy}.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder; a text file is expected there.") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file in UTF-8; save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error


def is_file(path: Path) -> bool:
    """Whether there is a file; a name that no file system takes is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def rows(file: Path, columns: int) -> list[tuple[int, list[str]]]:
    """Numbered lines of a text file, each split at white space into ``columns`` parts."""
    found = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        parts = line.split(maxsplit=columns - 1)
        if not parts:
            continue
        if len(parts) != columns:
            raise UserError(f"{file}:{number}: {line.strip()!r} has not {columns} columns.")
        found.append((number, [part.strip() for part in parts]))
    return found


def read_json(file: Path) -> Any:
    """The content of a JSON file, or a line that says why it is none."""
    text = read_text(file)
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise UserError(f"{file} is not valid JSON: nested too deeply.") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would keep the last of two equal keys without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:200]!r} occurs twice in one object")
    return found


def whole_number(text: str, where: str) -> int:
    """An integer in a file, or a line that says where it is none (or absurdly long)."""
    if not re.fullmatch(r"-?[0-9]{1,30}", text):
        raise UserError(f"{where}: {text[:40]!r} is not a whole number.")
    return int(text)
