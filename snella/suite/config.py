"""What to run, as typed data: suites, backbones, data sets, methods, protocols.

``config/`` holds one YAML file per section and one file per suite; ``config/config.yaml``, and over
it a file of one's own, choose the suite and may add to or override every section, so that a lab
needs a single file of its own. An unknown key is an error that names the file, the key and the
closest match.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr

from snella.errors import UserError
from snella.files import user_path
from snella.suite.overlays import clean, difference, expand, overlay
from snella.suite.reading import COMMAND_LINE, Origins, lines_of, parse, read_yaml
from snella.suite.search import FOLDER, Search, Trial
from snella.tasks.base import DatasetSpec
from snella.validation import Strict, check_distinct, check_name, validate

SECTIONS = ("backbones", "datasets", "methods", "protocols", "suites")
DEFAULT = Path("config/config.yaml")
CHECKOUT = Path(__file__).resolve().parents[2]
"""The repository this package runs from; what it ships is found from other directories too."""
LARGEST_SEED = 2**31 - 1
PLAIN_SCALAR = re.compile(r"null|~|true|false|[-+]?\.?[0-9][0-9_.eE+-]*")
"""Text that was null, a truth value or a number before Snakemake took it."""
Answer = TypeVar("Answer")

Reference = str
"""A name defined elsewhere; an unknown one is reported with the closest match when it is used."""
Name = Annotated[str, AfterValidator(check_name)]
"""A row, backbone or protocol: part of paths."""
Column = Annotated[str, AfterValidator(partial(check_name, dots=False))]
"""A data set, group or suite: part of paths, and of file names that Snakemake takes apart."""
TAKEN = re.compile(r"(figure|audit|report|lr_sweep).*|.*_(statistics|ranks|vs_published).*")
"""What other results are called; the rules of the workflow tell them from tables so."""


def _not_taken(name: str) -> str:
    if TAKEN.fullmatch(name):
        raise ValueError("other results are called so; choose a name such as 'table_1'")
    return name


TableName = Annotated[
    str, AfterValidator(partial(check_name, dots=False, hyphens=False)), AfterValidator(_not_taken)
]
Digest = Annotated[str, Field(pattern="^[0-9A-Fa-f]+$"), AfterValidator(str.lower)]
"""A published digest or its beginning, in hexadecimal."""
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED, strict=True)]


def _place(path: str) -> str:
    """A folder's path, ``~`` expanded."""
    if not (path.strip() and path.isprintable()) or set(path) & set("{}*?\"'"):
        unfit = "quotes, braces, wildcards or control characters"
        raise ValueError(f"a folder's path is not empty and has no {unfit}")
    return user_path(path).as_posix()


def _without_null(groups: Any) -> Any:
    """Groups set to null are left out: a suite shipped here may have more than one wants."""
    if not isinstance(groups, dict):
        return groups
    return {name: members for name, members in groups.items() if members is not None}


def _groups(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """Groups of data sets, each of which stands once in the suite."""
    for name, members in groups.items():
        if not members:
            raise ValueError(
                f"group {name!r} has no data set; name one, or write `{name}: null` to leave it out"
            )
    if not groups:
        raise ValueError("a suite needs a group with a data set")
    check_distinct([member for members in groups.values() for member in members])
    return groups


Place = Annotated[str, AfterValidator(_place)]
Groups = Annotated[
    dict[Column, list[Reference]], BeforeValidator(_without_null), AfterValidator(_groups)
]


class BackboneEntry(Strict):
    """A pre-trained model: timm architecture and keyword arguments, and the weights' file.

    ``file`` is a weights file, a transformers folder, ``timm`` (the tag's weights in the local
    cache) or ``random``. ``key`` chooses one of several containers in a file; ``ignore`` and
    ``fresh`` list beginnings of tensors that only the file and only the model may have;
    ``holds``, ``lacks``, ``md5`` and ``sha256`` tell releases of one architecture apart;
    ``normalisation`` is that of the pixels in pre-training. A file of
    an installed package is ``package:name/path``, where ``package`` says what to install.
    """

    arch: str
    kwargs: dict[str, Any] = {}
    file: Annotated[str, AfterValidator(os.path.expanduser)] | None = None
    key: str | None = None
    ignore: list[str] = []
    fresh: list[str] = []
    holds: list[str] = []
    lacks: list[str] = []
    md5: Digest | None = None
    sha256: Digest | None = None
    package: str | None = None
    title: str = ""
    source: str = ""
    licence: str = ""
    normalisation: Literal["imagenet", "inception", "clip", "none"] | None = None
    demo: bool = False

    @property
    def load(self) -> dict[str, Any]:
        """How the file is read and recognised: what differs from the defaults."""
        names = {"key", "ignore", "fresh", "holds", "lacks", "md5", "sha256", "package"}
        return self.model_dump(include=names, exclude_defaults=True)


class MethodEntry(Strict):
    """A row: a method file (a stem in ``baselines/`` or a path), its settings and its label.

    An ``ablation`` is no row of a suite that does not list it, and a row of every table that does.
    """

    file: str = Field(description="default: the row's name")
    label: str = ""
    hyperparameters: dict[str, Any] = {}
    protocol: dict[str, Any] = {}
    ablation: bool = False


class MethodOverride(Strict):
    """What a suite, or a released script, says about one row."""

    protocol: dict[str, Any] = {}
    hyperparameters: dict[str, Any] = {}


class SuiteEntry(Strict):
    """Columns, backbone, protocol and seeds; ``groups`` maps a group's name to its data sets.

    ``methods`` are the rows (null: all there are). ``further_methods`` are rows beside them, which
    every table shows that does not leave them out: how a row is added to a shipped suite.
    """

    title: str
    demo: bool = False
    backbone: Reference
    protocol: Reference
    overrides: dict[str, Any] = {}
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(check_distinct)] = [0]
    base_seed: Seed = 0
    groups: Groups
    methods: (
        Annotated[list[Reference], Field(min_length=1), AfterValidator(check_distinct)] | None
    ) = None
    further_methods: Annotated[list[Reference], AfterValidator(check_distinct)] = []
    method_overrides: dict[Reference, MethodOverride] = {}
    search: Search = Search()

    @property
    def datasets(self) -> list[str]:
        """All data sets of the suite, by group."""
        return [name for group in self.groups.values() for name in group]


class Searched(Strict):
    """What a search found: settings by row and data set, ``*`` for all, and how they were found.

    ``scores`` of the trials are in the order of the grid; ``edge`` names settings whose best value
    is the lowest or highest that was tried, and ``failed`` the trials without a score.
    """

    suite: str = ""
    command: str = ""
    criterion: str = ""
    grid: dict[str, list[Any]] = {}
    grids: dict[Reference, dict[str, list[Any]]] = {}
    choose: str = ""
    seeds: list[int] = []
    trials: int = 0
    runs: int = 0
    made: dict[str, Any] = {}
    edge: dict[Reference, dict[str, list[str]]] = {}
    failed: list[str] = []
    rows: dict[Reference, dict[str, MethodOverride]] = {}
    scores: dict[Reference, dict[str, list[float | None]]] = {}


def _table(spec: dict[str, Any]) -> dict[str, Any]:
    """What planning needs of a table: the task, and rows as lists of methods."""
    rows = spec.get("rows", [])
    if not isinstance(rows, list):
        raise ValueError("`rows` is a list of groups, each `{methods: [...]}`")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"group {number} of `rows` is no mapping; write `{{methods: [...]}}`")
        methods = row.get("methods")
        if not (isinstance(methods, list) and all(isinstance(m, str) for m in methods)):
            close = next((key for key in row if key not in ("group", "methods")), None)
            hint = f" (it has {close!r})" if close else ""
            raise ValueError(f"group {number} of `rows` needs `methods`, a list of names{hint}")
    if not isinstance(spec.get("task", ""), str):
        raise ValueError("`task` is the name of a task family")
    return spec


class FigureEntry(Strict):
    """A figure drawn from predictions: of which task's suite, of which kind, of which runs.

    ``kind`` is one that the task family draws, by default its first. ``methods`` stand in printed
    order (null: all of the suite); at most ``datasets`` data sets are shown, evenly through the
    suite (null: all).
    """

    task: str
    kind: str | None = None
    methods: Annotated[list[Reference], Field(min_length=1)] | None = None
    datasets: int | None = Field(1, gt=0)
    seeds: Literal["first", "all"] = "first"


def _from_environment(name: str) -> Any:
    return Field(default_factory=partial(os.environ.get, name, ""))


class Cluster(Strict):
    """What jobs ask of a cluster (docs/cluster.md); a run that failed for it gets more.

    ``partition`` is for runs, ``cpu_partition`` for preparing data; empty names are the
    environment's ``SNELLA_PARTITION``, ``SNELLA_CPU_PARTITION`` and ``SNELLA_ACCOUNT``, or else the
    cluster's defaults. Memory and minutes are those of one run at the first attempt.
    """

    partition: str = _from_environment("SNELLA_PARTITION")
    cpu_partition: str = _from_environment("SNELLA_CPU_PARTITION")
    account: str = _from_environment("SNELLA_ACCOUNT")
    gpus: Annotated[int, Field(ge=0, le=1, strict=True)] = 1
    memory_mb: Annotated[int, Field(ge=500, le=100_000_000, strict=True)] = 16000
    minutes: Annotated[int, Field(ge=1, le=525_600, strict=True)] = 120


class Config(Strict):
    """The merged configuration."""

    suite: Reference
    results: Place = "results"
    data: Place = "data"
    baselines: Place = "baselines"
    tasks: Place = "tasks"
    allow_missing: bool = False
    warm_workers: bool = True
    gpu_share: Annotated[int, Field(ge=1, le=64, strict=True)] = 1
    cluster: Cluster = Field(default_factory=Cluster)
    task_suites: dict[Name, Reference] = {}
    backbones: dict[Name, BackboneEntry]
    datasets: dict[Column, DatasetSpec]
    methods: dict[Name, MethodEntry]
    protocols: dict[Name, dict[str, Any]]
    suites: dict[Column, SuiteEntry]
    tables: dict[TableName, Annotated[dict[str, Any], AfterValidator(_table)]]
    figures: dict[Name, FigureEntry] = {}
    released: dict[Reference, dict[Reference, MethodOverride]] = {}
    searched: dict[Name, Searched] = {}

    _origins: Origins = PrivateAttr(default_factory=Origins)
    _checked: set[tuple[str, ...]] = PrivateAttr(default_factory=set)
    _known: dict[tuple[Any, ...], Any] = PrivateAttr(default_factory=dict)
    _trial: Trial | None = PrivateAttr(None)

    def once(self, key: tuple[Any, ...], make: Callable[[], Answer]) -> Answer:
        """What ``make`` returned when it was first called for ``key``."""
        known = self._known  # pydantic looks long for a private attribute
        if key not in known:
            known[key] = make()
        found: Answer = known[key]
        return found

    @property
    def trial(self) -> Trial | None:
        """The trial of the suite's search that is planned, if any."""
        return self._trial

    def with_trial(self, number: int) -> Config:
        """The configuration of one trial of the suite's search; its records lie apart."""
        found = self.model_copy(update={"results": f"{self.results}/{FOLDER}"})
        found._trial = Trial(number, self.suites[self.suite].search)
        return found

    def first_time(self, *key: str) -> bool:
        """Whether this is the first call with ``key``: a check of the whole is done once."""
        done = key in self._checked
        self._checked.add(key)
        return not done

    def where(self, path: Iterable[str]) -> str:
        """The file and line that set a key, as "my.yaml, line 3", or an empty string."""
        return self._origins.where(list(path))


def locate(path: str) -> str:
    """``path`` as it is, or if there is no such file but the checkout ships one, that."""
    shipped = CHECKOUT / path
    return path if Path(path).exists() or not shipped.exists() else shipped.as_posix()


def load(path: Path = DEFAULT, overrides: dict[str, Any] | None = None) -> Config:
    """Read the section files, ``config.yaml`` beside them, and over it ``path`` and ``overrides``.

    Snakemake merges in the same order, so that both plan the same runs from the same files.
    ``overrides`` are those of ``--config``; their keys may be dotted.
    """
    path = Path(locate(path.as_posix())) if path == DEFAULT else path
    origins = Origins()
    base = _shipped(path, origins)
    main = _shipped_folder(path) / DEFAULT.name
    below = read_yaml(main, origins) if main.exists() and main.resolve() != path.resolve() else {}
    own = expand(overlay(below, read_yaml(path, origins)), base, str(path))
    above = expand(overrides or {}, base, COMMAND_LINE)
    origins.add(lines_of(above, COMMAND_LINE))
    return _merged(base, own, above, origins)


def from_snakemake(merged: dict[str, Any], files: Iterable[Path]) -> Config:
    """The configuration from what Snakemake merged of ``files`` and its ``--config``."""
    origins = Origins()
    base = _shipped(DEFAULT, origins)
    stated = _stated(files, origins)
    own = expand(merged, base, COMMAND_LINE)
    origins.add(lines_of(expand(difference(stated, merged), base, COMMAND_LINE), COMMAND_LINE))
    return _merged(base, own, {}, origins)


def _stated(files: Iterable[Path], origins: Origins) -> dict[str, Any]:
    """What configuration files say together; those named by a user win."""
    stated: dict[str, Any] = {}
    for file in sorted(files, key=lambda file: file != DEFAULT):
        stated = overlay(stated, read_yaml(file, origins)) if file.exists() else stated
    return stated


def typed(merged: dict[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """What Snakemake merged, with the numbers and nulls that its ``--config`` leaves as text."""
    given = difference(_stated(files, Origins()), merged)
    return overlay(merged, {key: _typed(value) for key, value in given.items()})


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_typed(inner) for inner in value]
    if isinstance(value, str) and PLAIN_SCALAR.fullmatch(value):
        return parse(value, COMMAND_LINE)[0]
    return value


def _merged(
    base: dict[str, Any], own: dict[str, Any], above: dict[str, Any], origins: Origins
) -> Config:
    """Lay a user's configuration over the shipped sections and validate the whole."""
    merged = overlay(overlay(base, own), above)
    clean(merged, origins)
    if isinstance(merged["methods"], dict):
        merged["methods"] = {name: _row(name, row) for name, row in merged["methods"].items()}
    config = validate(Config, merged, "configuration", origins)
    config._origins = origins
    _check_case(config)
    _check_folders(config)
    return config


def _check_case(config: Config) -> None:
    """Names must differ in more than case: a slip of the shift key, or one folder on some disks."""
    for section in (*SECTIONS, "tables", "figures"):
        seen: dict[str, str] = {}
        for name in getattr(config, section):
            other = seen.setdefault(name.casefold(), name)
            if other != name:
                place = config.where((section, name)) or "configuration"
                raise UserError(
                    f"{place}: {section}.{name} and {section}.{other} differ in case alone; write "
                    "both alike, or choose another name."
                )


def _check_folders(config: Config) -> None:
    """Folders of plug-ins that a user names must be there; the default ones may be left out."""
    for key in ("baselines", "tasks"):
        name = getattr(config, key)
        default = name == type(config).model_fields[key].default
        if not (default or Path(name).is_dir() or (CHECKOUT / name).is_dir()):
            place = config.where((key,)) or "configuration"
            raise UserError(f"{place}: there is no folder {name} (`{key}:`); correct the path.")


def _shipped(path: Path, origins: Origins) -> dict[str, Any]:
    """The sections beside ``path``, one file each, and one file per suite."""
    folder = _shipped_folder(path)
    stamp = tuple((str(p), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*.yaml")))
    base, lines = _sections(folder, stamp)
    origins.include(lines)
    return base


@lru_cache(maxsize=4)
def _sections(folder: Path, stamp: tuple[tuple[str, int], ...]) -> tuple[dict[str, Any], Origins]:
    """What the section files hold, read once while they stay as they are; not to be changed."""
    origins = Origins()
    base: dict[str, Any] = {
        name: read_yaml(folder / f"{name}.yaml", origins, name) for name in SECTIONS[:-1]
    }
    base["suites"] = {
        file.stem: read_yaml(file, origins, "suites", file.stem)
        for file in sorted((folder / "suites").glob("*.yaml"))
    }
    for section in ("tables", "figures"):
        base[section] = {}
        for file in sorted((folder / section).glob("*.yaml")):
            found = read_yaml(file, origins, section)
            for name in found.keys() & base[section].keys():
                raise UserError(
                    f"{file}: {name!r} stands in another file of {folder / section}, too; rename "
                    "one of the two."
                )
            base[section].update(found)
    base["searched"] = {
        file.stem: read_yaml(file, origins, "searched", file.stem)
        for file in sorted((folder / "search").glob("*.yaml"))
    }
    base["released"] = _released(folder / "released", base["datasets"], origins)
    return base, origins


def _released(folder: Path, datasets: dict[str, Any], origins: Origins) -> dict[str, Any]:
    """Settings of the authors' scripts, by row and data set; one file per repository.

    A set that is read from TFDS (`<name>-tfds`) has the settings of the set it is.
    """
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.yaml")):
        rows = read_yaml(file, origins, "released").get("rows", {})
        if not (isinstance(rows, dict) and all(isinstance(sets, dict) for sets in rows.values())):
            raise UserError(f"{file}: `rows` maps rows to data sets, and these to settings.")
        for row, sets in rows.items():
            twins = {f"{name}-tfds": entry for name, entry in sets.items()}
            sets = {**sets, **{name: e for name, e in twins.items() if name in datasets}}
            found[row] = {**found.get(row, {}), **sets}
    return found


def _row(name: str, entry: Any) -> Any:
    """A method's entry; without ``file:`` the row is called like its file in ``baselines/``."""
    return {"file": name, **(entry or {})} if isinstance(entry, dict | None) else entry


def _shipped_folder(path: Path) -> Path:
    """The folder of the section files: beside ``path``, ``config/`` here or of the checkout."""
    for folder in (path.parent, Path("config"), CHECKOUT / "config"):
        if (folder / "methods.yaml").exists():
            return folder
    raise UserError(
        f"No methods.yaml beside {path} or in config/; run from the repository's root "
        "(`pip install` alone brings the tuner, not the benchmark's configuration)."
    )
