"""Typed configuration: the first problem becomes one line that names the place and the remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from snella.errors import UserError, unknown

Model = TypeVar("Model", bound=BaseModel)
Path_ = tuple[int | str, ...]
LONGEST_NAME = 64
SHOWN = 80
"""Characters of a wrong value that a message repeats."""
PLAIN = {
    "dict_type": "must be a mapping, `name: value`",
    "model_type": "must be a mapping, `name: value`",
    "list_type": "must be a list, `[one, two]`",
    "string_type": "must be text; put it in quotes",
    "invalid_key": "a name must be text; put it in quotes",
    "bool_parsing": "must be true or false",
}
"""pydantic's words that assume Python, in YAML's."""


class Strict(BaseModel):
    """A model in which an unknown key is an error, and so is a truth value for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1, and YAML reads yes and on as true."""
        if isinstance(value, bool) and info.field_name in _numbers(cls):
            raise ValueError("must be a number")
        return value


@cache
def _numbers(cls: type[BaseModel]) -> frozenset[str]:
    """The fields of ``cls`` that take a number and no truth value."""
    kinds = {name: {f.annotation, *_flat(f.annotation)} for name, f in cls.model_fields.items()}
    return frozenset(n for n, k in kinds.items() if k & {int, float} and not k & {bool, Any})


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
    seen = set()
    for value in values:
        key = value if isinstance(value, bool | int | float | str) else repr(value)
        if key in seen:
            raise ValueError(f"{value!r} stands twice; name it once")
        seen.add(key)
    return values


def hyperparameter_error(file: Path, error: ValidationError) -> UserError:
    """The line for a wrong hyper-parameter: file, field, reason."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "settings"
    if first["type"] == "missing":
        return UserError(
            f"{file}: hyper-parameter {field} is missing; set it under `hyperparameters:` of the "
            "method's row."
        )
    message = message_of(first)
    return UserError(
        f"{file}: hyper-parameter {field}: {message} (got {shown(first['input'])}); correct it "
        "under `hyperparameters:` of the method's row."
    )


def not_one_class(file: str | Path, names: Sequence[str]) -> UserError:
    """The line for a method file with no or several classes of methods, ``names``."""
    found, remedy = "none", "`snella new-baseline NAME` writes a file to begin with"
    if names:
        found = ", ".join(names)
        remedy = "start the names of helper classes with an underscore"
    return UserError(
        f"Method file {file} must define exactly one Method class, found {found}; {remedy}."
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
    message = message_of(first)
    origin = _origin(cls, loc, message, origins) if origins is not None else ""
    prefix = f"{origin}: " if origin else ""
    place = ".".join(str(part) for part in loc if part != "[key]")
    if first["type"] == "extra_forbidden":
        owner = _model_at(cls, loc[:-1])
        known = [".".join((*map(str, loc[:-1]), name)) for name in owner.model_fields]
        return UserError(prefix + str(unknown(f"key in {where}:", place, known)))
    if first["type"] == "missing":
        return UserError(f"{prefix or where + ': '}{place} is missing; add it.")
    if loc and loc[-1] == "[key]" and first["type"] == "string_type":
        message = "a name must be text; put it in quotes"
    value = first["input"]
    got = " (it is empty)" if value is None else f" (got {shown(value)})"
    if isinstance(value, dict) and first["type"] not in PLAIN:
        got = ""
    return UserError(f"{prefix or where + ': '}{place + ': ' if place else ''}{message}{got}.")


def message_of(error: Any) -> str:
    """What is wrong, in the words of a configuration."""
    return PLAIN.get(error["type"], str(error["msg"]).removeprefix("Value error, "))


def _origin(cls: type[BaseModel], loc: Path_, message: str, origins: Where) -> str:
    """Where the wrong value was set; of fields that contradict each other, where each was."""
    if loc:
        return origins.where(loc)
    named = (word for word in re.findall(r"\w+", message) if word in cls.model_fields)
    return " and ".join(dict.fromkeys(filter(None, (origins.where([word]) for word in named))))


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
