"""Typed configuration: the first problem becomes one line that names the place and the remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from snella.errors import UserError, unknown

Model = TypeVar("Model", bound=BaseModel)
Path_ = tuple[int | str, ...]
LONGEST_NAME = 64
SHOWN = 80
"""Characters of a wrong value that a message repeats."""


class Strict(BaseModel):
    """A model in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Where(Protocol):
    """Knows in which file and line a key was set."""

    def where(self, path: Sequence[int | str]) -> str:
        """As "my.yaml, line 3", or empty where that is not known."""


def validate(
    cls: type[Model], data: Any, where: str, origins: Where | None = None, parts: bool = False
) -> Model:
    """Build ``cls`` from ``data``; raises :class:`~snella.errors.UserError` naming the place.

    With ``parts`` the fields need not agree with each other: if they do not, the defaults return.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        if parts and not error.errors()[0]["loc"]:
            return cls()
        raise _problem(cls, error, where, origins) from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply; flatten it.") from error


def check_name(name: str, dots: bool = True, hyphens: bool = True) -> str:
    """A name that becomes part of a path and of Snakemake's wildcards.

    Raises ``ValueError`` that says which characters it may have.
    """
    signs = "_" + "-" * hyphens + "." * dots
    pattern = rf"[A-Za-z0-9][A-Za-z0-9{re.escape(signs)}]*"
    if not re.fullmatch(pattern, name) or ".." in name:
        better = re.sub(rf"[^A-Za-z0-9{re.escape(signs)}]+", "_", name).strip("_.-")
        hint = f"; try {better[:LONGEST_NAME]!r}" if better else ""
        raise ValueError(
            f"a name has letters, digits and {' '.join(signs)} only, and starts with a letter or "
            f"digit{hint} (a `label:` may hold any text)"
        )
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name has at most {LONGEST_NAME} characters, this has {len(name)}")
    return name


def check_distinct(values: list[Any]) -> list[Any]:
    """Raise ``ValueError`` for a value that stands twice."""
    twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice!r} stands twice; name it once")
    return values


def hyperparameter_error(file: Path, error: ValidationError) -> UserError:
    """The line for a wrong hyper-parameter: file, field, reason."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "settings"
    message = first["msg"].removeprefix("Value error, ")
    return UserError(
        f"{file}: hyper-parameter {field}: {message} (got {shown(first['input'])}); correct it "
        "under `hyperparameters:` of the method's row."
    )


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 2]} …"


def _problem(
    cls: type[BaseModel], error: ValidationError, where: str, origins: Where | None
) -> UserError:
    """The most telling of the problems: an unknown key explains a missing one."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    loc: Path_ = first["loc"]
    origin = origins.where(loc) if origins is not None else ""
    prefix = f"{origin}: " if origin else ""
    place = ".".join(str(part) for part in loc if part != "[key]")
    if first["type"] == "extra_forbidden":
        owner = _model_at(cls, loc[:-1])
        return UserError(prefix + str(unknown(f"key in {where}:", place, _siblings(owner, place))))
    if first["type"] == "missing":
        return UserError(f"{prefix or where + ': '}{place} is missing; add it.")
    message = first["msg"].removeprefix("Value error, ")
    if loc and loc[-1] == "[key]" and first["type"] == "string_type":
        message = "a name must be text; put it in quotes"
    got = "" if isinstance(first["input"], dict) else f" (got {shown(first['input'])})"
    return UserError(f"{prefix or where + ': '}{place + ': ' if place else ''}{message}{got}.")


def _model_at(cls: type[BaseModel], loc: Path_) -> type[BaseModel]:
    """The model class that a location of a validation error points into."""
    named = False  # the next part is a name in a mapping and no field
    for part in loc:
        field = None if named else cls.model_fields.get(str(part))
        named = False
        if field is None:
            continue
        inner = field.annotation
        candidates = [a for a in (*_flat(inner), inner) if isinstance(a, type)]
        found = next((a for a in candidates if issubclass(a, BaseModel)), None)
        if found is not None:
            named = found is not inner
            cls = found
    return cls


def _flat(annotation: Any) -> list[Any]:
    return [leaf for arg in get_args(annotation) for leaf in (arg, *_flat(arg))]


def _siblings(cls: type[BaseModel], place: str) -> list[str]:
    prefix = place.rpartition(".")[0]
    return [f"{prefix}.{name}" if prefix else name for name in cls.model_fields]
