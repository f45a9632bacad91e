"""Rows, columns, ranks, and what a table's description may say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from report_support import METHODS, PAPER, QUICK, REAL, records, spec

from snella.errors import UserError
from snella.report import SuiteInfo, parse_spec
from snella.report.layout import expand_columns, expand_rows
from snella.report.tables import build_table, rank

TABLES = Path(__file__).parent.parent / "config" / "tables"


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=3, max_size=3),
    st.sampled_from(["top1", "lpips"]),
)
def test_marks_follow_the_printed_number(values, metric):
    scores = dict(zip(METHODS, values, strict=True))
    runs = records(0.5)
    for run in runs:
        value = scores[run["run"]["method"]]
        run["metrics"] = {"last": {} if value is None else {metric: value}}
    table = build_table("t", spec(metric=metric), REAL, METHODS, runs)
    for column in table.columns:
        cells = [table.cells[m, column.key] for m in METHODS]
        printed = sorted({float(c.text) for c in cells if c.mean is not None})
        printed = printed[::-1] if metric == "top1" else printed
        for cell in cells:
            expected = ""
            if column.ranked and cell.mean is not None and sum(v is not None for v in values) > 1:
                place = printed.index(float(cell.text))
                expected = ("best", "second", "")[min(place, 2)]
            assert cell.mark == expected


def test_equal_print_is_equal_rank():
    table = build_table(
        "t",
        spec(),
        REAL,
        METHODS,
        records(lambda m, d, s: {"full": 0.90004, "linear": 0.90001, "lora-8": 0.8}[m]),
    )
    assert [table.cells[m, "beetles"].mark for m in METHODS] == ["best", "best", "second"]
    assert rank({}, True) == {}


def test_rows_are_the_enabled_methods_and_unnamed_ones_come_last():
    methods = {"mine": "My method", "lora-8": "LoRA-8", "full": "Full"}
    rows = expand_rows(spec(), methods)
    assert [(r.title, [m for m, _ in r.methods]) for r in rows] == [
        (None, ["full"]),
        ("Others", ["lora-8"]),
        ("Further methods", ["mine"]),
    ]
    assert len(expand_rows(spec(others=None), methods)) == 2
    with pytest.raises(UserError, match="No enabled method"):
        expand_rows(spec(others=None), {"mine": "My method"})
    twice = [{"methods": ["full"]}, {"methods": ["full", "linear"]}]
    with pytest.raises(UserError, match="names full twice"):
        expand_rows(spec(rows=twice), METHODS)


def test_columns_follow_the_suite():
    columns = expand_columns(spec(), QUICK)
    assert [c.label for c in columns] == [
        "Params ({unit})",
        "beetles",
        "leaves",
        "Mean",
        "Natural",
        "Structured",
        "Mean",
    ]
    assert columns[1].block == "FGVC-like"
    assert expand_columns(spec(), REAL)[1].block == "FGVC"
    assert columns[0].members == {
        "fgvc": ("beetles", "leaves"),
        "natural": ("digits", "photos"),
        "structured": ("count",),
    }


def test_a_group_that_the_suite_lacks_is_an_error_unless_optional():
    columns = [{"datasets_of": "fgvc"}, {"datasets_of": "natrual"}]
    with pytest.raises(UserError, match=r"'natrual'\. Did you mean 'natural'"):
        expand_columns(spec(columns=columns), REAL)
    columns[1]["optional"] = True
    assert len(expand_columns(spec(columns=columns), REAL)) == 2
    empty = SuiteInfo("s", "S", {})
    with pytest.raises(UserError, match="none of the groups"):
        expand_columns(spec(columns=columns[1:]), empty)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"captoin": "x"}, "'captoin'. Did you mean 'caption'"),
        ({"columns": [{"datasets_of": "fgvc", "maen": "tasks"}]}, "column 1.*'maen'.*'mean'"),
        ({"columns": [{"label": "x"}]}, "column 1: give exactly one of value, datasets_of"),
        ({"columns": [{"datasets_of": "fgvc", "mean": "groups"}]}, "mean"),
        ({"rows": [{"method": ["full"]}]}, "methods"),
        ({"columns": 3}, "columns"),
    ],
)
def test_a_mistaken_description_is_one_clear_line(changes, said):
    with pytest.raises(UserError, match=said) as error:
        spec(**changes)
    assert "\n" not in str(error.value)


def test_unknown_names_in_a_description():
    with pytest.raises(UserError, match=r"Unknown metric 'top-1'\. Did you mean 'top1'"):
        expand_columns(spec(metric="top-1"), REAL)
    columns = [{"value": "trainabel", "label": "P"}, {"datasets_of": "fgvc"}]
    with pytest.raises(UserError, match="'trainable'"):
        expand_columns(spec(columns=columns), REAL)
    table = build_table("t", spec(caption="{sweet}"), REAL, METHODS, records())
    with pytest.raises(UserError, match=r"'sweet' is unknown; use {suite}"):
        _ = table.caption


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_tables_fit_the_papers_suite(path):
    for name, data in yaml.safe_load(path.read_text()).items():
        columns = expand_columns(parse_spec(name, data), PAPER)
        assert len(columns) == {"table1": 11, "table13": 20}.get(name, len(columns))
