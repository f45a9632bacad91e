"""Our numbers beside the printed ones.

papers (what is printed, and how it was made: the CSV and YAML files here) -> versus (a table of
ours beside its published counterpart) and audit (every published number and what became of it),
which audit_texts writes as Markdown, HTML and LaTeX.
"""
