"""From a table's description and a suite to concrete columns and rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from snella.errors import UserError, unknown
from snella.report.cells import Board, Outcome, combine
from snella.report.metrics import Quantity, metric, value
from snella.report.spec import (
    DatasetColumns,
    GroupColumns,
    MeanColumn,
    TableSpec,
    ValueColumn,
)

Kind = Literal["dataset", "mean_of_tasks", "mean_of_groups", "value"]


@dataclass(frozen=True)
class SuiteInfo:
    """What a table needs to know about a suite.

    ``groups`` maps a group to its data sets, ``labels`` data sets, groups, blocks and backbones
    to what is printed. A ``demo`` suite is never compared with published numbers.
    """

    name: str
    title: str
    groups: Mapping[str, Sequence[str]]
    demo: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)

    def label(self, name: str) -> str:
        """The printed name of a data set, group or backbone."""
        return self.labels.get(name, name)

    def block(self, name: str | None) -> str | None:
        """The printed name of a block; a demo suite's blocks only look like the paper's."""
        if name is None or name in self.labels:
            return self.labels.get(name or "", name)
        return f"{name}-like" if self.demo else name

    @property
    def banner(self) -> str:
        """What a demo suite's tables say on their face; empty for a real suite."""
        if not self.demo:
            return ""
        title = self.title.removesuffix(" (demo)")
        return f"{title}: demo data and backbone, not comparable with published numbers"


@dataclass(frozen=True)
class Column:
    """One printed column. ``members`` maps each group it covers to that group's data sets."""

    key: str
    label: str
    block: str | None
    kind: Kind
    quantity: Quantity
    members: Mapping[str, tuple[str, ...]]
    visible: bool = False

    @property
    def ranked(self) -> bool:
        """Whether the best and second best are marked."""
        return self.kind != "value"

    def outcome(self, board: Board, method: str, suite: SuiteInfo) -> Outcome:
        """What ``method`` reached in this column."""
        groups = {
            suite.label(group): [
                (suite.label(d), board.outcome(method, d, self.quantity)) for d in datasets
            ]
            for group, datasets in self.members.items()
        }
        tasks = [task for group in groups.values() for task in group]
        if self.kind == "dataset":
            return tasks[0][1]
        if self.kind == "mean_of_groups":
            means = [(g, combine(ts, visible=False)) for g, ts in groups.items()]
            return combine(means, visible=self.visible)
        return combine(tasks, visible=self.visible)


@dataclass(frozen=True)
class Rows:
    """Methods, as (name, label), under an optional header line."""

    title: str | None
    methods: tuple[tuple[str, str], ...]


def expand_columns(spec: TableSpec, suite: SuiteInfo) -> list[Column]:
    """All columns, left to right; raises UserError for a group that the suite does not have."""
    default = metric(spec.metric)
    parts: list[list[Column]] = []
    for description in spec.columns:
        if isinstance(description, ValueColumn):
            parts.append([])
        else:
            own = default if description.metric is None else metric(description.metric)
            parts.append(_metric_columns(description, suite, own))
    covered = _covered(column for part in parts for column in part)
    if not covered:
        raise UserError(f"The suite {suite.name!r} has none of the groups of this table.")
    for description, part in zip(spec.columns, parts, strict=True):
        if isinstance(description, ValueColumn):
            own = value(description.value)
            part.append(Column(own.name, description.label, None, "value", own, covered))
    return [column for part in parts for column in part]


def _covered(columns: Iterable[Column]) -> dict[str, tuple[str, ...]]:
    """Every data set that the columns show, once, by the group it is first shown in."""
    result: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for column in columns:
        for group, datasets in column.members.items():
            new = tuple(d for d in datasets if d not in seen)
            result[group] = result.get(group, ()) + new
            seen.update(new)
    return {group: datasets for group, datasets in result.items() if datasets}


def _metric_columns(
    description: DatasetColumns | GroupColumns | MeanColumn, suite: SuiteInfo, own: Quantity
) -> list[Column]:
    if isinstance(description, DatasetColumns):
        wanted = [description.datasets_of]
    else:
        wanted = (
            description.groups if isinstance(description, GroupColumns) else description.mean_of
        )
    members = _members(wanted, suite, description.optional)
    if not members:
        return []
    kind: Kind = "mean_of_groups" if description.mean == "groups" else "mean_of_tasks"
    suffix = "" if description.metric is None else f" {own.name}"
    if isinstance(description, MeanColumn):
        return [Column(f"mean{suffix}", description.label, None, kind, own, members)]
    block = suite.block(description.block)
    if isinstance(description, DatasetColumns):
        columns = [
            Column(d + suffix, suite.label(d), block, "dataset", own, {g: (d,)})
            for g, ds in members.items()
            for d in ds
        ]
    else:
        columns = [
            Column(g + suffix, _capital(suite.label(g)), block, "mean_of_tasks", own, {g: ds})
            for g, ds in members.items()
        ]
    if description.mean is not None:
        key = f"{description.block or wanted[0]} mean{suffix}"
        columns.append(Column(key, "Mean", block, kind, own, members, visible=True))
    return columns


def _members(groups: Sequence[str], suite: SuiteInfo, optional: bool) -> dict[str, tuple[str, ...]]:
    for group in groups:
        if group not in suite.groups and not optional:
            raise unknown(f"group of suite {suite.name!r}:", group, suite.groups)
    return {g: tuple(suite.groups[g]) for g in groups if suite.groups.get(g)}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def expand_rows(spec: TableSpec, methods: Mapping[str, str]) -> list[Rows]:
    """The enabled ``methods`` (name to label) in the table's order; unnamed ones come last."""
    named: list[str] = []
    result: list[Rows] = []
    for group in spec.rows:
        named += group.methods
        present = tuple((m, methods[m]) for m in group.methods if m in methods)
        if present:
            result.append(Rows(group.group, present))
    twice = sorted({m for m in named if named.count(m) > 1})
    if twice:
        raise UserError(f"The table names {', '.join(twice)} twice; every method is one row.")
    rest = tuple((m, label) for m, label in methods.items() if m not in named)
    if rest and spec.others is not None:
        result.append(Rows(spec.others, rest))
    if not result:
        raise UserError("No enabled method occurs in the table; enable one of its rows.")
    return result
