"""From a configuration to its list of runs: the only place where the grid is expanded.

A run is (suite, backbone, data set, method, protocol, seed). Everything that moves its number
is in its resolved settings, a plain JSON object; its identity is the hash of those settings,
the method file's source, the backbone's weights and the data manifest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snella.errors import UserError, unknown
from snella.runs.protocol import Protocol
from snella.suite.config import CHECKOUT, Config, SuiteEntry, locate, validate


@dataclass(frozen=True)
class Run:
    """One cell of the grid; ``settings`` is all that the job needs to know, JSON-ready."""

    suite: str
    backbone: str
    dataset: str
    method: str
    seed: int
    settings: dict[str, Any]
    folder: Path

    @property
    def key(self) -> str:
        """The run's path below ``runs/``."""
        return f"{self.suite}/{self.backbone}/{self.dataset}/{self.method}/seed{self.seed}"

    @property
    def record(self) -> Path:
        """Where the run's record lies once it is done."""
        return self.folder / "record.json"

    @property
    def json(self) -> str:
        """The settings as canonical JSON: what decides whether a run is stale."""
        return json.dumps(self.settings, sort_keys=True)


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
    suite = _look_up("suite", config.suite, config.suites)
    _look_up("backbone", suite.backbone, config.backbones)
    _look_up("protocol", suite.protocol, config.protocols)
    for dataset in suite.datasets:
        _look_up("data set", dataset, config.datasets)
    for method in suite_methods(config):
        _look_up("method", method, config.methods)
    return suite


def suite_methods(config: Config) -> list[str]:
    """The suite's rows; every configured method where the suite names none."""
    suite = _look_up("suite", config.suite, config.suites)
    return list(config.methods) if suite.methods is None else suite.methods


def resolve(config: Config, method: str, dataset: str, seed: int) -> Run:
    """All settings of one run: protocol preset, then suite, method and data set on top."""
    suite = current_suite(config)
    row = _look_up("method", method, config.methods)
    data = _look_up("data set", dataset, config.datasets)
    backbone = config.backbones[suite.backbone]
    protocol, hyperparameters = _layers(config, suite, method, dataset)
    settings = {
        "suite": config.suite,
        "backbone": {
            "name": suite.backbone,
            **backbone.model_dump(),
            "file": backbone.file and locate(backbone.file),
        },
        "dataset": {
            "name": dataset,
            "task": data.task,
            "prepared": (prepared_folder(config, dataset)).as_posix(),
        },
        "method": {
            "name": method,
            "file": method_path(config, row.file),
            "hyperparameters": hyperparameters,
        },
        "protocol": {"name": suite.protocol, **protocol.model_dump()},
        "base_seed": suite.base_seed,
        "seed": seed,
    }
    folder = (
        Path(config.results)
        / "runs"
        / config.suite
        / suite.backbone
        / dataset
        / method
        / f"seed{seed}"
    )
    return Run(config.suite, suite.backbone, dataset, method, seed, settings, folder)


def _layers(
    config: Config, suite: SuiteEntry, method: str, dataset: str
) -> tuple[Protocol, dict[str, Any]]:
    row = config.methods[method]
    values = {**config.protocols[suite.protocol], **suite.overrides, **row.protocol}
    special = suite.method_overrides.get(method, {})
    values.update(special.get("protocol", {}))
    hyperparameters = {**row.hyperparameters, **special.get("hyperparameters", {})}
    if values.get("hyperparameters") == "released":
        released = config.released.get(method, {}).get(dataset)
        if released is None:
            raise UserError(
                f"Protocol {suite.protocol!r} asks for released hyper-parameters, but none are "
                f"known for {method} on {dataset}; use `hyperparameters: fixed`."
            )
        values.update(released.get("protocol", {}))
        hyperparameters.update(released.get("hyperparameters", {}))
    where = f"protocol {suite.protocol!r} of suite {config.suite!r} for {method}"
    return validate(Protocol, values, where), hyperparameters


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
    found = method_files(config)
    if file not in found:
        raise unknown(f"method file in {config.baselines}/", file, found)
    return found[file].as_posix()


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


def derive_seed(base_seed: int, dataset: str, repetition: int) -> int:
    """A run's random seed. It does not depend on the method, so that methods are paired."""
    text = f"{base_seed}/{dataset}/{repetition}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def identity(settings_json: str, method_source: bytes, *digests: str) -> str:
    """SHA-256 over the resolved settings, the method's source and the inputs' digests."""
    parts = [settings_json.encode(), method_source, *(d.encode() for d in digests)]
    return hashlib.sha256(b"\0".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def _look_up(kind: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise unknown(kind, name, known)
    return known[name]


def table_methods(config: Config, table: str) -> list[tuple[str | None, list[str]]]:
    """A table's row groups, reduced to the suite's methods.

    Methods that no table lists, such as one a user just added, form a last group of every
    table, so that naming a method in the configuration is enough to get its row.
    """
    spec = _look_up("table", table, config.tables)
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
    methods = [name for _, names in table_methods(config, table) for name in names]
    return plan(config, methods=methods)
