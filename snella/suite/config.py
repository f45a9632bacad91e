"""What to run, as typed data: suites, backbones, data sets, methods, protocols.

``config/`` holds one YAML file per section and one file per suite; ``config/config.yaml``
(or any file given instead) chooses the suite and may add to or override every section, so
that a lab needs a single file of its own. An unknown key is an error that names the file,
the key and the closest match.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from snella.errors import UserError, unknown

SECTIONS = ("backbones", "datasets", "methods", "protocols", "suites")
Name = str
DEFAULT = Path("config/config.yaml")
CHECKOUT = Path(__file__).resolve().parents[2]
"""The repository this package runs from: what it ships serves calls from other directories."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BackboneEntry(_Strict):
    """A pre-trained model: timm architecture and keyword arguments, and the weights' file."""

    arch: str
    kwargs: dict[str, Any] = {}
    file: str | None = None
    title: str = ""
    demo: bool = False


class DatasetEntry(_Strict):
    """A data set: a rendered or packaged quick set, or a folder in the VTAB-1k layout."""

    kind: Literal["quick", "folder"] = "folder"
    path: str | None = None
    num_classes: int | None = Field(None, gt=0)
    label: str = ""
    task: Literal["classification"] = "classification"


class MethodEntry(_Strict):
    """A row: a method file (a stem in ``baselines/`` or a path), its settings and its label."""

    file: str = Field(description="default: the row's name")
    label: str = ""
    hyperparameters: dict[str, Any] = {}
    protocol: dict[str, Any] = {}


class SuiteEntry(_Strict):
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
    method_overrides: dict[Name, dict[str, Any]] = {}

    @property
    def datasets(self) -> list[str]:
        """All data sets of the suite, by group."""
        return [name for group in self.groups.values() for name in group]


class Config(_Strict):
    """The merged configuration."""

    suite: Name
    results: str = "results"
    data: str = "data"
    baselines: str = "baselines"
    allow_missing: bool = False
    warm_workers: bool = True
    backbones: dict[Name, BackboneEntry]
    datasets: dict[Name, DatasetEntry]
    methods: dict[Name, MethodEntry]
    protocols: dict[Name, dict[str, Any]]
    suites: dict[Name, SuiteEntry]
    tables: dict[Name, dict[str, Any]]
    released: dict[Name, dict[Name, dict[str, Any]]] = {}


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
    merged = _overlay(_overlay(base, own), overrides)
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


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _overlay(result[key], value)
        else:
            result[key] = value
    return result


Model = TypeVar("Model", bound=BaseModel)


def validate(cls: type[Model], data: dict[str, Any], where: str) -> Model:
    """Build ``cls`` from ``data``; the first problem becomes one line naming place and remedy."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            owner = _model_at(cls, first["loc"][:-1])
            raise unknown(f"key in {where}:", place, _siblings(owner, place)) from error
        if first["type"] == "missing":
            raise UserError(f"{where}: {place} is missing.") from error
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        raise UserError(f"{where}: {place + ': ' if place else ''}{message}{got}.") from error


def _model_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The model class that a location of a validation error points into."""
    for part in loc:
        field = cls.model_fields.get(str(part))
        inner = field.annotation if field else None
        args = [a for a in getattr(inner, "__args__", ()) if isinstance(a, type)]
        candidates = [a for a in (*args, inner) if isinstance(a, type)]
        cls = next((a for a in candidates if issubclass(a, BaseModel)), cls)
    return cls


def _siblings(cls: type[BaseModel], place: str) -> list[str]:
    prefix = place.rpartition(".")[0]
    return [f"{prefix}.{name}" if prefix else name for name in cls.model_fields]
