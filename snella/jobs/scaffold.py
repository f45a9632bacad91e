"""``snella new-baseline NAME``: one method file that already passes ``snella check``."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from snella.errors import UserError
from snella.files import atomic, user_path
from snella.suite.config import Config
from snella.suite.plan import method_files

TEMPLATE = Path(__file__).parents[1] / "methods/template.py"
"""Read and not imported, which would cost the seconds of torch."""


def write_baseline(config: Config, name: str) -> list[str]:
    """Write ``baselines/NAME.py`` (or the path NAME.py) and return lines on what to do next.

    Raises :class:`~snella.errors.UserError` for a name that cannot be a method file's or that
    exists already.
    """
    outside = name.endswith(".py")
    path = user_path(name) if outside else Path(config.baselines) / f"{name}.py"
    _check_name(path.stem if outside else name)
    taken = path if path.exists() else None if outside else method_files(config).get(name)
    if taken is not None:
        raise UserError(f"{taken} exists already and is left as it is; choose another name.")
    with atomic(path) as temporary:
        temporary.write_text(_content(path.stem), encoding="utf-8")
    method = path.as_posix() if outside else name
    entry = f"{{file: {method}, label: {path.stem}}}" if outside else f"{{label: {name}}}"
    show = f"suites: {{{config.suite}: {{further_methods: [{path.stem}]}}}}   there too"
    listed = config.suites[config.suite].methods is not None  # else the suite has all rows
    return [
        f"{path} holds a method that runs; make it yours.",
        f"Check it:          snella check {method}",
        f"Add its row:       methods: {{{path.stem}: {entry}}}   in config/config.yaml",
        *([f"Show it:           {show}"] if listed else []),
        f"Train it once:     snella run --method {path.stem} --dataset digits",
        "What the hooks do: docs/add-a-baseline.md",
    ]


def _check_name(name: str) -> None:
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name):
        return
    better = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not better or better[0].isdigit() or keyword.iskeyword(better):
        better = f"my_{better}".rstrip("_")
    raise UserError(
        f"{name!r} cannot name a method file: small letters, digits and underscores only, "
        f"starting with a letter. Try {better!r}."
    )


def _content(name: str) -> str:
    title = "".join(part.capitalize() for part in name.split("_"))
    source = TEMPLATE.read_text(encoding="utf-8")
    return source.replace("NAME", name).replace("class Template(", f"class {title}(")
