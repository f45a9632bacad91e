"""A table as LaTeX: booktabs only, inside a table environment that a paper can \\input.

The layout is chosen by width: one column (234 pt) of a two-column page, both (497 pt), smaller
type, upright headings, and last several panels one below the other.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

from snella.report.table import Cell
from snella.report.text import FIRST, Grid, Heading, Line, Section, pack

ONE_COLUMN, TWO_COLUMNS = 234.0, 497.0  # pt, of a CVPR page
PAGE_HEIGHT = 600.0
SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "—": "---",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "∗": r"$^\ast$",
    "†": r"\textsuperscript{\dag}",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "²": r"\textsuperscript{2}",
    "µ": r"$\mu$",
    "…": r"\dots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    '"': "''",
}
GREEK = {
    chr(code): f"$\\{unicodedata.name(chr(code)).split()[-1].lower()}$"
    for code in range(0x3B1, 0x3CA)
    if code not in (0x3BF, 0x3C2, 0x3BB)
} | {"λ": r"$\lambda$", "Δ": r"$\Delta$", "Σ": r"$\Sigma$"}


def escape(text: str) -> str:
    """Plain text as LaTeX that prints the same text under pdfLaTeX.

    Characters beyond Latin that have no translation become a question mark, so that no label
    or error message can stop a compilation.
    """
    return "".join(_character(c) for c in unicodedata.normalize("NFC", " ".join(text.split())))


def _character(c: str) -> str:
    if c in SPECIAL or c in GREEK:
        return SPECIAL.get(c) or GREEK[c]
    if c.isascii():
        return c if c.isprintable() else "?"
    # pdfLaTeX composes accents over Latin letters, all but the ogonek (U+0328)
    parts = unicodedata.decomposition(c).split()
    composed = len(parts) == 2 and not parts[0].startswith("<") and parts[1] != "0328"
    accented = composed and ord(c) < 0x180
    return c if accented or c in "ßæÆøØœŒłŁ" else "?"


@dataclass(frozen=True)
class Layout:
    """How a grid is set: width of the page's column(s) in pt, type, gaps, and panels of columns."""

    width: float
    size: str
    points: float
    gap: float
    rotate: bool
    panels: tuple[tuple[int, ...], ...]

    @property
    def style(self) -> str:
        """The commands before the tabular."""
        return rf"\{self.size}\setlength{{\tabcolsep}}{{{self.gap:g}pt}}"

    @property
    def environment(self) -> str:
        """The float that is as wide."""
        return "table" if self.width == ONE_COLUMN else "table*"


TYPES = (
    ("footnotesize", 8.0, 4.0),
    ("scriptsize", 7.0, 3.0),
    ("scriptsize", 7.0, 2.0),
    ("scriptsize", 7.0, 1.2),
)
SAFETY = 1.01  # widths are estimated


def choose_layout(grid: Grid) -> Layout:
    """The most readable layout that fits; panels only where nothing else does."""
    everything = (tuple(range(len(grid.headings))),)
    turns = (True,) if grid.rotate else (False, True)
    tries = [Layout(ONE_COLUMN, *kind, False, everything) for kind in TYPES[:2] if not grid.rotate]
    tries += [Layout(TWO_COLUMNS, *kind, turn, everything) for kind in TYPES for turn in turns]
    for layout in tries:
        if SAFETY * _natural(grid, layout, layout.panels[0]) <= layout.width:
            return layout
    split = [
        _panels(grid, replace(layout, rotate=False))
        for layout in tries
        if layout.width == TWO_COLUMNS
    ]
    low = [layout for layout in split if _height(grid, layout) <= PAGE_HEIGHT]
    return low[0] if low else min(split, key=lambda layout: _height(grid, layout))


def _panels(grid: Grid, layout: Layout) -> Layout:
    """Distribute the columns over panels, blocks kept together where they fit."""
    needs = [_column_width(grid, layout, i) for i in range(len(grid.headings))]
    room = layout.width / SAFETY - _label_width(grid, layout)
    columns = pack(grid.units(), needs, room)
    return replace(layout, panels=tuple(map(tuple, columns)))


def _height(grid: Grid, layout: Layout) -> float:
    rows = len(grid.lines) + sum(s.title is not None for s in grid.sections) + 4
    return len(layout.panels) * rows * layout.points * 1.2


def _natural(grid: Grid, layout: Layout, columns: Sequence[int]) -> float:
    return _label_width(grid, layout) + sum(_column_width(grid, layout, i) for i in columns)


def _label_width(grid: Grid, layout: Layout) -> float:
    labels = [
        _text_width(line.label) * _points(line, layout) + (10.0 if line.continued else 0.0)
        for line in grid.lines
    ]
    return max([_text_width(FIRST) * layout.points, *labels]) + layout.gap


def _column_width(grid: Grid, layout: Layout, column: int) -> float:
    numbers = [_cell_width(line.cells[column], _points(line, layout)) for line in grid.lines]
    parts = _broken(grid.headings[column].label)
    head = 1.2 if layout.rotate else max(map(_text_width, parts))
    return max([*numbers, head * layout.points]) + 2 * layout.gap


def _points(line: Line, layout: Layout) -> float:
    return 7.0 if line.continued else layout.points


def _cell_width(cell: Cell, points: float) -> float:
    spread = _text_width(f"±{cell.spread}") * 6.2 + 3 if cell.spread else 0.0
    return _text_width(cell.text) * points * (1.08 if cell.mark == "best" else 1) + spread


def _text_width(text: str) -> float:
    """About the width of a text in ems of Computer Modern at 7 to 8 pt."""
    return sum(WIDTHS.get(c, 0.78 if c.isupper() else 0.53) for c in text)


WIDTHS = dict.fromkeys("iljtf.,:;'|!()[] ", 0.36) | dict.fromkeys("mwMW±×−+=&%#@", 0.9) | {"†": 0.4}


def to_latex(grid: Grid) -> str:
    """The grid as a complete table environment, no wider than the page's column or columns.

    A table that would be longer than the page in panels is printed without its spreads.
    """
    layout = choose_layout(grid)
    if _height(grid, layout) > PAGE_HEIGHT and any(c.spread for x in grid.lines for c in x.cells):
        grid = _without_spread(grid)
        layout = choose_layout(grid)
    packages = ["booktabs", "graphicx"] if layout.rotate else ["booktabs"]
    lines = [f"% {' '.join(comment.split())}" for comment in grid.comments]
    lines += [f"% needs \\usepackage{{{package}}}" for package in packages]
    lines += [f"\\begin{{{layout.environment}}}[t]", r"\centering"]
    lines += [f"\\caption{{{escape(grid.caption)}}}", f"\\label{{tab:{_key(grid.name)}}}"]
    lines += [layout.style]
    for index, columns in enumerate(layout.panels):
        lines += [r"\par\vspace{6pt}"] if index else []
        lines += _tabular(grid, layout, columns)
    lines += _below(grid)
    lines += [f"\\end{{{layout.environment}}}"]
    return "\n".join(lines) + "\n"


def _without_spread(grid: Grid) -> Grid:
    def plain(line: Line) -> Line:
        return replace(line, cells=tuple(replace(cell, spread="") for cell in line.cells))

    sections = tuple(replace(s, lines=tuple(map(plain, s.lines))) for s in grid.sections)
    remarks = (*grid.remarks, "The spread (±) is in the CSV and Markdown files.")
    return replace(grid, sections=sections, remarks=remarks)


def _key(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-:") else "-" for c in name)


def _tabular(grid: Grid, layout: Layout, columns: Sequence[int]) -> list[str]:
    """One tabular of some of the columns; panels are all as wide as the page."""
    count = len(columns) + 1
    form = f"l{'c' * (count - 1)}@{{}}"
    begin, end = rf"\begin{{tabular}}{{@{{}}{form}}}", r"\end{tabular}"
    if len(layout.panels) > 1:
        fill = r"@{\extracolsep{\fill}}"
        begin = rf"\begin{{tabular*}}{{\linewidth}}{{{fill}{form}}}"
        end = r"\end{tabular*}"
    lines = [begin, r"\toprule", *_head(grid, layout, columns)]
    padding = [_widths(grid, column) for column in columns]
    for number, section in enumerate(grid.sections):
        lines += [_rule(section, number)]
        if section.title:
            title = rf"\textit{{{escape(section.title)}}}"
            lines += [rf"\multicolumn{{{count}}}{{@{{}}l}}{{{title}}} \\"]
        for index, line in enumerate(section.lines):
            if index and section.lines[index - 1].continued and not line.continued:
                lines.append(r"\addlinespace[2pt]")
            lines.append(_line(grid, line, [line.cells[i] for i in columns], padding))
    return [*lines, r"\bottomrule", end]


def _rule(section: Section, number: int) -> str:
    return r"\midrule" if section.title or section.apart or number == 0 else r"\addlinespace[3pt]"


def _head(grid: Grid, layout: Layout, columns: Sequence[int]) -> list[str]:
    """Block names over their columns with a rule each, then the columns' own names."""
    shown = replace(grid, headings=tuple(grid.headings[i] for i in columns))
    labels = [escape(FIRST), *[_heading(h, layout.rotate) for h in shown.headings]]
    names = " & ".join(labels) + r" \\"
    if not any(block for block, _ in shown.blocks):
        return [names]
    top, rules, start = [""], [], 2
    for block, n in shown.blocks:
        if block is None:
            top += [""] * n
        else:
            top.append(rf"\multicolumn{{{n}}}{{c}}{{{escape(block)}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{start + n - 1}}}")
        start += n
    return [" & ".join(top) + r" \\", "".join(rules), names]


def _broken(label: str) -> list[str]:
    """A long heading in two lines, broken at the space nearest to its middle."""
    spaces = [i for i, c in enumerate(label) if c == " "]
    if len(label) < 10 or not spaces:
        return [label]
    middle = min(spaces, key=lambda i: abs(i - len(label) / 2))
    return [label[:middle], label[middle + 1 :]]


def _heading(heading: Heading, rotate: bool) -> str:
    if rotate:
        return rf"\rotatebox{{90}}{{{escape(heading.label)}}}"
    parts = [escape(part) for part in _broken(heading.label)]
    return parts[0] if len(parts) == 1 else rf"\shortstack{{{parts[0]}\\{parts[1]}}}"


def _widths(grid: Grid, column: int) -> tuple[int, int]:
    """Longest integer part of the numbers and of the spreads in a column."""
    cells = [line.cells[column] for line in grid.lines]
    return (
        max((_integer(c.text) for c in cells), default=0),
        max((_integer(c.spread) for c in cells), default=0),
    )


def _integer(text: str) -> int:
    """How many digits a number has before its point; none for what is no number."""
    digits = text.lstrip("+−").partition(".")[0]
    return len(digits) if digits.isdigit() else 0


def _line(grid: Grid, line: Line, cells: Sequence[Cell], padding: Sequence[tuple[int, int]]) -> str:
    label = escape(line.label)
    texts = [_cell(grid, c, *widths) for c, widths in zip(cells, padding, strict=True)]
    if line.continued:
        label = rf"\quad\scriptsize {label}"
        label += rf"\textsuperscript{{{grid.letter(line.note)}}}" if line.note else ""
        texts = [rf"\scriptsize {text}" if text else "" for text in texts]
    return " & ".join([label, *texts]) + r" \\"


def _cell(grid: Grid, cell: Cell, integers: int, spread_integers: int) -> str:
    """A number, padded with invisible digits so that the points of a column stand in line."""
    text = escape(cell.text)
    if cell.mark == "best":
        text = rf"\textbf{{{text}}}"
    elif cell.mark == "tied":
        text = rf"\underline{{{text}}}"
    if _integer(cell.text):
        text = _phantom(integers - _integer(cell.text)) + text
    if cell.spread:
        pad = _phantom(spread_integers - _integer(cell.spread))
        text += rf"\,{{\tiny$\pm$\,{cell.spread}{pad}}}"
    if cell.note:
        text += rf"\rlap{{\textsuperscript{{{grid.letter(cell.note)}}}}}"
    return text


def _phantom(digits: int) -> str:
    return rf"\phantom{{{'0' * digits}}}" if digits > 0 else ""


def _below(grid: Grid) -> list[str]:
    """Remarks and footnotes, as wide as the line."""
    notes = [
        rf"\textsuperscript{{{letter}}}\,{escape(text.rstrip('.'))}."
        for text, letter in grid.letters.items()
    ]
    if not (grid.remarks or notes):
        return []
    body = [" ".join(map(escape, grid.remarks))] if grid.remarks else []
    if notes:
        body.append(r"\quad ".join(notes))
    return [
        r"\par\vspace{3pt}",
        r"\parbox{\linewidth}{\scriptsize\raggedright",
        "\\par\n".join(body) + "}",
    ]
