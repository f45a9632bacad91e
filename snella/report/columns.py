"""From a table's description and a suite to concrete columns and rows, with units and digits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from snella.errors import UserError, unknown
from snella.report.spec import (
    Columns,
    DatasetColumns,
    GroupColumns,
    MeanColumn,
    MetricColumns,
    RowGroup,
    SubsetColumns,
    SuiteInfo,
    TableSpec,
    ValueColumn,
)

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["dataset", "mean_of_tasks", "mean_of_groups", "value"]
MEANS: dict[str, Kind] = {"tasks": "mean_of_tasks", "groups": "mean_of_groups"}


@dataclass(frozen=True)
class Unit:
    """A recorded number times ``scale`` is printed in units of ``symbol`` with ``digits``."""

    symbol: str
    scale: float = 1.0
    digits: int = 1

    def shows(self, sizes: Sequence[float]) -> bool:
        """Whether the largest of ``sizes`` reaches 1, and the smallest exceeds the last digit."""
        return max(sizes) * self.scale >= 1 and min(sizes) * self.scale >= 1.5 * 10**-self.digits

    def text(self, number: float | None) -> str:
        """A number in this unit as printed; nothing for none."""
        return "" if number is None else f"{number:.{self.digits}f}"

    def signed(self, difference: float | None) -> str:
        """A difference in this unit as printed; nothing for none."""
        return "" if difference is None else signed(difference, self.digits)


def signed(value: float, digits: int) -> str:
    """A difference with its sign; nothing is plus or minus zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


@dataclass(frozen=True)
class Quantity:
    """A metric, or (with ``source``, a column of the frame) a cost or parameter count.

    Of several ``units`` the first in which the largest printed value reaches 1, and none but zero
    is lost in rounding, is used.
    ``after_failure`` says that the number means something even if the run failed.
    """

    name: str
    title: str
    units: tuple[Unit, ...] = (Unit("", 1.0, 4),)
    higher_is_better: bool = True
    source: str = ""
    after_failure: bool = False

    def unit(self, values: Iterable[float]) -> Unit:
        """The unit in which ``values`` (as recorded) are printed."""
        sizes = [abs(v) for v in values if v] or [0.0]
        return next((u for u in self.units if u.shows(sizes)), self.units[-1])


COUNT = (Unit("M", 1e-6, 2), Unit("k", 1e-3, 1))
SECONDS = (Unit("s", 1.0, 1), Unit("ms", 1e3, 2))


def _cost(name: str, title: str, units: tuple[Unit, ...], source: str = "") -> Quantity:
    counted = units is COUNT
    return Quantity(name, title, units, False, source or name, after_failure=counted)


VALUES: dict[str, Quantity] = {
    q.name: q
    for q in (
        _cost("trainable", "Trainable parameters, head included", COUNT, "with_head"),
        _cost("with_head", "Trainable parameters, head included", COUNT),
        _cost("without_head", "Trainable parameters without the head", COUNT, "trainable"),
        _cost("total", "Parameters of the model", COUNT),
        _cost(
            "gflops",
            "Multiply-adds of one forward pass at inference",
            (Unit("G", 1.0, 2), Unit("M", 1e3, 1)),
        ),
        _cost("peak_memory_mb", "Peak memory of training", (Unit("MB", 1.0, 0),)),
        _cost("train_seconds", "Training time of one run", SECONDS),
        _cost("train_seconds_per_image", "Training time per image", SECONDS),
        _cost("inference_seconds_per_image", "Inference time per image", SECONDS),
    )
}


@dataclass(frozen=True)
class Metrics:
    """The metrics that the records know, and their primary one."""

    known: Mapping[str, Quantity] = field(default_factory=dict)
    primary: str = ""

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Metrics:
        """Read names, units and directions off the frame's rows."""
        rows = frame[frame["metric"] != ""]
        known = {
            row.metric: Quantity(
                row.metric, row.title, units_of(row.unit), bool(row.higher_is_better)
            )
            for row in rows.drop_duplicates("metric").itertuples()
        }
        return cls(known, next(iter(rows.loc[rows["primary"].eq(True), "metric"]), ""))

    def __getitem__(self, name: str | None) -> Quantity:
        """Look up a metric (None: the primary one); raises UserError with the closest match."""
        name = name or self.primary
        if self.known and name not in self.known:
            raise unknown("metric", name, self.known)
        return self.known.get(name) or Quantity(name, name or "Result")


def units_of(recorded: str) -> tuple[Unit, ...]:
    """How a metric is printed whose recorded unit is this."""
    known = {"%": Unit("%", 100.0, 1), "": Unit("", 1.0, 4)}
    return (known.get(recorded, Unit(recorded, 1.0, 2)),)


def value(name: str) -> Quantity:
    """Look up a cost or parameter count; raises UserError for an unknown one."""
    if name not in VALUES:
        raise unknown("value", name, VALUES)
    return VALUES[name]


@dataclass(frozen=True)
class Column:
    """One printed column. ``members`` maps each group it covers to that group's data sets.

    ``subset`` is the group of a record whose number is meant; ``visible`` says that a mean's
    members are columns of their own.
    """

    key: str
    label: str
    block: str | None
    kind: Kind
    quantity: Quantity
    members: Mapping[str, tuple[str, ...]]
    suite: SuiteInfo
    visible: bool = False
    subset: str = ""

    @property
    def ranked(self) -> bool:
        """Whether the rows are compared."""
        return self.kind != "value"

    @property
    def datasets(self) -> list[str]:
        """All data sets that the column covers."""
        return [d for ds in self.members.values() for d in ds]

    @property
    def weights(self) -> dict[str, float]:
        """What each data set weighs in the column's mean."""
        if self.kind == "mean_of_groups":
            groups = self.members.values()
            return {d: 1 / (len(groups) * len(ds)) for ds in groups for d in ds}
        return dict.fromkeys(self.datasets, 1 / len(self.datasets))


def expand_columns(
    spec: TableSpec,
    suite: SuiteInfo,
    metrics: Metrics | None = None,
    others: Mapping[str, SuiteInfo] | None = None,
    subsets: Mapping[str, Sequence[str]] | None = None,
) -> list[Column]:
    """All columns, left to right; raises UserError for a group that the suite does not have.

    ``others`` are the further suites that columns name; ``subsets`` the groups of the records
    by data set.
    """
    homes: dict[str | None, SuiteInfo] = {name: info for name, info in (others or {}).items()}
    homes |= {suite.name: suite, None: suite}
    parts = [
        [] if isinstance(part, ValueColumn)
        else _in_metrics(part, spec, homes, metrics or Metrics(), subsets or {})
        for part in spec.columns
    ]  # fmt: skip
    found = [column for part in parts for column in part]
    if not found:
        shown = dict.fromkeys(g for part in spec.columns for g in _groups(part))
        raise UserError(
            f"The table shows the groups {', '.join(shown)}, and suite {suite.name!r} has only "
            f"{', '.join(suite.groups)}. Give its group one of those names, or describe a table "
            "of your own with `datasets_of: GROUP` (docs/tables.md)."
        )
    for part, columns in zip(spec.columns, parts, strict=True):
        if isinstance(part, ValueColumn):
            home = homes.get(part.suite)
            home = next((c.suite for c in found if c.suite is home), found[0].suite)
            shown = dict.fromkeys(d for c in found if c.suite is home for d in c.datasets)
            own, members = value(part.value), {"": tuple(shown)}
            columns.append(Column(own.name, part.label, None, "value", own, members, home))
    return [column for part in parts for column in part]


def _in_metrics(
    part: MetricColumns,
    spec: TableSpec,
    homes: Mapping[str | None, SuiteInfo],
    metrics: Metrics,
    subsets: Mapping[str, Sequence[str]],
) -> list[Column]:
    """The columns of one entry, once per metric it names."""
    home = homes.get(part.suite)
    if home is None:
        if part.optional:
            return []
        raise unknown("suite of a table's column:", part.suite, filter(None, homes))
    elsewhere = "" if home is homes[None] else f" ({home.name})"
    several = isinstance(part.metric, list)
    result = []
    for name in part.metric if isinstance(part.metric, list) else [part.metric]:
        own, block = metrics[name or spec.metric], home.block(part.block)
        if several:
            block = f"{block}: {own.title}" if block else own.title
        suffix = elsewhere if name is None else f" {own.name}{elsewhere}"
        first = Column("", "", block, "dataset", own, {}, home)
        result += _columns(part, first, suffix, subsets)
    return result


def _columns(
    part: MetricColumns, first: Column, suffix: str, subsets: Mapping[str, Sequence[str]]
) -> list[Column]:
    """The columns of one entry in one metric; all are ``first`` with members of their own."""
    home = first.suite
    if isinstance(part, SubsetColumns):
        return _subsets(part, first, suffix, subsets)
    members = _members(_groups(part), home, part.optional)
    if isinstance(part, MeanColumn):
        mean = replace(first, key=f"mean{suffix}", label=part.label, members=members)
        return _means(part.mean, mean)
    if isinstance(part, DatasetColumns):
        columns = [
            replace(first, key=d + suffix, label=home.label(d), members={g: (d,)})
            for g, ds in members.items()
            for d in ds
        ]
    else:
        first = replace(first, kind="mean_of_tasks")
        columns = [
            replace(first, key=g + suffix, label=_capital(home.label(g)), members={g: ds})
            for g, ds in members.items()
        ]
    key = f"{part.block or _groups(part)[0]} mean{suffix}"
    mean = replace(first, key=key, label="Mean", members=members, visible=True)
    return columns + _means(part.mean, mean)


def _subsets(
    part: SubsetColumns, first: Column, suffix: str, subsets: Mapping[str, Sequence[str]]
) -> list[Column]:
    """A column per part of a data set's test set, and one for the whole."""
    dataset, home = part.subsets_of, first.suite
    group = next((g for g, ds in home.groups.items() if dataset in ds), None)
    if group is None:
        if part.optional:
            return []
        known = [d for ds in home.groups.values() for d in ds]
        raise unknown(f"data set of suite {home.name!r}:", dataset, known)
    block = first.block or home.label(dataset)
    first = replace(first, block=block, members={group: (dataset,)})
    columns = [
        replace(first, key=f"{dataset}/{name}{suffix}", label=home.label(name), subset=name)
        for name in subsets.get(dataset, ())
    ]
    if part.mean is not None or not columns:
        columns.append(replace(first, key=f"{dataset}{suffix}", label="All"))
    return columns


def _means(kind: str | None, mean: Column) -> list[Column]:
    """The column as a mean of that kind, with ``both`` of each; none over nothing."""
    if kind is None or not mean.members:
        return []
    if kind != "both":
        return [replace(mean, kind=MEANS[kind])]
    return [
        replace(mean, key=f"{mean.key} over {over}", label=f"{mean.label} ({over})", kind=name)
        for over, name in MEANS.items()
    ]


def _groups(part: Columns) -> list[str]:
    """The groups whose data sets an entry shows."""
    if isinstance(part, DatasetColumns):
        return [part.datasets_of]
    if isinstance(part, GroupColumns):
        return part.groups
    return part.mean_of if isinstance(part, MeanColumn) else []


def _members(groups: Sequence[str], suite: SuiteInfo, optional: bool) -> dict[str, tuple[str, ...]]:
    for group in groups:
        if group not in suite.groups and not optional:
            raise unknown(f"group of suite {suite.name!r}:", group, suite.groups)
    return {g: tuple(suite.groups[g]) for g in groups if suite.groups.get(g)}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def expand_rows(spec: TableSpec, methods: Iterable[str]) -> list[RowGroup]:
    """The enabled ``methods`` in the table's order; unnamed ones come last."""
    methods = list(methods)
    named = [m for group in spec.rows for m in group.methods]
    twice = sorted({m for m in named if named.count(m) > 1})
    if twice:
        raise UserError(f"The table names {', '.join(twice)} twice; every method is one row.")
    groups = [*spec.rows]
    rest = [m for m in methods if m not in named]
    if rest and spec.others is not None:
        groups.append(RowGroup(group=spec.others, methods=rest))
    present = [(group, [m for m in group.methods if m in methods]) for group in groups]
    result = [group.model_copy(update={"methods": own}) for group, own in present if own]
    if not result:
        raise UserError("No enabled method occurs in the table; enable one of its rows.")
    return result
