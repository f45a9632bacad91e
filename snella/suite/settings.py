"""The settings of one run: layers of the configuration, one over another, typed and checked.

Protocol preset < row < suite < released or searched settings < the suite's word on the row < trial.
A preset says under ``collections:`` what it does on the data sets of one publication (the first
part of ``official``: fgvc, full_image). One that reproduces others' scripts says under ``rows:``
what these do for a row (``*``: any other), in the place of the row's own settings, which were found
for another protocol.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from snella.errors import UserError, unknown
from snella.runs.protocol import Protocol
from snella.suite import search
from snella.suite.checks import (
    EIGHT_BIT,
    Layer,
    Layers,
    check_hyperparameters,
    check_image_size,
    check_packages,
    look_up,
)
from snella.suite.config import Config, MethodOverride, Searched, SuiteEntry
from snella.tasks import TaskInfo, find_task
from snella.validation import validate

log = logging.getLogger("snella")
COLLECTIONS = dict.fromkeys(("vtab1k", "fgvc", "full_image"))
"""Publications of data sets for which a preset may say something else."""

NOTHING, UNSEARCHED = MethodOverride(), Searched()
Typed = tuple[Protocol, dict[str, Any], dict[str, Any]]
"""The protocol, the task's settings and the hyper-parameters of a run."""


def settings_of(
    config: Config, suite: SuiteEntry, method: str, dataset: str, file: str
) -> tuple[Typed, tuple[str, ...]]:
    """All settings of a row on a data set, and what a reader of its number should know."""
    info = find_task(config.datasets[dataset].task, config.tasks)
    official = config.datasets[dataset].options.get("official")
    collection = str(official or "").partition("/")[0]
    layers_key = ("layers", config.suite, method, collection)
    found_layers = config.once(layers_key, lambda: _configured(config, suite, method, collection))
    protocol, hyperparameters = map(list, found_layers)
    at, found, notes = _found(config, method, dataset, Layers(config, protocol))
    # The suite's own word on a row, which comes last, holds against what was found for it.
    protocol.insert(-1, ((*at, "protocol"), found.protocol))
    hyperparameters.insert(-1, ((*at, "hyperparameters"), found.hyperparameters))
    trial = config.trial
    if trial is not None:
        selection = Layers(config, protocol).merged().get("selection", "last")
        place, point = _point(config, trial, method, info)
        protocol += [(place, point.protocol), (place, trial.protocol(selection))]
        hyperparameters.append((place, point.hyperparameters))
        notes = (f"trial {trial.number} of a search: scored on validation examples",)
    layers = Layers(config, protocol), Layers(config, hyperparameters)
    # Most data sets share a row's settings, which are checked once.
    key = (
        "settings",
        config.suite,
        trial and trial.number,
        method,
        file,
        info.name,
        at,
        collection,
    )
    common, settings, chosen = config.once(
        key, lambda: _typed(config, suite, method, file, info, *layers)
    )
    common, lacking = _installed(config, common)
    return (common, settings, chosen), (*notes, *lacking)


def _configured(
    config: Config, suite: SuiteEntry, method: str, collection: str
) -> tuple[list[Layer], list[Layer]]:
    """The layers of the protocol and of the hyper-parameters that any row has."""
    row = config.methods[method]
    special = suite.method_overrides.get(method, NOTHING)
    at_row, at_suite = ("methods", method), ("suites", config.suite)
    at_special = (*at_suite, "method_overrides", method)
    at_preset = ("protocols", suite.protocol)
    preset = dict(config.protocols[suite.protocol])
    rows = _part(config, at_preset, "rows", preset, {"*": None, **config.methods})
    there = _part(config, at_preset, "collections", preset, COLLECTIONS)
    name = method if method in rows else "*"
    return [
        (at_preset, preset),
        ((*at_preset, "collections", collection), there.get(collection, {})),
        ((*at_preset, "rows", name), rows[name])
        if name in rows
        else ((*at_row, "protocol"), row.protocol),
        ((*at_suite, "overrides"), suite.overrides),
        ((*at_special, "protocol"), special.protocol),
    ], [
        ((*at_row, "hyperparameters"), row.hyperparameters),
        ((*at_special, "hyperparameters"), special.hyperparameters),
    ]


def _part(
    config: Config, at: tuple[str, ...], part: str, preset: dict[str, Any], known: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What a preset says under ``part`` about those of the ``known``; taken out of it."""
    found = preset.pop(part, {})
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        place = config.where((*at, part)) or ".".join((*at, part))
        raise UserError(f"{place}: `{part}` of a protocol maps names to settings of it.")
    for name in found:
        kind = f"name under `{part}` of protocol {at[-1]}:"
        look_up(kind, name, known, config.where((*at, part, name)))
    return found


def _typed(
    config: Config,
    suite: SuiteEntry,
    method: str,
    file: str,
    info: TaskInfo,
    protocol: Layers,
    hyperparameters: Layers,
) -> Typed:
    where = f"protocol {suite.protocol!r} of suite {config.suite!r} for {method}"
    if config.first_time("layers", config.suite, info.name, method):
        for layer in protocol.stack[:-1]:  # a later one may hide its nonsense
            _validated(info, Layers(config, [layer]), where, alone=True)
    common, settings = _validated(info, protocol, where)
    if settings.get("normalisation") == "backbone":
        settings["normalisation"] = _own_normalisation(config, suite, protocol)
    check_packages(config, suite, info, protocol)
    check_image_size(config, suite, settings, protocol)
    check_hyperparameters(file, hyperparameters)
    return common, settings, hyperparameters.merged()


def _own_normalisation(config: Config, suite: SuiteEntry, protocol: Layers) -> str:
    """How the backbone's pixels were normalised in pre-training, which its entry must say."""
    found = config.backbones[suite.backbone].normalisation
    if found is None:
        raise UserError(
            f"{protocol.where(['normalisation'])}: backbone {suite.backbone} does not say how its "
            "pixels were normalised; add `normalisation:` to it, or name one in the protocol."
        )
    return found


def _installed(config: Config, protocol: Protocol) -> tuple[Protocol, tuple[str, ...]]:
    """The protocol with an optimizer that is installed, and what a reader should know of it."""
    full = EIGHT_BIT.get(protocol.optimizer)
    if full is None or find_spec("bitsandbytes") is not None:
        return protocol, ()
    note = f"bitsandbytes is not installed: {full} in place of {protocol.optimizer}"
    if config.first_time("optimizer", full):
        log.warning("%s.", note)
    return protocol.model_copy(update={"optimizer": full}), (note,)


def _found(
    config: Config, method: str, dataset: str, layers: Layers
) -> tuple[tuple[str, ...], MethodOverride, tuple[str, ...]]:
    """Where settings of the authors or of a search stand, these, and what a reader should know."""
    kind, _, name = str(layers.merged().get("hyperparameters", "fixed")).partition("/")
    if kind == "released":
        released = config.released.get(method, {}).get(dataset)
        notes = (f"no released settings for {method} on {dataset}: the fixed ones were used",)
        return ("released", method, dataset), released or NOTHING, () if released else notes
    if kind != "search":
        return (), NOTHING, ()
    if name:
        look_up("search", name, config.searched, layers.where(["hyperparameters"]))
    name = name or config.suite
    edge = config.searched.get(name, UNSEARCHED).edge.get(method, {})
    key, found = _searched(config, name, method, dataset)
    note = ""
    if found is None:
        note = f"no settings in search/{name}: the fixed ones were used"
    elif edge.get(key):
        note = "the best value of a searched setting is the lowest or highest that was tried"
    found = found or NOTHING
    used = f"search/{name}" if name in config.searched else "fixed"
    source = {**found.protocol, "hyperparameters": used}
    at = ("searched", name, "rows", method, key)
    return at, found.model_copy(update={"protocol": source}), (note,) * bool(note)


def searched_settings(config: Config, method: str, dataset: str, source: str) -> MethodOverride:
    """What an earlier search, ``search/NAME``, found; nothing for any other source of settings."""
    kind, _, name = source.partition("/")
    if kind != "search":
        return NOTHING
    return _searched(config, name, method, dataset)[1] or NOTHING


def _searched(
    config: Config, name: str, method: str, dataset: str
) -> tuple[str, MethodOverride | None]:
    """Settings that a search found for a data set, or for all, and the name they stand under."""
    rows = config.searched.get(name, UNSEARCHED).rows.get(method, {})
    key = dataset if dataset in rows else search.EVERY
    return key, rows.get(key)


def _point(
    config: Config, trial: search.Trial, method: str, info: TaskInfo
) -> tuple[tuple[str, ...], MethodOverride]:
    """The settings of a trial: fields of the protocol and, of a row's own grid, the method's."""
    own = method in trial.search.rows
    at = ("suites", config.suite, "search", *(("rows", method) if own else ("grid",)))
    known = [*Protocol.model_fields, *info.settings.model_fields]
    point = trial.point(method)
    protocol = {name: value for name, value in point.items() if name in known}
    rest = {name: value for name, value in point.items() if name not in known}
    for name in () if own else rest:
        error = unknown("setting in the grid of a search:", name, known)
        raise UserError(f"{config.where((*at, name)) or '.'.join(at)}: {error}")
    return at, MethodOverride(protocol=protocol, hyperparameters=rest)


def _validated(
    info: TaskInfo, layers: Layers, where: str, alone: bool = False
) -> tuple[Protocol, dict[str, Any]]:
    """The common fields and the task's, both typed; an unknown key is an error.

    Of a layer ``alone`` only single fields are checked, not whether they agree.
    """
    values = layers.merged()
    common = {k: v for k, v in values.items() if k in Protocol.model_fields}
    own = {k: v for k, v in values.items() if k not in Protocol.model_fields}
    for name in own:
        if name not in info.settings.model_fields:
            known = [*Protocol.model_fields, *info.settings.model_fields]
            error = unknown(f"key in {where}:", name, known)
            raise UserError(f"{layers.where([name])}: {error}")
    settings = validate(info.settings, own, where, layers, parts=alone)
    return validate(Protocol, common, where, layers, parts=alone), settings.model_dump(mode="json")
