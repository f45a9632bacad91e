"""What the LaTeX, Markdown, CSV and terminal writers print."""

from __future__ import annotations

import csv
import io
import shutil
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_support import METHODS, QUICK, REAL, make, record, records, write
from rich.console import Console

from snella.errors import UserError
from snella.report import Missing, compile_pdf, print_table, tidy
from snella.report.latex import ONE_COLUMN, TWO_COLUMNS, choose_layout, escape, to_latex
from snella.report.pdf import PAGE, run_pdflatex
from snella.report.published import audit_texts
from snella.report.table import Cell
from snella.report.text import (
    Grid,
    Heading,
    Line,
    Section,
    pieces,
    table_grid,
    to_markdown,
)

needs_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
HARD = r"50% of $x_1 & {y}^2 ~ #3 \n <a|b> ß é ş ± λ – “q” ą 日本 ²"


def grid(runs=None, suite=REAL, methods=METHODS, **changes):
    runs = records(suite=suite.name) if runs is None else runs
    return table_grid(make(runs, suite, methods=methods, **changes))


def test_latex_has_groups_blocks_marks_and_footnotes():
    runs = records(lambda m, d, s: {"full": 0.9, "linear": 0.8, "lora-8": 0.7}[m])
    runs[0] = record("full", "beetles", None, status="oom", reason="100% of it")
    text = to_latex(grid(runs))
    assert r" &  & \multicolumn{3}{c}{FGVC} & \multicolumn{3}{c}{VTAB-1k} \\" in text
    assert r"\cmidrule(lr){3-5}\cmidrule(lr){6-8}" in text
    assert r"\multicolumn{8}{@{}l}{\textit{Others}} \\" in text
    assert r"Full & 12.3 & --\rlap{\textsuperscript{a}} & 90.0 &" in text
    assert r"Linear & 12.3 & 80.0 & 80.0 &" in text
    assert r"\textsuperscript{a}\,out of memory: 100\% of it." in text
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 1
    assert text.count(r"\midrule") == 2


def test_marks_are_bold_and_underlined():
    level = {"full": 0.9, "linear": 0.8, "lora-8": 0.7}
    text = to_latex(grid(records(lambda m, d, s: level[m] + s / 1000, seeds=[0, 1, 2])))
    assert r"\textbf{90.1}" in text and r"\underline" not in text
    text = to_latex(grid(records(lambda m, d, s: 0.5 + s * len(m) / 100, seeds=[0, 1, 2])))
    assert r"\textbf" not in text and r"\underline{5" in text


def test_own_and_reference_rows_are_set_off():
    rows = [
        {"methods": ["full"], "reference": True},
        {"methods": ["linear"]},
        {"methods": ["lora-8"], "own": True},
    ]
    text = to_latex(grid(rows=rows))
    assert text.count(r"\midrule") == 3


def test_decimal_points_stand_in_line():
    runs = records(lambda m, d, s: {"full": 1.0, "linear": 0.05, "lora-8": 0.5}[m])
    text = to_latex(grid(runs))
    assert r"\phantom{00}5.0" in text and r"\phantom{0}50.0" in text


def test_a_demo_says_so_once_in_every_file(tmp_path):
    paths = write(tmp_path, records(suite="quick"), QUICK)
    assert [p.name for p in paths] == ["t.csv", "t.md", "t.tex", "t_cells.csv"]
    banner = "Quick suite: demo data and backbone, not comparable with published numbers"
    tex = (tmp_path / "t.tex").read_text().splitlines()
    assert tex[0] == f"% {banner}"
    assert [line.startswith(r"\caption{" + banner) for line in tex if banner in line] == [
        False,
        True,
    ]
    assert (tmp_path / "t.md").read_text().count(banner) == 1
    assert all(banner in path.read_text() for path in paths)


def test_numbers_chosen_on_the_test_set_are_marked_everywhere(tmp_path):
    runs = records(protocol={"selection": "best-test"})
    for run in runs:
        run["metrics"]["best-test"] = run["metrics"]["last"]
    paths = write(tmp_path, runs)
    assert all("best-test" in path.read_text() for path in paths)
    assert r"beetles\textsuperscript{\dag}" in (tmp_path / "t.tex").read_text()
    assert "beetles†" in (tmp_path / "t.md").read_text()


def test_spread_over_seeds_is_printed():
    text = to_markdown(grid(records(lambda m, d, s: 0.5 + s / 100, seeds=[0, 1, 2])))
    assert "<u>51.0 ± 1.0</u>" in text and "3 seeds, mean ± sample standard deviation" in text


def test_wide_and_tidy_csv_hold_full_precision(tmp_path):
    runs = records(1 / 3, seeds=[0, 1])
    runs = [r for r in runs if r["run"]["method"] != "linear"]
    runs += [Missing("linear", "beetles", 0, "mine")]
    write(tmp_path, runs)
    wide = {r["method"]: r for r in csv.DictReader((tmp_path / "t.csv").open())}
    assert float(wide["full"]["beetles"]) == pytest.approx(100 / 3, abs=1e-9)
    assert (wide["full"]["beetles std"], wide["full"]["beetles n"]) == ("0", "2")
    assert wide["linear"]["beetles"] == "" and "beetles: not run" in wide["linear"]["notes"]
    cells = list(csv.DictReader((tmp_path / "t_cells.csv").open()))
    assert len(cells) == 3 * 7
    cell = next(c for c in cells if (c["method"], c["column"]) == ("full", "natural"))
    assert (cell["kind"], cell["n"], cell["unit"]) == ("mean_of_tasks", "2", "%")
    assert cell["seeds"] == "0;1"


def test_writing_twice_gives_the_same_bytes(tmp_path):
    runs = records(lambda m, d, s: len(m + d) / 100)
    for folder in ("a", "b"):
        write(tmp_path / folder, runs[:: 1 if folder == "a" else -1])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_terminal_table_is_split_where_the_terminal_is_narrow():
    made = grid()
    assert pieces(made, 200) == [[0, 1, 2, 3, 4, 5, 6]]
    assert pieces(made, 60) == [[0, 1, 2, 3], [4, 5, 6]]
    assert pieces(made, 1) == [[i] for i in range(7)]
    console = Console(file=io.StringIO(), width=60)
    print_table(make(records()), console)
    text = console.file.getvalue()
    assert text.count("LoRA-8") == 2 and "50.0" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 60


def test_markdown_shows_labels_as_they_are():
    text = to_markdown(grid(methods={"full": "a|b_*c*<x>"}, runs=[]))
    assert r"| a\|b\_\*c\*&lt;x&gt; |" in text


def test_footnotes_share_a_letter_for_the_same_text_and_go_on_after_z():
    cells = tuple(Cell(note=str(i)) for i in (*range(27), 0))
    lines = (Line("a", cells), Line("b", (), continued=True, note="last"))
    letters = Grid("t", "", (), (Section(None, lines),)).letters
    assert list(letters.values()) == [*string.ascii_lowercase, "aa", "ab"]
    assert letters["0"] == "a" and letters["last"] == "ab"


@given(st.text())
def test_escaped_text_has_no_active_character(text):
    plain = escape(text)
    for command in ("textbackslash", "textasciitilde", "textasciicircum"):
        plain = plain.replace(f"\\{command}{{}}", "")
    for character in "&%#_{}":
        plain = plain.replace(f"\\{character}", "")
    assert not set(plain) & set("&%#~") and "\n" not in plain


def test_escape_of_known_characters():
    assert escape("50% of a_b & {c}") == r"50\% of a\_b \& \{c\}"
    assert escape("κ ± 1 – é日") == r"$\kappa$ $\pm$ 1 -- é?"


@needs_latex
def test_hard_labels_compile_to_a_pdf(tmp_path):
    runs = records(methods=["full", "linear"])
    runs += [record("lora-8", d, None, status="failed", reason=HARD) for d in ("beetles", "count")]
    methods = {"full": HARD, "linear": "Linear", "lora-8": "LoRA-8"}
    write(tmp_path, runs, methods=methods, caption="{metric} " + HARD.replace("{y}", ""))
    made = compile_pdf(tmp_path / "t.tex")
    assert made[0].read_bytes().startswith(b"%PDF")
    if shutil.which("pdftoppm"):
        assert made[1] is not None and made[1].stat().st_size > 10_000
    assert [file for file in tmp_path.iterdir() if file.name[0] == "."] == []


def wide_grid(columns, spread="", rows=21, blocks=3, label="SNELLA-32"):
    heads = tuple(
        Heading(f"Data set {i}", f"Block {i * blocks // columns}") for i in range(columns)
    )
    cells = (Cell("77.9", spread),) * columns
    lines = tuple(Line(label, cells) for _ in range(rows))
    return Grid("t", "A table.", heads, (Section(None, lines),), remarks=("A remark.",))


@pytest.mark.parametrize(
    ("made", "width", "panels"),
    [
        (wide_grid(4, rows=5), ONE_COLUMN, 1),
        (wide_grid(11), TWO_COLUMNS, 1),
        (wide_grid(11, "0.3"), TWO_COLUMNS, 1),
        (wide_grid(20), TWO_COLUMNS, 1),
        (wide_grid(21, "0.3"), TWO_COLUMNS, 3),
    ],
)
def test_every_table_fits_a_column_or_the_page(made, width, panels, tmp_path):
    layout = choose_layout(made)
    assert (layout.width, len(layout.panels)) == (width, panels)
    assert sorted(i for panel in layout.panels for i in panel) == list(range(len(made.headings)))
    if shutil.which("pdflatex"):
        text = to_latex(made)
        (tmp_path / "table.tex").write_text(text)
        (tmp_path / "page.tex").write_text(PAGE % {"width": width, "file": "table.tex"})
        assert run_pdflatex(tmp_path) == ""
        assert "Overfull" not in (tmp_path / "page.log").read_text()


@needs_latex
def test_every_latin_character_compiles(tmp_path):
    characters = " ".join(map(escape, map(chr, range(0x20, 0x500))))
    source = rf"\documentclass{{article}}\begin{{document}}{characters}\end{{document}}"
    (tmp_path / "page.tex").write_text(source)
    assert run_pdflatex(tmp_path) == ""


@needs_latex
def test_broken_latex_is_named(tmp_path):
    (tmp_path / "t.tex").write_text(r"\undefinedcommand")
    with pytest.raises(UserError, match=r"t\.tex: ! Undefined control sequence; correct the file"):
        compile_pdf(tmp_path / "t.tex")


def test_without_latex_there_is_one_line_and_no_pdf(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (tmp_path / "t.tex").write_text("text")
    with pytest.raises(UserError, match="LaTeX is not installed"):
        compile_pdf(tmp_path / "t.tex")
    assert tmp_path / "audit.pdf" not in audit_texts.write(tidy([]), tmp_path)
    (line,) = caplog.messages
    assert line.startswith("audit.pdf is not made: LaTeX is not installed")
