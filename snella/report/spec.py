"""The description of a table as data: rows, columns, metric, mean convention, published source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from snella.errors import UserError
from snella.validation import validate

MeanKind = Literal["tasks", "groups"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowGroup(_Strict):
    """Methods under a common header line (none: a rule only), in printed order."""

    group: str | None = None
    methods: list[str] = Field(min_length=1)


class ValueColumn(_Strict):
    """A cost or parameter count, mean over the table's data sets. ``{unit}`` fits the numbers."""

    value: str
    label: str


class _MetricColumns(_Strict):
    """``metric`` overrides the table's; ``optional`` drops the groups that the suite lacks."""

    metric: str | None = None
    optional: bool = False


class DatasetColumns(_MetricColumns):
    """One column per data set of a group, and their mean."""

    block: str | None = None
    datasets_of: str
    mean: Literal["tasks"] | None = None


class GroupColumns(_MetricColumns):
    """One column per group (the mean over its tasks), and the mean over groups or tasks."""

    block: str | None = None
    groups: list[str] = Field(min_length=1)
    mean: MeanKind | None = None


class MeanColumn(_MetricColumns):
    """One mean over several groups, standing alone."""

    label: str
    mean_of: list[str] = Field(min_length=1)
    mean: MeanKind


class PublishedTable(_Strict):
    """The printed table to compare with; ``rows`` maps a method to a printed label."""

    source: str
    table: int
    backbone: str | None = None
    pretraining: str | None = None
    rows: dict[str, str] = {}


Columns = ValueColumn | DatasetColumns | GroupColumns | MeanColumn

COLUMN_KINDS: dict[str, type[BaseModel]] = {
    "value": ValueColumn,
    "datasets_of": DatasetColumns,
    "groups": GroupColumns,
    "mean_of": MeanColumn,
}


class TableSpec(_Strict):
    """One table.

    ``caption`` is plain text and may name {suite}, {backbone}, {protocol}, {metric}.
    Enabled methods that no row names follow under the header ``others`` (null: left out).
    ``mixed="note"`` prints a table of records made under differing protocols, with a note,
    instead of refusing it. ``reference`` asks for the paired comparison with that row.
    """

    caption: str
    metric: str = "top1"
    rows: list[RowGroup]
    columns: list[Columns] = Field(min_length=1)
    published: PublishedTable | None = None
    others: str | None = "Further methods"
    mixed: Literal["refuse", "note"] = "refuse"
    reference: str | None = None
    rotate: bool = False


def parse_spec(name: str, data: Mapping[str, Any]) -> TableSpec:
    """Validate the table ``name``; raises UserError that names the place and the closest key."""
    columns = data.get("columns")
    if not isinstance(columns, list):
        return validate(TableSpec, dict(data), f"table {name}")
    typed = [_column(c, f"table {name}, column {i}") for i, c in enumerate(columns, 1)]
    return validate(TableSpec, {**data, "columns": typed}, f"table {name}")


def _column(data: Any, where: str) -> BaseModel:
    kinds = [key for key in COLUMN_KINDS if isinstance(data, Mapping) and key in data]
    if len(kinds) != 1:
        raise UserError(f"{where}: give exactly one of {', '.join(COLUMN_KINDS)}.")
    return validate(COLUMN_KINDS[kinds[0]], dict(data), where)
