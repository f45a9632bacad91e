"""From a results folder to a crate that can be archived."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from snella import __version__
from snella.errors import UserError
from snella.report.runs import crate
from snella.results import record_folders
from snella.suite.config import CHECKOUT, DEFAULT, Config, locate

TABLES = ("*.tex", "*.csv", "*.md", "*.pdf", "*.png", "*.html")


def write_crate(config: Config, out: Path, *, own: Path = DEFAULT, adapters: bool = False) -> Path:
    """Export the configuration's results folder to ``out``, a new folder or a .zip file.

    ``own`` is the user's configuration file, ``adapters`` asks for the trained weights too. Raises
    :class:`~snella.errors.UserError` if there is nothing to export, or no package rocrate.
    """
    if find_spec("rocrate") is None:
        raise UserError("The crate needs the package rocrate; `pip install rocrate` installs it.")
    results = Path(config.results)
    if out.suffix != ".zip" and out.resolve().is_relative_to((results / "runs").resolve()):
        raise UserError(f"{out} lies among the runs; name a folder outside {results}/runs.")
    folders = list(record_folders(results)) if results.is_dir() else []
    root = results / "runs" if (results / "runs").is_dir() else results
    runs = {folder.relative_to(root).as_posix(): folder for folder in folders}
    sources = crate.Sources(
        workflow=Path(locate("Snakefile")),
        rules=_below("workflow", "rules/*.smk") + _below("envs", "requirements.txt"),
        configuration=_configuration(own),
        tables=[
            (path, path.relative_to(results).as_posix())
            for pattern in TABLES
            for path in sorted(results.glob(pattern))
            if path.name != "README.md"
        ],
        runs=runs,
    )
    return crate.write(sources, out, __version__, adapters=adapters)


def _below(folder: str, pattern: str) -> list[tuple[Path, str]]:
    """Files of the working directory's folder, or of the checkout's, with their places."""
    root = Path(".") if Path(folder).is_dir() else CHECKOUT
    return [(p, p.relative_to(root).as_posix()) for p in sorted((root / folder).glob(pattern))]


def _configuration(own: Path) -> list[tuple[Path, str]]:
    """The shipped sections, and the user's file where it lies outside them."""
    files = _below("config", "**/*.yaml")
    known = {path.resolve() for path, _ in files}
    extra = (
        [(own, f"config/own/{own.name}")] if own.is_file() and own.resolve() not in known else []
    )
    return [*extra, *files]
