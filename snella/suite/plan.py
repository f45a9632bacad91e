"""From a configuration to its list of runs: the only place where the grid is expanded.

A run is (suite, backbone, data set, method, protocol, seed), with everything that moves its number
resolved: :class:`~snella.runs.run.Run`.
"""

from __future__ import annotations

import logging
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from snella.errors import UserError, unknown
from snella.runs.protocol import Protocol
from snella.runs.run import Dataset, MethodChoice, Run
from snella.suite.checks import (
    Layers,
    check_hyperparameters,
    check_image_size,
    check_suite,
)
from snella.suite.config import (
    CHECKOUT,
    LARGEST_SEED,
    Config,
    MethodOverride,
    SuiteEntry,
    locate,
)
from snella.tasks import TaskInfo, find_task
from snella.tasks.base import Backbone
from snella.validation import validate

log = logging.getLogger("snella")
EIGHT_BIT = {"adam8bit": "adam", "adamw8bit": "adamw"}
"""Optimizers of bitsandbytes, and the same with states in full precision."""


def plan(
    config: Config,
    *,
    methods: list[str] | None = None,
    datasets: list[str] | None = None,
    seeds: list[int] | None = None,
) -> list[Run]:
    """Expand the configured suite to runs, in the order methods x data sets x seeds."""
    suite = current_suite(config)
    return [
        resolve(config, method, dataset, seed)
        for method in methods or suite_methods(config)
        for dataset in datasets or suite.datasets
        for seed in (suite.seeds if seeds is None else seeds)
    ]


def current_suite(config: Config) -> SuiteEntry:
    """The configured suite; unknown names of its parts are reported here, before anything runs."""
    where = config.where(["suite"])
    suite: SuiteEntry = _look_up("suite", config.suite, config.suites, where)
    if not config.first_time("suite", config.suite):
        return suite
    at = ("suites", config.suite)
    _look_up("backbone", suite.backbone, config.backbones, config.where((*at, "backbone")))
    _look_up("protocol", suite.protocol, config.protocols, config.where((*at, "protocol")))
    for group, members in suite.groups.items():
        for dataset in members:
            place = config.where((*at, "groups", group, dataset))
            _look_up("data set", dataset, config.datasets, place)
    for method in suite_methods(config):
        _look_up("method", method, config.methods, config.where((*at, "methods")))
    check_suite(config, suite)
    return suite


def suite_methods(config: Config) -> list[str]:
    """The suite's rows; every configured method where the suite names none."""
    suite = _look_up("suite", config.suite, config.suites)
    return list(config.methods) if suite.methods is None else suite.methods


def resolve(config: Config, method: str, dataset: str, seed: int) -> Run:
    """All settings of one run: protocol preset < row < suite < the suite's word on the row."""
    suite = current_suite(config)
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"Seed {seed} is not in 0 to {LARGEST_SEED}.")
    row = _look_up("method", method, config.methods)
    data = _look_up("data set", dataset, config.datasets)
    entry = config.backbones[suite.backbone]
    file = method_path(config, row.file)
    protocol, settings, hyperparameters, notes = _layers(config, suite, method, dataset, file)
    return Run(
        suite=config.suite,
        backbone=Backbone(
            name=suite.backbone,
            arch=entry.arch,
            kwargs=entry.kwargs,
            file=entry.file and locate(entry.file),
            load=entry.load,
        ),
        dataset=Dataset(
            name=dataset, task=data.task, prepared=prepared_folder(config, dataset).as_posix()
        ),
        method=MethodChoice(name=method, file=file, hyperparameters=hyperparameters),
        protocol_name=suite.protocol,
        protocol=protocol,
        settings=settings,
        base_seed=suite.base_seed,
        seed=seed,
        results=config.results,
        tasks=config.tasks,
        notes=notes,
    )


def _layers(
    config: Config, suite: SuiteEntry, method: str, dataset: str, file: str
) -> tuple[Protocol, dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """The protocol, the task's settings, the hyper-parameters, and what a reader should know."""
    row = config.methods[method]
    special = suite.method_overrides.get(method, MethodOverride())
    at_suite, preset = ("suites", config.suite), suite.protocol
    protocol = [
        (("protocols", preset), config.protocols[preset]),
        (("methods", method, "protocol"), row.protocol),
        ((*at_suite, "overrides"), suite.overrides),
        ((*at_suite, "method_overrides", method, "protocol"), special.protocol),
    ]
    hyperparameters = [
        (("methods", method, "hyperparameters"), row.hyperparameters),
        ((*at_suite, "method_overrides", method, "hyperparameters"), special.hyperparameters),
    ]
    notes: tuple[str, ...] = ()
    if Layers(config, protocol).merged().get("hyperparameters") == "released":
        released = config.released.get(method, {}).get(dataset)
        if released is None:
            notes = (f"no released settings for {method} on {dataset}: the fixed ones were used",)
        else:
            at = ("released", method, dataset)
            protocol.append(((*at, "protocol"), released.protocol))
            hyperparameters.append(((*at, "hyperparameters"), released.hyperparameters))
    where = f"protocol {preset!r} of suite {config.suite!r} for {method}"
    info = find_task(config.datasets[dataset].task, config.tasks)
    if config.first_time("layers", config.suite, info.name, method):
        for layer in protocol[:-1]:  # a later one may hide its nonsense
            _validated(info, Layers(config, [layer]), where, alone=True)
    common, settings = _validated(info, Layers(config, protocol), where)
    common, lacking = _installed(config, common)
    check_image_size(config, suite, settings, Layers(config, protocol))
    chosen = Layers(config, hyperparameters)
    check_hyperparameters(file, chosen)
    return common, settings, chosen.merged(), (*notes, *lacking)


def _installed(config: Config, protocol: Protocol) -> tuple[Protocol, tuple[str, ...]]:
    """The protocol with an optimizer that is installed, and what a reader should know of it."""
    full = EIGHT_BIT.get(protocol.optimizer)
    if full is None or find_spec("bitsandbytes") is not None:
        return protocol, ()
    note = f"bitsandbytes is not installed: {full} in place of {protocol.optimizer}"
    if config.first_time("optimizer", full):
        log.warning("%s.", note)
    return protocol.model_copy(update={"optimizer": full}), (note,)


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


def prepared_folder(config: Config, dataset: str) -> Path:
    """Where the prepared arrays and the manifest of a data set lie."""
    return Path(config.data) / "prepared" / dataset


def method_files(config: Config) -> dict[str, Path]:
    """All method files by stem: the working directory's ``baselines/``, then the checkout's.

    Names with a leading underscore are helpers.
    """
    folders = (CHECKOUT / config.baselines, Path(config.baselines))
    return {p.stem: p for folder in folders for p in sorted(folder.glob("[!_]*.py"))}


def method_path(config: Config, file: str) -> str:
    """A method file's path: a stem in ``baselines/``, or a path to any Python file.

    Raises :class:`~snella.errors.UserError` if there is no such file.
    """
    if file.endswith(".py"):
        path = locate(Path(file).expanduser().as_posix())
        if not Path(path).is_file():
            raise UserError(f"Method file {file} does not exist; correct `file:` of the method.")
        return path
    for folder in (Path(config.baselines), CHECKOUT / config.baselines):
        found = folder / f"{file}.py"
        if file[:1] != "_" and found.is_file():
            return found.as_posix()
    raise unknown(f"method file in {config.baselines}/", file, method_files(config))


def find_method(config: Config, name: str) -> tuple[Path, dict[str, Any]]:
    """What a person means by a method: a row, a file in ``baselines/``, or a path.

    Returns the file and the row's hyper-parameters.
    """
    row = config.methods.get(name)
    if row is not None:
        return Path(method_path(config, row.file)), row.hyperparameters
    if name.endswith(".py"):
        return Path(method_path(config, name)), {}
    files = method_files(config)
    return _look_up("method", name, {**dict.fromkeys(config.methods), **files}), {}


def _look_up(kind: str, name: str, known: dict[str, Any], where: str = "") -> Any:
    if name not in known:
        error = unknown(kind, name, known)
        raise UserError(f"{where}: {error}") if where else error
    return known[name]


def table_methods(config: Config, table: str) -> list[tuple[str | None, list[str]]]:
    """A table's row groups, reduced to the suite's methods.

    Methods that no table lists, such as one a user just added, form a last group of every
    table, so that naming a method in the configuration is enough to get its row.
    """
    config = for_table(config, table)
    spec = config.tables[table]
    enabled = suite_methods(config)
    listed = {
        name
        for other in config.tables.values()
        for group in other.get("rows", [])
        for name in group["methods"]
    }
    groups = [
        (group.get("group"), [name for name in group["methods"] if name in enabled])
        for group in spec.get("rows", [])
    ]
    added = [name for name in enabled if name not in listed]
    return [(title, names) for title, names in [*groups, (None, added)] if names]


def table_runs(config: Config, table: str) -> list[Run]:
    """All runs whose records a table shows."""
    config = for_table(config, table)
    methods = [name for _, names in table_methods(config, table) for name in names]
    return plan(config, methods=methods)


def with_suite(config: Config, suite: str) -> Config:
    """The configuration with another suite chosen."""
    _look_up("suite", suite, config.suites)
    return config.model_copy(update={"suite": suite})


def for_table(config: Config, table: str) -> Config:
    """The configuration with the suite that a table shows, as :func:`for_task` finds it."""
    spec = _look_up("table", table, config.tables)
    return for_task(config, spec.get("task", "classification"), f"Table {table!r}")


def for_task(config: Config, task: str, what: str) -> Config:
    """The configuration with a suite of the family ``task``, for ``what`` is shown.

    That is the configured one where it is of that family, and otherwise the one that
    ``task_suites`` names for it.
    """
    if suite_task(config) == task:
        return config
    if task not in config.task_suites:
        raise UserError(
            f"{what} shows {task}, suite {config.suite!r} does not; "
            f"name a suite for it under `task_suites: {{{task}: ...}}`."
        )
    return with_suite(config, config.task_suites[task])


def figure_config(config: Config, figure: str) -> Config:
    """The configuration with the suite that a figure shows, as :func:`for_task` finds it."""
    spec = _look_up("figure", figure, config.figures)
    find_task(spec.task, config.tasks).figure_kind(spec.kind)
    return for_task(config, spec.task, f"Figure {figure!r}")


def figure_runs(config: Config, figure: str) -> list[Run]:
    """The runs that a figure shows.

    Raises :class:`~snella.errors.UserError` for an unknown figure or kind of figure, or where
    none of its methods is in the suite.
    """
    config = figure_config(config, figure)
    spec, suite, enabled = config.figures[figure], current_suite(config), suite_methods(config)
    methods = [name for name in spec.methods or enabled if name in enabled]
    if not methods:
        raise UserError(f"None of the methods of figure {figure!r} is in suite {config.suite!r}.")
    every = math.ceil(len(suite.datasets) / (spec.datasets or len(suite.datasets)))
    seeds = suite.seeds if spec.seeds == "all" else suite.seeds[:1]
    return plan(config, methods=methods, datasets=suite.datasets[::every], seeds=seeds)


def suite_task(config: Config) -> str:
    """The task family of the configured suite."""
    tasks = {config.datasets[name].task for name in current_suite(config).datasets}
    if len(tasks) > 1:
        raise UserError(f"Suite {config.suite!r} mixes tasks: {', '.join(sorted(tasks))}.")
    return tasks.pop() if tasks else "classification"
