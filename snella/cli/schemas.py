"""JSON schemas of the configuration files, for editors; made from the typed models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from snella.errors import UserError
from snella.files import write_json
from snella.report.spec import TableSpec
from snella.runs.protocol import Protocol
from snella.suite.config import BackboneEntry, Config, MethodEntry, MethodOverride, SuiteEntry
from snella.tasks import SHIPPED, find_task
from snella.tasks.base import DatasetSpec

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def write_schemas(folder: Path) -> list[Path]:
    """Write one schema per kind of file into ``folder``; return the paths."""
    paths = []
    for name, content in schemas().items():
        path = folder / f"{name}.schema.json"
        write_json(path, content)
        paths.append(path)
    return paths


def schemas() -> dict[str, dict[str, Any]]:
    """The schema of ``config.yaml``, of a file of one's own, and of each section's file."""
    protocol = _protocol()
    part = {"type": "object", "additionalProperties": {"type": "object"}}
    preset = {
        **protocol,
        "properties": {**protocol["properties"], "rows": part, "collections": part},
    }
    config = _schema(Config)
    sections = {
        "backbones": _named(BackboneEntry),
        "datasets": _named(DatasetSpec),
        "methods": _named(MethodEntry),
        "protocols": {"type": "object", "additionalProperties": preset},
        "released": _schema(dict[str, dict[str, MethodOverride]]),
        "suite": _schema(SuiteEntry),
        "tables": _named(TableSpec),
    }
    for name in ("protocols", "tables"):
        inner = dict(sections[name])
        config["$defs"] = {**config.get("$defs", {}), **inner.pop("$defs", {})}
        config["properties"][name] = inner
    titles = {"config": config, **sections}
    return {
        name: {"$schema": DRAFT, "title": f"snella: {name}", **_without(content, "title")}
        for name, content in titles.items()
    }


def _schema(kind: Any) -> dict[str, Any]:
    schema: dict[str, Any] = _optional(TypeAdapter(kind).json_schema())
    return schema


def _named(model: Any) -> dict[str, Any]:
    """A mapping of names to ``model``."""
    return _schema(dict[str, model])


def _protocol() -> dict[str, Any]:
    """The common fields and those of every shipped task family."""
    result = _schema(Protocol)
    for family in sorted(path.parent.name for path in SHIPPED.glob("[a-z]*/__init__.py")):
        try:
            settings = _schema(find_task(family).settings)
        except UserError:
            continue
        result["properties"] = {**settings["properties"], **result["properties"]}
        if "$defs" in settings:
            result["$defs"] = {**result.get("$defs", {}), **settings["$defs"]}
    return result


def _optional(schema: Any) -> Any:
    """The schema with no key required: any file may state a part and override the rest."""
    if isinstance(schema, dict):
        return {
            key: _optional(value)
            for key, value in schema.items()
            if not (key == "required" and isinstance(value, list))
        }
    return [_optional(item) for item in schema] if isinstance(schema, list) else schema


def _without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}
