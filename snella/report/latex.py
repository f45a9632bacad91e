"""A table as LaTeX: booktabs only, inside a table environment that a paper can \\input."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from snella.report.grid import Entry, Grid, Heading, Line, Section

STYLE = r"\footnotesize\setlength{\tabcolsep}{4pt}"
WIDE = 7  # columns from which a two-column paper needs both
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


def to_latex(grid: Grid) -> str:
    """The grid as a complete table environment."""
    environment = "table*" if len(grid.headings) >= WIDE else "table"
    packages = ["booktabs", "graphicx"] if grid.rotate else ["booktabs"]
    lines = [f"% {' '.join(comment.split())}" for comment in grid.comments]
    lines += [f"% needs \\usepackage{{{package}}}" for package in packages]
    lines += [f"\\begin{{{environment}}}[t]", r"\centering"]
    lines += [f"\\caption{{{escape(grid.caption)}}}", f"\\label{{tab:{_key(grid.name)}}}", STYLE]
    lines += _tabular(grid)
    lines += _below(grid)
    lines += [f"\\end{{{environment}}}"]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-:") else "-" for c in name)


def _tabular(grid: Grid) -> list[str]:
    width = len(grid.headings) + 1
    lines = [rf"\begin{{tabular}}{{@{{}}l{'c' * (width - 1)}}}", r"\toprule"]
    if grid.banner:
        lines += [rf"\multicolumn{{{width}}}{{@{{}}c}}{{\itshape {escape(grid.banner)}}} \\"]
        lines += [r"\midrule"]
    lines += _head(grid)
    padding = [_widths(grid, column) for column in range(width - 1)]
    for number, section in enumerate(grid.sections):
        lines += [_rule(section, number)]
        if section.title:
            title = rf"\textit{{{escape(section.title)}}}"
            lines += [rf"\multicolumn{{{width}}}{{@{{}}l}}{{{title}}} \\", r"\midrule"]
        for index, line in enumerate(section.lines):
            if index and section.lines[index - 1].continued:
                lines.append(r"\addlinespace[2pt]")
            lines.append(_line(line, padding))
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _rule(section: Section, number: int) -> str:
    return r"\midrule" if section.title or number == 0 else r"\addlinespace[3pt]"


def _head(grid: Grid) -> list[str]:
    """Block names over their columns with a rule each, then the columns' own names."""
    if not any(block for block, _ in grid.blocks):
        return ["Method & " + " & ".join(_heading(h, grid.rotate) for h in grid.headings) + r" \\"]
    top, rules, start = [""], [], 2
    for block, n in grid.blocks:
        if block is None:
            top += [""] * n
        else:
            top.append(rf"\multicolumn{{{n}}}{{c}}{{{escape(block)}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{start + n - 1}}}")
        start += n
    labels = ["Method", *[_heading(h, grid.rotate) for h in grid.headings]]
    return [" & ".join(top) + r" \\", "".join(rules), " & ".join(labels) + r" \\"]


def _heading(heading: Heading, rotate: bool) -> str:
    """A column's name; a long one breaks at the space nearest to its middle."""
    label = heading.label
    if rotate:
        return rf"\rotatebox{{90}}{{{escape(label)}}}"
    spaces = [i for i, c in enumerate(label) if c == " "]
    if len(label) < 10 or not spaces:
        return escape(label)
    middle = min(spaces, key=lambda i: abs(i - len(label) / 2))
    return rf"\shortstack{{{escape(label[:middle])}\\{escape(label[middle:])}}}"


def _widths(grid: Grid, column: int) -> tuple[int, int]:
    """Longest integer part of the numbers and of the spreads in a column."""
    entries = [line.entries[column] for line in grid.lines]
    return (
        max((_integer(e.text) for e in entries), default=0),
        max((_integer(e.spread) for e in entries), default=0),
    )


def _integer(text: str) -> int:
    return len(text.partition(".")[0]) if text[:1].isdigit() else 0


def _line(line: Line, padding: Sequence[tuple[int, int]]) -> str:
    label = escape(line.label)
    cells = [_entry(e, *widths) for e, widths in zip(line.entries, padding, strict=True)]
    if line.continued:
        label = rf"\quad\scriptsize {label}"
        cells = [rf"\scriptsize {cell}" for cell in cells]
    return " & ".join([label, *cells]) + r" \\"


def _entry(entry: Entry, integers: int, spread_integers: int) -> str:
    """A number, padded with invisible digits so that the points of a column stand in line."""
    text = escape(entry.text)
    if entry.mark == "best":
        text = rf"\textbf{{{text}}}"
    elif entry.mark == "second":
        text = rf"\underline{{{text}}}"
    if entry.text[:1].isdigit():
        text = _phantom(integers - _integer(entry.text)) + text
    if entry.spread:
        pad = _phantom(spread_integers - _integer(entry.spread))
        text += rf"\,{{\tiny$\pm$\,{entry.spread}{pad}}}"
    if entry.note:
        text += rf"\rlap{{\textsuperscript{{{entry.note}}}}}"
    return text


def _phantom(digits: int) -> str:
    return rf"\phantom{{{'0' * digits}}}" if digits > 0 else ""


def _below(grid: Grid) -> list[str]:
    """Remarks and footnotes, as wide as the line."""
    notes = [rf"\textsuperscript{{{letter}}}\,{escape(text)}." for letter, text in grid.notes]
    if not (grid.remarks or notes):
        return []
    body = [" ".join(map(escape, grid.remarks))] if grid.remarks else []
    if notes:
        body.append(r"\quad ".join(notes))
    return [
        r"\par\vspace{3pt}",
        r"\parbox{\linewidth}{\footnotesize\raggedright",
        "\\par\n".join(body) + "}",
    ]
