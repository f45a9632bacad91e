"""A table's picture: one tight page, compiled by pdfLaTeX where it is installed."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from snella.errors import UserError
from snella.files import atomic
from snella.report.latex import ONE_COLUMN, TWO_COLUMNS

log = logging.getLogger(__name__)

RESOLUTION = 200  # dots per inch of the PNG
SECONDS = 60

# The page is as large as the table, without the standalone class (which is not in Debian's
# texlive-latex-recommended): the float becomes a plain box of the width it has in a paper.
PAGE = r"""\documentclass{article}
\usepackage{booktabs}\usepackage{graphicx}
\pagestyle{empty}\parindent0pt
\renewenvironment{table}[1][]{}{}
\renewenvironment{table*}[1][]{}{}
\renewcommand\caption[1]{{\small #1\par}\vspace{5pt}}
\begin{document}
\newdimen\tablewidth \tablewidth=%(width)spt
\setbox0\vbox{\hsize\tablewidth \textwidth\tablewidth \linewidth\tablewidth \columnwidth\tablewidth
\input{%(file)s}}%%
\pdfpagewidth=\dimexpr\wd0+16pt\relax \pdfpageheight=\dimexpr\ht0+\dp0+16pt\relax
\pdfhorigin=8pt \pdfvorigin=8pt \hoffset0pt \voffset0pt \shipout\box0
\end{document}
"""


def compile_pdf(tex: Path) -> tuple[Path, Path | None]:
    """Compile a table to a PDF and a PNG beside it; return their paths (no PNG without pdftoppm).

    Raises UserError where pdfLaTeX is missing or does not accept the file.
    """
    text = tex.read_text(encoding="utf-8")
    width = TWO_COLUMNS if r"\begin{table*}" in text else ONE_COLUMN
    page = PAGE % {"width": width, "file": "table.tex"}
    pdf = _compile(tex, {"table.tex": text, "page.tex": page})
    return pdf, _png(pdf)


def compile_document(tex: Path) -> Path:
    """Compile a whole document to a PDF beside it; raises as above."""
    return _compile(tex, {"page.tex": tex.read_text(encoding="utf-8")}, passes=2)


def _compile(tex: Path, files: Mapping[str, str], passes: int = 1) -> Path:
    """Compile ``page.tex`` among ``files`` to the PDF beside ``tex``; long tables need 2 passes."""
    if shutil.which("pdflatex") is None:
        raise UserError("LaTeX is not installed (Debian: texlive-latex-recommended poppler-utils).")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        for _ in range(passes):
            problem = run_pdflatex(Path(folder))
            if problem:
                raise UserError(
                    f"pdflatex does not compile {tex}: {problem.rstrip('.')}; correct the file, or "
                    "write it anew."
                )
        pdf = tex.with_suffix(".pdf")
        with atomic(pdf) as temporary:
            shutil.copyfile(Path(folder, "page.pdf"), temporary)
        return pdf


def run_pdflatex(work: Path) -> str:
    """Run pdfLaTeX; the first error line of its log, or an empty string."""
    command = ["pdflatex", "-interaction=batchmode", "-halt-on-error", "page.tex"]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"still running after {SECONDS} s"
    if done.returncode == 0 and (work / "page.pdf").exists():
        return ""
    report = work / "page.log"
    lines = report.read_text(errors="replace").splitlines() if report.exists() else []
    return next((line for line in lines if line.startswith("!")), "no error in its log")


def _png(pdf: Path) -> Path | None:
    if shutil.which("pdftoppm") is None:
        log.warning("No pdftoppm on this machine: %s gets no picture.", pdf)
        return None
    command = ["pdftoppm", "-png", "-r", str(RESOLUTION), "-singlefile", str(pdf)]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    if done.returncode != 0:
        return None
    png = pdf.with_suffix(".png")
    with atomic(png) as temporary:
        temporary.write_bytes(done.stdout)
    return png
