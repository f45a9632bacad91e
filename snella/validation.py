"""Typed configuration: the first problem becomes one line that names the place and the remedy."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from snella.errors import UserError, unknown

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A model in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def validate(cls: type[Model], data: Any, where: str) -> Model:
    """Build ``cls`` from ``data``; raises :class:`~snella.errors.UserError` naming the place."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise _problem(cls, error, where) from error


def _problem(cls: type[BaseModel], error: ValidationError, where: str) -> UserError:
    """The most telling of the problems: an unknown key explains a missing one."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        owner = _model_at(cls, first["loc"][:-1])
        return unknown(f"key in {where}:", place, _siblings(owner, place))
    if first["type"] == "missing":
        return UserError(f"{where}: {place} is missing.")
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return UserError(f"{where}: {place + ': ' if place else ''}{message}{got}.")


def _model_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The model class that a location of a validation error points into."""
    for part in loc:
        field = cls.model_fields.get(str(part))
        inner = field.annotation if field else None
        candidates = [a for a in (*_flat(inner), inner) if isinstance(a, type)]
        cls = next((a for a in candidates if issubclass(a, BaseModel)), cls)
    return cls


def _flat(annotation: Any) -> list[Any]:
    return [leaf for arg in get_args(annotation) for leaf in (arg, *_flat(arg))]


def _siblings(cls: type[BaseModel], place: str) -> list[str]:
    prefix = place.rpartition(".")[0]
    return [f"{prefix}.{name}" if prefix else name for name in cls.model_fields]
