"""A table as GitHub Markdown."""

from __future__ import annotations

from snella.report.grid import Entry, Grid, Line

MARKS = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}


def to_markdown(grid: Grid) -> str:
    """The grid as Markdown: caption, table, remarks and footnotes."""
    heads = [
        escape(h.label) if h.block is None else f"{escape(h.block)}<br>{escape(h.label)}"
        for h in grid.headings
    ]
    lines = [f"**{escape(grid.caption)}**", ""]
    first = escape(f"Method — {grid.banner}" if grid.banner else "Method")
    lines += [_row([first, *heads]), _row(["---", *["---:"] * len(heads)])]
    for section in grid.sections:
        if section.title:
            lines.append(_row([f"*{escape(section.title)}*", *[""] * len(heads)]))
        lines += [_line(line) for line in section.lines]
    lines += ["", *[f"{escape(remark)}  " for remark in grid.remarks]]
    lines += [f"<sup>{letter}</sup> {escape(text)}  " for letter, text in grid.notes]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _line(line: Line) -> str:
    label = escape(line.label)
    return _row([f"<sub>{label}</sub>" if line.continued else label, *map(_entry, line.entries)])


def _entry(entry: Entry) -> str:
    spread = f" ± {entry.spread}" if entry.spread else ""
    note = f"<sup>{entry.note}</sup>" if entry.note else ""
    return MARKS[entry.mark].format(escape(entry.text) + spread) + note


def escape(text: str) -> str:
    """Plain text as Markdown that shows the same text."""
    for character in "\\|*_`[]":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "&lt;").replace(">", "&gt;")
