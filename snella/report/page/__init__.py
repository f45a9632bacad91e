"""All results as one self-contained HTML file that works offline.

content (what is shown) -> view (plain values for template and script, with scatter and pictures;
then template, style and script in one file).
"""

from snella.report.page.content import Content, PageRun, PageSuite, PageTable
from snella.report.page.view import render

__all__ = ["Content", "PageRun", "PageSuite", "PageTable", "render"]
