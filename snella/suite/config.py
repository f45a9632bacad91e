"""What to run, as typed data: suites, backbones, data sets, methods, protocols.

``config/`` holds one YAML file per section and one file per suite; ``config/config.yaml``
(or any file given instead) chooses the suite and may add to or override every section, so
that a lab needs a single file of its own. An unknown key is an error that names the file,
the key and the closest match.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from snella.errors import UserError
from snella.tasks.base import DatasetSpec
from snella.validation import Strict, validate

SECTIONS = ("backbones", "datasets", "methods", "protocols", "suites")
Name = str
DEFAULT = Path("config/config.yaml")
CHECKOUT = Path(__file__).resolve().parents[2]
"""The repository this package runs from: what it ships serves calls from other directories."""


class BackboneEntry(Strict):
    """A pre-trained model: timm architecture and keyword arguments, and the weights' file."""

    arch: str
    kwargs: dict[str, Any] = {}
    file: str | None = None
    title: str = ""
    demo: bool = False


class MethodEntry(Strict):
    """A row: a method file (a stem in ``baselines/`` or a path), its settings and its label."""

    file: str = Field(description="default: the row's name")
    label: str = ""
    hyperparameters: dict[str, Any] = {}
    protocol: dict[str, Any] = {}


class MethodOverride(Strict):
    """What a suite, or a released script, says about one row."""

    protocol: dict[str, Any] = {}
    hyperparameters: dict[str, Any] = {}


class SuiteEntry(Strict):
    """Columns, backbone, protocol and seeds; ``groups`` maps a group's name to its data sets."""

    title: str
    demo: bool = False
    backbone: Name
    protocol: Name
    overrides: dict[str, Any] = {}
    seeds: list[int] = Field([0], min_length=1)
    base_seed: int = 0
    groups: dict[str, list[Name]]
    methods: list[Name] | None = None
    method_overrides: dict[Name, MethodOverride] = {}

    @property
    def datasets(self) -> list[str]:
        """All data sets of the suite, by group."""
        return [name for group in self.groups.values() for name in group]


class Config(Strict):
    """The merged configuration."""

    suite: Name
    results: str = "results"
    data: str = "data"
    baselines: str = "baselines"
    tasks: str = "tasks"
    allow_missing: bool = False
    warm_workers: bool = True
    task_suites: dict[str, Name] = {}
    backbones: dict[Name, BackboneEntry]
    datasets: dict[Name, DatasetSpec]
    methods: dict[Name, MethodEntry]
    protocols: dict[Name, dict[str, Any]]
    suites: dict[Name, SuiteEntry]
    tables: dict[Name, dict[str, Any]]
    released: dict[Name, dict[Name, MethodOverride]] = {}


def locate(path: str) -> str:
    """``path`` as it is, or if there is no such file but the checkout ships one, that."""
    shipped = CHECKOUT / path
    return path if Path(path).exists() or not shipped.exists() else shipped.as_posix()


def load(path: Path = DEFAULT, overrides: dict[str, Any] | None = None) -> Config:
    """Read ``path``, the sections beside it, and ``overrides`` (as from ``--config``)."""
    path = Path(locate(path.as_posix())) if path == DEFAULT else path
    return merge(read_yaml(path), path, overrides or {})


def merge(own: dict[str, Any], path: Path, overrides: dict[str, Any]) -> Config:
    """Lay a user's configuration over the shipped sections and validate the whole."""
    shipped = _shipped_folder(path)
    base: dict[str, Any] = {name: read_yaml(shipped / f"{name}.yaml") for name in SECTIONS[:-1]}
    base["suites"] = {p.stem: read_yaml(p) for p in sorted((shipped / "suites").glob("*.yaml"))}
    base["tables"] = {}
    for file in sorted((shipped / "tables").glob("*.yaml")):
        base["tables"].update(read_yaml(file))
    released = shipped / "released.yaml"
    base["released"] = read_yaml(released) if released.exists() else {}
    merged = overlay(overlay(base, own), overrides)
    if isinstance(merged["methods"], dict):
        merged["methods"] = {name: _row(name, row) for name, row in merged["methods"].items()}
    return validate(Config, merged, str(path))


def _row(name: str, entry: Any) -> Any:
    """A method's entry; without ``file:`` the row is called like its file in ``baselines/``."""
    return {"file": name, **(entry or {})} if isinstance(entry, dict | None) else entry


def _shipped_folder(path: Path) -> Path:
    """The folder of the section files: beside ``path``, or ``config/`` of the checkout."""
    for folder in (path.parent, Path("config"), CHECKOUT / "config"):
        if (folder / "methods.yaml").exists():
            return folder
    raise UserError(f"No methods.yaml beside {path} or in config/; run from the repository's root.")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; missing or malformed files are the user's to mend."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of names to settings.")
    return content


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, key by key."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = overlay(result[key], value)
        else:
            result[key] = value
    return result
