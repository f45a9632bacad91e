"""Template, style, script and data as one HTML file that fetches nothing.

Text is escaped by the template engine, data are JSON without markup, and a content security policy
with the digests of style and script keeps anything else from running.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from snella.report.page.content import Content
from snella.report.page.view import view


def render(content: Content) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    folder = files("snella.report.page")
    style, script, template = (
        (folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; "
        f"script-src {_digest(script)}; base-uri 'none'; form-action 'none'"
    )
    page = environment.from_string(template)
    return page.render(style=style, script=script, policy=policy, **view(content))


def _digest(text: str) -> str:
    found = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{found}'"
