"""What a configuration may get wrong that is known before any job: checked when runs are planned.

Hyper-parameters are compared with the typed fields that a method's file declares. The file is
parsed and not imported, since that costs torch; what its text does not tell is left to the job.
"""

from __future__ import annotations

import ast
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from snella.errors import UserError, one_line, unknown
from snella.models.backbone_files import input_size
from snella.suite import packages
from snella.suite.config import Config, SuiteEntry
from snella.tasks import TaskInfo, find_task, task_names
from snella.validation import Strict, hyperparameter_error, not_one_class, shown

log = logging.getLogger("snella")
KNOWN: dict[str, Any] = {
    "int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": tuple,
    "dict": dict, "Any": Any, "Literal": Literal, "Annotated": Annotated, "Field": Field,
    **{
        name: getattr(pydantic, name)
        for name in ("PositiveInt", "PositiveFloat", "NonNegativeInt", "NonNegativeFloat")
    },
}  # fmt: skip
"""What an annotation may be made of to be understood here."""
EIGHT_BIT = {"adam8bit": "adam", "adamw8bit": "adamw"}
"""Optimizers of bitsandbytes, and the same with states in full precision."""


ARGUMENTS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "bool": (bool,),
    "Optional[int]": (int, type(None)), "Optional[float]": (int, float, type(None)),
    "str": (str,), "Optional[bool]": (bool, type(None)), "Tuple[int, ...]": (list,),
    "Union[int, Tuple[int, int]]": (int, list),
}  # fmt: skip
"""Annotations of timm's that are taken at their word, and the types that fit."""
LISTS = ("Tuple[int, ...]", "Union[int, Tuple[int, int]]")
"""Those of them that may hold several numbers."""
COUNTS = frozenset({
    "depth", "depths", "dims", "embed_dim", "num_heads", "patch_size", "image_size",
    "encoder_dim", "encoder_depth", "encoder_heads", "decoder_dim", "decoder_mlp_dim",
    "decoder_heads",
})  # fmt: skip
"""Arguments of timm's and of SAM that count something there has to be."""
WIDTHS = (
    ("embed_dim", "num_heads"), ("encoder_dim", "encoder_heads"), ("image_size", "patch_size"),
)  # fmt: skip
"""Arguments of which the first has to be a multiple of the second."""


PIPELINES = {"StableDiffusion3Pipeline": "sd3"}
"""Pipelines whose folder may be a backbone; their sizes stand in it."""


Layer = tuple[tuple[str, ...], Mapping[str, Any]]
"""Settings, and their path in the configuration."""


@dataclass(frozen=True)
class Layers:
    """Layers of settings, the last of which counts, with the path of each in the configuration."""

    config: Config
    stack: Sequence[Layer]

    def merged(self) -> dict[str, Any]:
        """All layers as one."""
        return {key: value for _, values in self.stack for key, value in values.items()}

    def where(self, path: Sequence[int | str]) -> str:
        """The file, line and full key that set a value."""
        if not path:
            return ""
        for prefix, values in reversed(self.stack):
            if path[0] in values:
                full = (*prefix, *map(str, path))
                place = self.config.where(full)
                return f"{place} ({'.'.join(full)})" if place else ".".join(full)
        return ""


def check_suite(config: Config, suite: SuiteEntry) -> None:
    """Names that a suite only mentions; raises :class:`~snella.errors.UserError`."""
    if config.first_time("task_suites"):
        _check_task_suites(config)
    path = ("suites", config.suite, "method_overrides")
    _all_known(config, path, "method", suite.method_overrides, config.methods)
    for table, spec in config.tables.items():
        for number, row in enumerate(spec.get("rows", [])):
            for method in row["methods"]:
                where = config.where(("tables", table, "rows", str(number)))
                if method not in config.methods and not _is_shipped(where):
                    error = unknown(f"method in table {table}:", method, config.methods)
                    raise _placed(where, error)


def _check_task_suites(config: Config) -> None:
    """The suites of other families, which count once a table or figure of theirs is asked for."""
    for task, name in config.task_suites.items():
        place = config.where(("task_suites", task))
        look_up("task", task, task_names(config.tasks), place)
        suite = look_up("suite", name, config.suites, place)
        found = {config.datasets[d].task for d in suite.datasets if d in config.datasets}
        if found - {task}:
            raise _placed(place, UserError(
                f"`task_suites.{task}` names suite {name!r}, which is of {', '.join(found)}; name "
                f"one of {task}."
            ))  # fmt: skip


def _is_shipped(where: str) -> bool:
    """Whether a shipped table file is meant; those name rows still to come."""
    return "tables/" in where


def check_dataset(config: Config, name: str) -> None:
    """A data set's task, kind and options; raises :class:`~snella.errors.UserError`."""
    spec = config.datasets[name]
    try:
        info = find_task(spec.task, config.tasks)
        info.check(name, spec)
    except UserError as error:
        raise _placed(config.where(("datasets", name, "options")), error) from error
    if spec.kind in info.made and (spec.path is not None or spec.num_classes is not None):
        key = "path" if spec.path is not None else "num_classes"
        raise _placed(config.where(("datasets", name, key)), UserError(
            f"Data set {name!r} is of kind {spec.kind}, which is made here, so `{key}` does "
            "nothing; for data of your own choose another name, or say of which `kind` they are."
        ))  # fmt: skip


def check_hyperparameters(file: str, layers: Layers) -> None:
    """Names and values of hyper-parameters against the fields that the method's file declares.

    Raises :class:`~snella.errors.UserError` that names file, line and field.
    """
    model = declared(file, Path(file).stat().st_mtime_ns)
    values = layers.merged()
    if model is None:
        return
    for name in values:
        if name not in model.model_fields:
            error = unknown(f"hyper-parameter of {file}", name, model.model_fields)
            raise _placed(layers.where([name]), error)
    try:
        model.model_validate(values)
    except ValidationError as error:
        place = layers.where(error.errors()[0]["loc"])
        raise _placed(place, hyperparameter_error(Path(file), error)) from error


def check_packages(config: Config, suite: SuiteEntry, info: TaskInfo, layers: Layers) -> None:
    """Names that belong to libraries: torch's optimizers, and timm's architectures.

    Raises :class:`~snella.errors.UserError` with the closest name.
    """
    optimizer, known = layers.merged().get("optimizer"), packages.optimizers()
    if optimizer is not None and known and optimizer not in {*known, *EIGHT_BIT}:
        raise _placed(layers.where(["optimizer"]), unknown("optimizer", optimizer, known))
    arch = config.backbones[suite.backbone].arch
    if "vit" in info.families and not packages.is_architecture(arch):
        place = config.where(("backbones", suite.backbone, "arch"))
        raise _placed(place, unknown("timm architecture", arch, packages.architectures()))
    if "vit" in info.families:
        _check_kwargs(config, suite.backbone, packages.arguments(arch) or {})
    if "sd3" in info.families:
        place = config.where(("backbones", suite.backbone, "arch"))
        look_up("pipeline of diffusers", arch, PIPELINES, place)
        for key in config.backbones[suite.backbone].kwargs:
            place = config.where(("backbones", suite.backbone, "kwargs", key))
            raise _placed(place, unknown(f"argument of a {arch}:", key, ()))
    if "sam" in info.families:
        sizes, place = packages.sam_sizes(), config.where(("backbones", suite.backbone, "arch"))
        _check_kwargs(config, suite.backbone, look_up("SAM architecture", arch, sizes, place))


def _check_kwargs(config: Config, name: str, known: Mapping[str, str]) -> None:
    """A backbone's keyword arguments: those that its architecture knows, plain values by type.

    ``known`` gives the annotation of each; nothing is checked where none is known.
    """
    backbone = config.backbones[name]
    for key, value in backbone.kwargs.items() if known else ():
        place = config.where(("backbones", name, "kwargs", key))
        if key not in known:
            kind = f"argument of {backbone.arch} in `kwargs` of backbone {name!r}:"
            raise _placed(place, unknown(kind, key, known))
        annotation = "" if key == "img_size" else known[key]  # which `check_image_size` knows
        if problem := _misfit(key, value, annotation):
            raise _placed(place, UserError(
                f"`backbones.{name}.kwargs.{key}` is {shown(value)}, {backbone.arch} takes "
                f"{problem}; correct it."
            ))  # fmt: skip
    sizes = {**packages.defaults(backbone.arch), **backbone.kwargs}
    for width, heads in WIDTHS:
        if {width, heads} & backbone.kwargs.keys() and _remainder(sizes, width, heads):
            raise _placed(config.where(("backbones", name, "kwargs")), UserError(
                f"Backbone {name!r}: {width} {sizes[width]} is no multiple of {heads} "
                f"{sizes[heads]}; correct its `kwargs`."
            ))  # fmt: skip


def _misfit(name: str, value: Any, annotation: str) -> str:
    """What a model takes in the place of a value that it cannot be built with; empty if it can."""
    if annotation.startswith("Literal["):
        choices = ast.literal_eval(annotation.removeprefix("Literal"))
        return "" if value in choices else f"one of {', '.join(map(repr, choices))}"
    if annotation in ARGUMENTS and type(value) not in ARGUMENTS[annotation]:
        return annotation
    numbers = [n for n in _listed(value) if isinstance(n, int | float) and not isinstance(n, bool)]
    if not all(math.isfinite(n) and n >= 0 for n in numbers):
        return "finite numbers from 0"
    if name in COUNTS and 0 in numbers:
        return "whole numbers from 1"
    if annotation in LISTS and len(numbers) != len(_listed(value)):
        return annotation
    return "a number below 1" if name.endswith("_rate") and max(numbers, default=0) >= 1 else ""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _remainder(sizes: Mapping[str, Any], width: str, heads: str) -> bool:
    a, b = sizes.get(width), sizes.get(heads)
    return isinstance(a, int) and isinstance(b, int) and a % b != 0


def check_image_size(
    config: Config, suite: SuiteEntry, settings: Mapping[str, Any], layers: Layers
) -> None:
    """A backbone built for images of one size, by its arguments or its name, cannot get others.

    Raises :class:`~snella.errors.UserError` that names both settings.
    """
    backbone = config.backbones[suite.backbone]
    given = settings.get("image_size")
    if backbone.kwargs.get("strict_img_size") is False or not isinstance(given, int):
        return
    try:
        built = input_size({"arch": backbone.arch, "kwargs": backbone.kwargs})
    except UserError as error:
        raise _placed(config.where(("backbones", suite.backbone, "kwargs")), error) from error
    if built not in (None, given):
        raise _placed(
            layers.where(["image_size"]) or layers.where([]),
            UserError(
                f"backbone {suite.backbone!r} ({backbone.arch}) takes images of {built} pixels, "
                f"image_size is {given}; set it to {built}, or `backbones.{suite.backbone}.kwargs: "
                f"{{img_size: {given}}}`, which interpolates its position embedding."
            ),
        )


def note_inherited(config: Config, datasets: Iterable[str]) -> None:
    """Say in one line which data sets have a folder of the user's and classes of the shipped name.

    Right for a copy of the published data; a mistake where a name is used for other data.
    """

    def place(name: str, key: str) -> str:
        return config.where(("datasets", name, key)).partition(", line")[0]

    own = [
        f"{name} ({spec.num_classes})"
        for name in datasets
        if (spec := config.datasets[name]).num_classes is not None
        if place(name, "path") != place(name, "num_classes")
    ]
    if own:
        log.warning(
            "Shipped data sets with a folder of your own keep their number of classes: %s. For "
            "other data choose another name, or set num_classes.", ", ".join(own),
        )  # fmt: skip


def _all_known(
    config: Config, path: tuple[str, ...], kind: str, names: Iterable[str], known: Iterable[str]
) -> None:
    choices = list(known)
    for name in names:
        if name not in choices:
            where = config.where((*path, name))
            raise _placed(where, unknown(f"{kind} in {'.'.join(path)}:", name, choices))


def look_up(kind: str, name: str, known: dict[str, Any], where: str = "") -> Any:
    """What ``known`` calls ``name``; raises :class:`~snella.errors.UserError` with the closest."""
    if name not in known:
        error = unknown(kind, name, known)
        raise UserError(f"{where}: {error}") if where else error
    return known[name]


def _placed(where: str, error: UserError) -> UserError:
    return UserError(f"{where}: {error}") if where else error


class _Declared(Strict):
    """The fields of a method, some of which may begin with ``model_``."""

    model_config = ConfigDict(protected_namespaces=())


@cache
def declared(file: str, changed: int) -> type[BaseModel] | None:
    """The typed fields of a method file's one class, or None where its text does not tell."""
    try:
        tree = ast.parse(Path(file).read_bytes(), Path(file).name)
    except SyntaxError as error:
        raise UserError(
            f"Method file {file} does not import: {one_line(error)}; correct the file."
        ) from error
    except (OSError, ValueError, RecursionError):
        return None  # the job says what is wrong
    lacking = packages.lacking(tree, Path(file).parent)
    for package in lacking:
        log.warning("Method file %s imports %s, which is not installed here.", file, package)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    own = [node for node in classes.values() if node.name[0] != "_" and _family(node, classes)]
    classless = not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
    if classless and lacking:
        raise UserError(
            f"Method file {file} does not import: there is no package {lacking[0]!r}; correct the "
            "file, or install it."
        )
    if len(own) > 1 or classless:
        raise not_one_class(file, [node.name for node in own])
    if not own:
        return None
    fields: dict[str, Any] = {}
    for node in reversed(_family(own[0], classes) or []):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                name = item.target.id
                if "ClassVar" not in ast.unparse(item.annotation) and name[0] != "_":
                    fields[name] = _field(item)
    try:
        with warnings.catch_warnings(action="ignore"):  # of fields called like pydantic's own
            return create_model(own[0].name, __base__=_Declared, **fields)
    except (TypeError, ValueError, NameError, pydantic.errors.PydanticUserError):
        return None


def _family(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[ast.ClassDef] | None:
    """The class and those of the file it inherits from, if they end in ``Method`` alone."""
    line = [node]
    for base in node.bases:
        name = ast.unparse(base).rpartition(".")[2]
        if name == "Method":
            continue
        above = _family(classes[name], classes) if name in classes and name != node.name else None
        if above is None:
            return None
        line += above
    return line if node.bases else None


def _field(item: ast.AnnAssign) -> tuple[Any, Any]:
    """The type and default of a field, as far as its text tells."""
    kind = _evaluate(item.annotation)
    if item.value is None:
        return Any if kind is None else kind, ...
    return (Any, None) if kind is None else (kind, _evaluate(item.value))


def _evaluate(node: ast.expr) -> Any:
    """The value of an expression of known names and ``Field`` calls; None for any other."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id not in KNOWN:
            return None
        if isinstance(part, ast.Call) and ast.unparse(part.func) != "Field":
            return None
        if isinstance(part, ast.Attribute | ast.Lambda | ast.NamedExpr | ast.comprehension):
            return None
        if isinstance(part, ast.BinOp) and not isinstance(part.op, ast.BitOr):
            return None
    try:
        return eval(compile(ast.Expression(node), "field", "eval"), {"__builtins__": {}, **KNOWN})
    except Exception:
        return None
