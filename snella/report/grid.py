"""A table as text: what the LaTeX, Markdown and terminal writers print, decided once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from snella.report.tables import Cell, Mark, Table


@dataclass(frozen=True)
class Entry:
    """One printed cell; ``note`` is a footnote letter."""

    text: str
    spread: str = ""
    mark: Mark = ""
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One printed row. ``continued`` lines belong to the line above and print small."""

    label: str
    entries: tuple[Entry, ...]
    continued: bool = False


@dataclass(frozen=True)
class Section:
    """Rows below an optional header line."""

    title: str | None
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Heading:
    """A column's label, and the block it stands under."""

    label: str
    block: str | None = None


@dataclass(frozen=True)
class Grid:
    """A whole table. ``notes`` are (letter, text); ``comments`` go into the file only."""

    name: str
    caption: str
    banner: str
    headings: tuple[Heading, ...]
    sections: tuple[Section, ...]
    remarks: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    comments: tuple[str, ...] = ()
    rotate: bool = False

    @property
    def blocks(self) -> list[tuple[str | None, int]]:
        """(block, number of columns) from left to right; equal neighbours are one block."""
        return [(b, len(list(hs))) for b, hs in groupby(self.headings, key=lambda h: h.block)]

    @property
    def lines(self) -> list[Line]:
        """All rows, top to bottom."""
        return [line for section in self.sections for line in section.lines]


@dataclass
class Footnotes:
    """Gives every different text a letter: a … z, aa, ab, …"""

    letters: dict[str, str] = field(default_factory=dict)

    def letter(self, text: str) -> str:
        """The letter of ``text``; empty for an empty text."""
        if text and text not in self.letters:
            self.letters[text] = _letters(len(self.letters))
        return self.letters.get(text, "")

    @property
    def notes(self) -> tuple[tuple[str, str], ...]:
        """(letter, text) in order of first use."""
        return tuple((letter, text) for text, letter in self.letters.items())


def _letters(index: int) -> str:
    head, tail = divmod(index, 26)
    return (_letters(head - 1) if head else "") + chr(ord("a") + tail)


def table_grid(table: Table) -> Grid:
    """The table as printed."""
    footnotes = Footnotes()

    def entry(cell: Cell) -> Entry:
        return Entry(cell.text, cell.spread, cell.mark, footnotes.letter(cell.note))

    sections = tuple(
        Section(
            rows.title,
            tuple(
                Line(label, tuple(entry(table.cells[method, c.key]) for c in table.columns))
                for method, label in rows.methods
            ),
        )
        for rows in table.rows
    )
    return Grid(
        name=table.name,
        caption=table.caption,
        banner=table.suite.banner,
        headings=headings(table),
        sections=sections,
        remarks=tuple(table.remarks),
        notes=footnotes.notes,
        comments=comments(table),
        rotate=table.spec.rotate,
    )


def headings(table: Table) -> tuple[Heading, ...]:
    """The column headings; a number chosen on the test set says so above the column."""
    marker = "†" if table.board.selection == "best-test" else ""
    return tuple(
        Heading(table.label(c) + (marker if c.ranked else ""), c.block) for c in table.columns
    )


def comments(table: Table) -> tuple[str, ...]:
    """What a generated file says about itself."""
    counts = ", ".join(f"{n} {status}" for status, n in table.board.counts().items())
    lines: Iterable[str] = (
        table.suite.banner,
        f"Table {table.name}, suite {table.suite.name}; generated from run records, do not edit.",
        f"Runs: {counts or 'none'}. Selection: {table.board.selection}.",
    )
    return tuple(line for line in lines if line)
