"""Text files of data sets: read with one clear line for all that is not one."""

from __future__ import annotations

from pathlib import Path

from snella.errors import UserError


def read_text(file: Path, needed: str = "") -> str:
    """The content of a UTF-8 text file; ``needed`` says what for where it is missing."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file} is missing{needed and ': ' + needed}.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder; a text file is expected there.") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file in UTF-8.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error


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


def whole_number(text: str, where: str) -> int:
    """An integer in a file, or a line that says where it is none."""
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is not a whole number.") from None
