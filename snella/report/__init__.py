"""Tables from run records: cells, statistics, published numbers, LaTeX. Knows only records."""

from snella.report.cells import Missing
from snella.report.layout import SuiteInfo
from snella.report.pdf import compile_pdf
from snella.report.spec import TableSpec, parse_spec
from snella.report.write import print_table, write_table

__all__ = [
    "Missing",
    "SuiteInfo",
    "TableSpec",
    "compile_pdf",
    "parse_spec",
    "print_table",
    "write_table",
]
