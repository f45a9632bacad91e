"""A table for the terminal, through rich."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from snella.report.grid import Entry, Grid

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

STYLES = {"": "", "best": "bold", "second": "underline"}
GAP = 2  # characters between two columns
TITLE_WIDTH = 19  # a longer header line of a row group is broken


def print_grid(grid: Grid, console: Console | None = None) -> None:
    """Print the grid, in several pieces where it is wider than the terminal."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print(Text(grid.caption, style="bold"))
    for columns in pieces(grid, console.width):
        console.print(_piece(grid, columns))
    for remark in grid.remarks:
        console.print(Text(remark, style="dim"))
    for letter, text in grid.notes:
        console.print(Text(f"{letter}  {text}", style="dim"))


def pieces(grid: Grid, width: int) -> list[list[int]]:
    """Columns, by index, that fit side by side beside the method's name in ``width`` characters.

    A block stays together unless it is too wide for a piece of its own.
    """
    needs = [
        max(map(len, [*above.split("\n"), *(_plain(line.entries[i]) for line in grid.lines)])) + GAP
        for i, above in enumerate(_above(grid))
    ]
    room = width - _label_width(grid) - GAP
    units: list[list[int]] = []
    start = 0
    for _, n in grid.blocks:
        block = list(range(start, start + n))
        units += [block] if sum(needs[start : start + n]) <= room else [[i] for i in block]
        start += n
    result: list[list[int]] = [[]]
    for unit in units:
        if result[-1] and sum(needs[i] for i in result[-1] + unit) > room:
            result.append([])
        result[-1] += unit
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
    table.add_column(Text("Method"), no_wrap=True, vertical="bottom")
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
            table.add_row(label, *(_entry(line.entries[i], style) for i in columns))
    return table


def _plain(entry: Entry) -> str:
    spread = f" ±{entry.spread}" if entry.spread else ""
    return f"{entry.text}{spread}{' ' if entry.note else ''}{entry.note}"


def _entry(entry: Entry, style: str) -> Text:
    from rich.text import Text

    text = Text(entry.text, style=STYLES[entry.mark] or style)
    if entry.spread:
        text.append(f" ±{entry.spread}", style="dim")
    if entry.note:
        text.append(f" {entry.note}", style="dim italic")
    return text
