"""From run records to tables, statistics, figures and audits. Knows only records.

records -> one tidy frame (frame) -> numbers per row and column (columns, results, noise, table)
-> text (text, latex, pdf), statistics, comparison with published numbers (published, versus,
audit), figures; write puts a table's files on disk.
"""

from snella.report.frame import Missing, tidy
from snella.report.pdf import compile_pdf
from snella.report.spec import SuiteInfo, TableSpec, parse_spec
from snella.report.table import build_table
from snella.report.write import print_table, write_table

__all__ = [
    "Missing",
    "SuiteInfo",
    "TableSpec",
    "build_table",
    "compile_pdf",
    "parse_spec",
    "print_table",
    "tidy",
    "write_table",
]
