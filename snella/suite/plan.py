"""From a configuration to its list of runs: the only place where the grid is expanded.

A run is (suite, backbone, data set, method, protocol, seed), with everything that moves its number
resolved: :class:`~snella.runs.run.Run`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from snella.errors import UserError, unknown
from snella.files import user_path
from snella.runs.run import Dataset, MethodChoice, Run
from snella.suite import search
from snella.suite.checks import check_dataset, check_suite, look_up, note_inherited
from snella.suite.config import CHECKOUT, LARGEST_SEED, Config, SuiteEntry, locate
from snella.suite.settings import settings_of
from snella.tasks import find_task
from snella.tasks.base import Backbone

MAIN = "table1"


def plan(
    config: Config,
    *,
    methods: list[str] | None = None,
    datasets: list[str] | None = None,
    seeds: list[int] | None = None,
) -> list[Run]:
    """Expand the configured suite to runs, in the order methods x data sets x seeds."""
    suite = current_suite(config)
    first, *others = suite.seeds if seeds is None else seeds
    runs: list[Run] = []
    for method in methods or suite_methods(config):
        for dataset in datasets or suite.datasets:
            run = resolve(config, method, dataset, first)
            runs += [run, *(run.model_copy(update={"seed": seed}) for seed in others)]
    return runs


def current_suite(config: Config) -> SuiteEntry:
    """The configured suite; unknown names of its parts are reported here, before anything runs."""
    if config.suite not in config.suites:  # asked for every run, so the place only when needed
        look_up("suite", config.suite, config.suites, config.where(["suite"]))
    suite = config.suites[config.suite]
    if not config.first_time("suite", config.suite):
        return suite
    at = ("suites", config.suite)
    look_up("backbone", suite.backbone, config.backbones, config.where((*at, "backbone")))
    look_up("protocol", suite.protocol, config.protocols, config.where((*at, "protocol")))
    for group, members in suite.groups.items():
        for dataset in members:
            place = config.where((*at, "groups", group, dataset))
            look_up("data set", dataset, config.datasets, place)
            check_dataset(config, dataset)
    for method in suite_methods(config):
        key = "further_methods" if method in suite.further_methods else "methods"
        look_up("method", method, config.methods, config.where((*at, key)))
    for dataset in suite.search.datasets or ():
        place = config.where((*at, "search", "datasets"))
        look_up(f"data set of suite {config.suite}:", dataset, dict.fromkeys(suite.datasets), place)
    if (table := suite.search.table) is not None:
        look_up("table", table, config.tables, config.where((*at, "search", "table")))
    for method in suite.search.rows:
        look_up("method", method, config.methods, config.where((*at, "search", "rows", method)))
    check_suite(config, suite)
    note_inherited(config, suite.datasets)
    return suite


def suite_methods(config: Config) -> list[str]:
    """The suite's rows, or all configured ones but ablations where it names none; further ones."""
    suite: SuiteEntry = look_up("suite", config.suite, config.suites)
    every = [name for name, row in config.methods.items() if not row.ablation]
    rows = every if suite.methods is None else suite.methods
    return list(dict.fromkeys([*rows, *suite.further_methods]))


def enabled_methods(config: Config, table: str) -> set[str]:
    """The suite's rows, and the ablations that the table names."""
    named = _listed(config.tables[table]) & set(config.methods)
    return {*suite_methods(config), *(name for name in named if config.methods[name].ablation)}


def resolve(config: Config, method: str, dataset: str, seed: int) -> Run:
    """All settings of one run: protocol preset < row < suite < the suite's word on the row."""
    suite = current_suite(config)
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"Seed {seed} is not in 0 to {LARGEST_SEED}.")
    row = look_up("method", method, config.methods)
    data = look_up("data set", dataset, config.datasets)
    if data.task != suite_task(config):
        raise UserError(
            f"Data set {dataset!r} is of {data.task}, suite {config.suite!r} of "
            f"{suite_task(config)}; choose a suite of its own family (--config suite=...)."
        )
    file = config.once(("method file", row.file), lambda: method_path(config, row.file))
    typed, notes = settings_of(config, suite, method, dataset, file)
    protocol, settings, hyperparameters = typed
    trial = config.trial
    return Run(
        suite=config.suite if trial is None else f"{config.suite}{search.NAME}{trial.number}",
        backbone=config.once(("backbone", suite.backbone), lambda: _backbone(config, suite)),
        dataset=Dataset(
            name=dataset,
            task=data.task,
            prepared=config.once(
                ("prepared", dataset), lambda: prepared_folder(config, dataset).as_posix()
            ),
            scored="test" if trial is None else "val",
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


def _backbone(config: Config, suite: SuiteEntry) -> Backbone:
    entry = config.backbones[suite.backbone]
    return Backbone(
        name=suite.backbone,
        arch=entry.arch,
        kwargs=entry.kwargs,
        file=entry.file and locate(entry.file),
        load=entry.load,
    )


def prepared_folder(config: Config, dataset: str) -> Path:
    """Where the prepared arrays and the manifest of a data set lie."""
    return Path(config.data) / "prepared" / dataset


def manifest(config: Config, dataset: str) -> Path:
    """The file that is there once a data set is prepared."""
    return prepared_folder(config, dataset) / "manifest.json"


def is_made(config: Config, name: str) -> bool:
    """Whether a data set is rendered or packaged, and so needs no folder of raw files."""
    spec = config.datasets[name]
    return spec.kind in find_task(spec.task, config.tasks).made


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
        path = locate(user_path(file).as_posix())
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
    return look_up("method", name, {**dict.fromkeys(config.methods), **files}), {}


def table_methods(config: Config, table: str) -> list[tuple[str | None, list[str]]]:
    """A table's row groups, reduced to the suite's methods.

    Methods that no table lists, such as one a user just added, and the suite's further methods
    form a last group of every table, so that naming a method in the configuration is enough.
    """
    config = for_table(config, table)
    spec = config.tables[table]
    enabled = enabled_methods(config, table)
    elsewhere = {name for other in config.tables.values() for name in _listed(other)}
    listed = _listed(spec) | elsewhere - set(config.suites[config.suite].further_methods)
    groups = [
        (group.get("group"), [name for name in group["methods"] if name in enabled])
        for group in spec.get("rows", [])
    ]
    added = [name for name in suite_methods(config) if name not in listed]
    return [(title, names) for title, names in [*groups, (None, added)] if names]


def _listed(spec: dict[str, Any]) -> set[str]:
    """The methods that a table's description names."""
    return {name for group in spec.get("rows", []) for name in group["methods"]}


def with_suite(config: Config, suite: str) -> Config:
    """The configuration with another suite, or with a trial of its search, chosen."""
    base, _, number = suite.rpartition(search.NAME)
    if suite not in config.suites and base in config.suites and number.isdigit():
        config = with_suite(config, base)
        if not 1 <= int(number) <= config.suites[base].search.trials:
            raise UserError(f"The search of suite {base!r} has no trial {number}.")
        return config.with_trial(int(number))
    look_up("suite", suite, config.suites)
    return config.model_copy(update={"suite": suite})


def search_runs(config: Config) -> list[Run]:
    """All trials of the suite's search: the same number for every row."""
    suite = current_suite(config)
    wanted = suite.search
    rows = None
    if wanted.table is not None:
        rows = [name for _, names in table_methods(config, wanted.table) for name in names]
    return [
        run
        for number in range(1, wanted.trials + 1)
        for run in plan(
            config.with_trial(number), methods=rows, datasets=wanted.datasets, seeds=wanted.seeds
        )
    ]


def main_table(config: Config) -> str:
    """The table that is meant where none is named: Table 1, or the first of the suite's task."""
    task = suite_task(config)
    own = [name for name, spec in config.tables.items() if _task(spec) == task]
    return MAIN if MAIN in own or not own else own[0]


def _task(spec: dict[str, Any]) -> str:
    """The task family of a table's description."""
    return str(spec.get("task", "classification"))


def for_table(config: Config, table: str) -> Config:
    """The configuration with the suite that a table shows, as :func:`for_task` finds it."""
    spec = look_up("table", table, config.tables)
    return for_task(config, _task(spec), f"Table {table!r}")


def for_task(config: Config, task: str, what: str) -> Config:
    """The configuration with a suite of the family ``task``, for ``what`` is shown.

    That is the configured one where it is of that family, and otherwise the one that
    ``task_suites`` names for it.
    """
    if suite_task(config) == task:
        return config
    if task not in config.task_suites:
        raise UserError(
            f"{what} shows {task}, suite {config.suite!r} is of {suite_task(config)}; choose a "
            f"suite of {task}, or name one for it under `task_suites: {{{task}: ...}}`."
        )
    return with_suite(config, config.task_suites[task])


def figure_config(config: Config, figure: str) -> Config:
    """The configuration with the suite that a figure shows, as :func:`for_task` finds it."""
    spec = look_up("figure", figure, config.figures)
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
    return config.once(("task of suite", config.suite), lambda: _only_task(config))


def _only_task(config: Config) -> str:
    tasks = {config.datasets[name].task for name in current_suite(config).datasets}
    if len(tasks) > 1:
        raise UserError(f"Suite {config.suite!r} mixes tasks: {', '.join(sorted(tasks))}.")
    return tasks.pop() if tasks else "classification"
