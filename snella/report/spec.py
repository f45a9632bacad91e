"""The description of a table as data: rows, columns, metrics, mean convention, published source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

from pydantic import BaseModel, Field

from snella.errors import UserError
from snella.validation import Strict, validate

MeanKind = Literal["tasks", "groups"]
CONSTANT = "= "
CAPTION_NAMES = ("suite", "backbone", "protocol", "metric")
"""What a caption may have in braces."""
Spread = Literal["seeds", "images", "datasets"]


class RowGroup(Strict):
    """Methods under a common header line (none: a rule only), in printed order.

    ``reference`` rows (full fine-tuning) stand apart and are not ranked; ``own`` rows are the
    ones the table is about, and are set off by a rule.
    """

    group: str | None = None
    methods: list[str] = Field(min_length=1)
    reference: bool = False
    own: bool = False


class ConstantRow(Strict):
    """A row of no method: numbers about the data that every record carries beside its own.

    ``metrics`` maps a metric of the table to the record's metric that is printed in its column.
    """

    label: str
    metrics: dict[str, str] = Field(min_length=1)

    @property
    def name(self) -> str:
        """What stands in a method's place; no method can be called so."""
        return f"{CONSTANT}{self.label}"


class ValueColumn(Strict):
    """A cost or parameter count, mean over the table's data sets. ``{unit}`` fits the numbers."""

    value: str
    label: str
    suite: str | None = None


class _MetricColumns(Strict):
    """``metric`` overrides the table's; a list makes a block of columns for each.

    ``suite`` takes the numbers of another suite (another backbone, say) than the configured
    one; ``optional`` drops groups and suites that the configuration lacks.
    """

    metric: str | list[str] | None = None
    optional: bool = False
    suite: str | None = None
    block: str | None = None


class DatasetColumns(_MetricColumns):
    """One column per data set of a group, and their mean."""

    datasets_of: str
    mean: Literal["tasks"] | None = None


class SubsetColumns(_MetricColumns):
    """One column per group of a record (subject, test set), and their mean."""

    subsets_of: str
    mean: Literal["tasks"] | None = None


class GroupColumns(_MetricColumns):
    """One column per group (the mean over its tasks), and the mean over groups, tasks, or both."""

    groups: list[str] = Field(min_length=1)
    mean: MeanKind | Literal["both"] | None = None


class MeanColumn(_MetricColumns):
    """A mean over several groups, standing alone; ``both`` gives one of each kind."""

    label: str
    mean_of: list[str] = Field(min_length=1)
    mean: MeanKind | Literal["both"]


class PublishedTable(Strict):
    """The printed table to compare with; its rows are found by what the methods are."""

    source: str
    table: int
    backbone: str | None = None
    pretraining: str | None = None


MetricColumns = DatasetColumns | SubsetColumns | GroupColumns | MeanColumn
Columns = ValueColumn | MetricColumns

COLUMN_KINDS: dict[str, type[BaseModel]] = {
    "value": ValueColumn,
    "datasets_of": DatasetColumns,
    "subsets_of": SubsetColumns,
    "groups": GroupColumns,
    "mean_of": MeanColumn,
}


class TableSpec(Strict):
    """One table.

    ``caption`` is plain text and may name {suite}, {backbone}, {protocol}, {metric}.
    ``metric`` is the records' primary one by default. Enabled methods that no row names follow
    under the header ``others`` (null: left out). ``mixed="note"`` prints a table of records
    made under differing protocols, with a note, instead of refusing it. ``spread`` says what
    follows the ±: the standard deviation over seeds, the standard error over test images, or
    in a mean the standard deviation over its data sets.
    ``constants`` are rows before all others that no method made. ``reference`` asks for the paired
    comparison with that row. ``task`` is the family whose suite the table shows.
    """

    caption: str
    metric: str | None = None
    rows: list[RowGroup]
    columns: list[Columns] = Field(min_length=1)
    constants: list[ConstantRow] = []
    published: PublishedTable | None = None
    others: str | None = "Further methods"
    mixed: Literal["refuse", "note"] = "refuse"
    spread: Spread = "seeds"
    reference: str | None = None
    rotate: bool = False
    task: str = "classification"

    @property
    def suites(self) -> list[str]:
        """The suites that columns name beside the configured one."""
        return list(dict.fromkeys(c.suite for c in self.columns if c.suite is not None))

    @property
    def subsets(self) -> bool:
        """Whether the table needs the numbers of the records' groups."""
        return any(isinstance(c, SubsetColumns) for c in self.columns)


def parse_spec(name: str, data: Mapping[str, Any]) -> TableSpec:
    """Validate the table ``name``; raises UserError that names the place and the closest key."""
    columns = data.get("columns")
    _check_caption(name, data.get("caption"))
    if not isinstance(columns, list):
        return validate(TableSpec, dict(data), f"table {name}")
    typed = [_column(c, f"table {name}, column {i}") for i, c in enumerate(columns, 1)]
    return validate(TableSpec, {**data, "columns": typed}, f"table {name}")


def _check_caption(name: str, caption: Any) -> None:
    """Placeholders of a caption are known names, plain ones: "{suite:>9999999}" is none."""
    try:
        parts = list(Formatter().parse(caption)) if isinstance(caption, str) else []
        wrong = next((p for _, p, how, as_ in parts if p is not None
                      and (p not in CAPTION_NAMES or how or as_)), None)  # fmt: skip
    except ValueError as error:
        wrong = str(error)
    if wrong is not None:
        names = ", ".join(f"{{{known}}}" for known in CAPTION_NAMES)
        raise UserError(
            f"Table {name}: the caption's placeholder {wrong!r} is unknown; use {names} (and {{{{ "
            "for a brace)."
        )


def _column(data: Any, where: str) -> BaseModel:
    kinds = [key for key in COLUMN_KINDS if isinstance(data, Mapping) and key in data]
    if len(kinds) != 1:
        raise UserError(f"{where}: give exactly one of {', '.join(COLUMN_KINDS)}.")
    return validate(COLUMN_KINDS[kinds[0]], dict(data), where)


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
    backbone: str = ""

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
