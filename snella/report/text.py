"""A table as text, decided once for all writers, and its Markdown and terminal forms."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from snella.report.table import Cell, Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text


FIRST = "Method"
"""What the first column is called."""


@dataclass(frozen=True)
class Line:
    """One printed row. ``continued`` lines belong to the line above and print small.

    ``note`` is a footnote of such a line as a whole.
    """

    label: str
    cells: tuple[Cell, ...]
    continued: bool = False
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Rows below an optional header line; ``apart`` sets them off by a rule."""

    title: str | None
    lines: tuple[Line, ...]
    apart: bool = False


@dataclass(frozen=True)
class Heading:
    """A column's label, and the block it stands under."""

    label: str
    block: str | None = None


@dataclass(frozen=True)
class Grid:
    """A whole table; ``comments`` go into the file only."""

    name: str
    caption: str
    headings: tuple[Heading, ...]
    sections: tuple[Section, ...]
    remarks: tuple[str, ...] = ()
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

    @cached_property
    def letters(self) -> dict[str, str]:
        """A letter for every different footnote, in reading order: a … z, aa, ab, …"""
        texts = [t for line in self.lines for t in (*(c.note for c in line.cells), line.note) if t]
        return {text: _letters(index) for index, text in enumerate(dict.fromkeys(texts))}

    def letter(self, note: str) -> str:
        """The letter of a footnote; empty for an empty one."""
        return self.letters.get(note, "")

    def units(self) -> list[list[int]]:
        """Columns that belong together: those of a block; a column without one stands alone."""
        result: list[list[int]] = []
        start = 0
        for block, n in self.blocks:
            columns = list(range(start, start + n))
            result += [[i] for i in columns] if block is None else [columns]
            start += n
        return result


def _letters(index: int) -> str:
    head, tail = divmod(index, 26)
    return (_letters(head - 1) if head else "") + chr(ord("a") + tail)


def table_grid(table: Table) -> Grid:
    """The table as printed."""
    sections = []
    for index, rows in enumerate(table.rows):
        lines = tuple(
            Line(table.labels[m], tuple(table.cells[m, c.key] for c in table.columns))
            for m in rows.methods
        )
        after_reference = index > 0 and table.rows[index - 1].reference
        sections.append(Section(rows.group, lines, rows.own or after_reference))
    return Grid(
        name=table.name,
        caption=table.caption,
        headings=headings(table),
        sections=tuple(sections),
        remarks=tuple(table.remarks),
        comments=comments(table),
        rotate=table.spec.rotate,
    )


def headings(table: Table) -> tuple[Heading, ...]:
    """The column headings; a number chosen on the test set says so above the column."""
    marker = "†" if table.results.selection == "best-test" else ""
    return tuple(
        Heading(table.label(c) + (marker if c.ranked else ""), c.block) for c in table.columns
    )


def origin(table: Table) -> str:
    """The table and its suites, by which a generated file is known."""
    return f"Table {table.name}, suite {', '.join(suite.name for suite in table.suites)};"


def comments(table: Table) -> tuple[str, ...]:
    """What a generated file says about itself."""
    counts = ", ".join(f"{n} {status}" for status, n in table.results.counts().items())
    lines: Iterable[str] = (
        table.banner,
        f"{origin(table)} generated from run records, do not edit.",
        f"Runs: {counts or 'none'}. Selection: {table.results.selection}.",
    )
    return tuple(line for line in lines if line)


MARKDOWN = {"": "{}", "best": "**{}**", "tied": "<u>{}</u>"}


def to_markdown(grid: Grid) -> str:
    """The grid as GitHub Markdown: caption, table, remarks and footnotes."""
    heads = [
        escape_markdown(h.label)
        if h.block is None
        else f"{escape_markdown(h.block)}<br>{escape_markdown(h.label)}"
        for h in grid.headings
    ]
    lines = [f"**{escape_markdown(grid.caption)}**", ""]
    lines += [markdown_row([FIRST, *heads]), markdown_row(["---", *["---:"] * len(heads)])]
    for section in grid.sections:
        if section.title:
            lines.append(markdown_row([f"*{escape_markdown(section.title)}*", *[""] * len(heads)]))
        lines += [_markdown_line(grid, line) for line in section.lines]
    lines += ["", *[f"{escape_markdown(remark)}  " for remark in grid.remarks]]
    lines += [
        f"<sup>{letter}</sup> {escape_markdown(text)}  " for text, letter in grid.letters.items()
    ]
    return "\n".join(lines).rstrip() + "\n"


def markdown_row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def _markdown_line(grid: Grid, line: Line) -> str:
    label = escape_markdown(line.label) + _markdown_note(grid, line.note)
    cells = [_markdown_cell(grid, cell) for cell in line.cells]
    return markdown_row([f"<sub>{label}</sub>" if line.continued else label, *cells])


def _markdown_cell(grid: Grid, cell: Cell) -> str:
    spread = f" ± {cell.spread}" if cell.spread else ""
    text = MARKDOWN[cell.mark].format(escape_markdown(cell.text) + spread)
    return text + _markdown_note(grid, cell.note)


def _markdown_note(grid: Grid, note: str) -> str:
    return f"<sup>{grid.letter(note)}</sup>" if note else ""


def escape_markdown(text: str) -> str:
    """Plain text as Markdown that shows the same text."""
    for character in "\\|*_`[]":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "&lt;").replace(">", "&gt;")


STYLES = {"": "", "best": "bold", "tied": "underline"}
GAP = 2  # characters between two columns
TITLE_WIDTH = 19  # a longer header line of a row group is broken


def print_grid(grid: Grid, console: Console | None = None) -> None:
    """Print the grid through rich, in several pieces where it is wider than the terminal."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print(Text(grid.caption, style="bold"))
    for columns in pieces(grid, console.width):
        console.print(_piece(grid, columns))
    for remark in grid.remarks:
        console.print(Text(remark, style="dim"))
    for text, letter in grid.letters.items():
        console.print(Text(f"{letter}  {text}", style="dim"))


def pieces(grid: Grid, width: int) -> list[list[int]]:
    """Columns, by index, that fit side by side beside the method's name in ``width`` characters.

    A block stays together unless it is too wide for a piece of its own.
    """
    needs = [
        max(map(len, [*above.split("\n"), *(_cell(grid, x.cells[i]).plain for x in grid.lines)]))
        + GAP
        for i, above in enumerate(_above(grid))
    ]
    return pack(grid.units(), needs, width - _label_width(grid) - GAP)


def pack(units: list[list[int]], needs: list[float] | list[int], room: float) -> list[list[int]]:
    """Fill pieces of width ``room`` with units of columns; one that is too wide is broken."""
    result: list[list[int]] = [[]]
    for unit in units:
        whole = sum(needs[i] for i in unit) <= room
        for part in [unit] if whole else [[i] for i in unit]:
            if result[-1] and sum(needs[i] for i in result[-1] + part) > room:
                result.append([])
            result[-1] += part
    return result


def _label_width(grid: Grid) -> int:
    return max(TITLE_WIDTH, *(len(line.label) + 2 * line.continued for line in grid.lines))


def _above(grid: Grid) -> list[str]:
    """Headings, broken at spaces; a block is named above its first and its last column."""
    result = []
    neighbours = [None, *(h.block for h in grid.headings), None]
    for i, heading in enumerate(grid.headings):
        edge = heading.block != neighbours[i] or heading.block != neighbours[i + 2]
        block = (heading.block or "") if edge else ""
        result.append(f"{block}\n{heading.label}".strip().replace(" ", "\n"))
    return result


def _piece(grid: Grid, columns: list[int]) -> RichTable:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(Text(FIRST), no_wrap=True, vertical="bottom")
    above = _above(grid)
    for index in columns:
        table.add_column(Text(above[index]), justify="right", no_wrap=True, vertical="bottom")
    for section in grid.sections:
        table.add_section()
        if section.title:
            for part in textwrap.wrap(section.title, _label_width(grid)):
                table.add_row(Text(part, style="italic"))
        for line in section.lines:
            style = "dim" if line.continued else ""
            label = Text(("  " if line.continued else "") + line.label, style=style)
            label.append(f" {grid.letter(line.note)}" if line.note else "", style="dim italic")
            table.add_row(label, *(_cell(grid, line.cells[i], style) for i in columns))
    return table


def _cell(grid: Grid, cell: Cell, style: str = "") -> Text:
    from rich.text import Text

    text = Text(cell.text, style=STYLES[cell.mark] or style)
    if cell.spread:
        text.append(f" ±{cell.spread}", style="dim")
    if cell.note:
        text.append(f" {grid.letter(cell.note)}", style="dim italic")
    return text
