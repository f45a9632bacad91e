"""Rows, columns, ranks, and what a table's description may say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from report_support import METHODS, PAPER, QUICK, REAL, make, records, scored, spec

from snella.errors import UserError
from snella.jobs import tables
from snella.report import SuiteInfo, parse_spec
from snella.report.columns import Metrics, expand_columns, expand_rows
from snella.report.results import check_comparable
from snella.suite import plan
from snella.suite.config import load

COLUMNS = {"table1": 12, "table13": 21, "table2": 10, "s2ft_table1": 22, "sparse_tuning_table2": 6}
TABLES = Path(__file__).parent.parent / "config" / "tables"


def images(rng, accuracy, n=2000):
    return (rng.random(n) < accuracy).astype(float)


def table_of(tmp_path, right, **changes):
    """A table of one data set, where ``right`` maps a method to its (N,) images per seed."""
    runs = [
        scored(tmp_path, m, "beetles", seed_right, s)
        for m, seeds in right.items()
        for s, seed_right in enumerate(seeds)
    ]
    return make(runs, columns=[{"datasets_of": "fgvc"}], **changes)


def marks(table):
    return [table.cells[m, "beetles"].mark for m in METHODS]


def test_bold_is_beyond_noise_and_underlined_within(tmp_path):
    rng = np.random.default_rng(0)
    base = images(rng, 0.7)
    near = base.copy()
    near[:10] = 1 - near[:10]
    far = np.where(rng.random(2000) < 0.2, 0.0, base)
    table = table_of(tmp_path / "a", {"full": [base], "linear": [near], "lora-8": [far]})
    assert marks(table) == ["tied", "tied", ""]
    assert table.compared == {"beetles"} and "Holm" in table.remarks[1]
    table = table_of(tmp_path / "b", {"full": [base], "linear": [far], "lora-8": [far]})
    assert marks(table) == ["best", "", ""]
    assert table.cells["full", "beetles"].error == pytest.approx(
        100 * base.std(ddof=1) / np.sqrt(2000)
    )
    reference = [{"methods": ["full"], "reference": True}, {"methods": ["linear", "lora-8"]}]
    table = table_of(
        tmp_path / "c", {"full": [base], "linear": [near], "lora-8": [far]}, rows=reference
    )
    assert marks(table) == ["", "best", ""] and "Full: reference, not ranked" in table.remarks[1]


def test_nothing_is_marked_where_noise_is_unknown():
    table = make(records(lambda m, d, s: {"full": 0.9, "linear": 0.8, "lora-8": 0.7}[m]))
    assert not any(cell.mark for cell in table.cells.values())
    assert "noise is unknown" in table.remarks[1]


def test_seeds_alone_tell_noise_too():
    level = {"full": 0.9, "linear": 0.8, "lora-8": 0.7}
    steady = make(records(lambda m, d, s: level[m] + s / 1000, seeds=[0, 1, 2]))
    assert steady.cells["full", "beetles"].mark == "best"
    shaken = make(records(lambda m, d, s: level[m] + (s - 1) * len(m) / 10, seeds=[0, 1, 2]))
    assert shaken.cells["full", "beetles"].mark == "tied"


def test_lower_may_be_better(tmp_path):
    info = [{"name": "top1", "title": "Error", "unit": "", "higher_is_better": False}]
    level = {"full": 0.9, "linear": 0.8, "lora-8": 0.7}
    runs = records(lambda m, d, s: level[m] + s / 1000, seeds=[0, 1, 2], metric_info=info)
    table = make(runs)
    assert table.cells["lora-8", "beetles"].mark == "best"


def test_a_mean_over_data_sets_adds_their_noise(tmp_path):
    rng = np.random.default_rng(1)
    runs = []
    for dataset in ("beetles", "leaves"):
        base = images(rng, 0.7)
        worse = np.where(rng.random(2000) < 0.012, 0.0, base)
        runs += [scored(tmp_path, "full", dataset, base)]
        runs += [scored(tmp_path, m, dataset, worse) for m in ("linear", "lora-8")]
    table = make(runs, columns=[{"block": "B", "datasets_of": "fgvc", "mean": "tasks"}])
    assert table.cells["full", "B mean"].mark == "best"
    spread = make(runs, columns=[{"datasets_of": "fgvc"}], spread="images")
    assert spread.cells["full", "beetles"].spread == "1.0"


def test_rows_are_the_enabled_methods_and_unnamed_ones_come_last():
    methods = {"mine": "My method", "lora-8": "LoRA-8", "full": "Full"}
    rows = expand_rows(spec(), methods)
    assert [(r.group, r.methods) for r in rows] == [
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
    assert columns[0].datasets == ["beetles", "leaves", "digits", "photos", "count"]


def test_a_group_that_the_suite_lacks_is_an_error_unless_optional():
    columns = [{"datasets_of": "fgvc"}, {"datasets_of": "natrual"}]
    with pytest.raises(UserError, match=r"'natrual'\. Did you mean 'natural'"):
        expand_columns(spec(columns=columns), REAL)
    columns[1]["optional"] = True
    assert len(expand_columns(spec(columns=columns), REAL)) == 2
    own = SuiteInfo("s", "S", {"pets": ["cats"]})
    with pytest.raises(UserError, match=r"groups natrual, and .* only pets"):
        expand_columns(spec(columns=columns[1:]), own)


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
        make(records(), metric="top-1")
    columns = [{"value": "trainabel", "label": "P"}, {"datasets_of": "fgvc"}]
    with pytest.raises(UserError, match="'trainable'"):
        expand_columns(spec(columns=columns), REAL)
    for caption, wrong in (("{sweet}", "sweet"), ("{suite:>99999999999}", "suite"), ("{}", "")):
        with pytest.raises(UserError, match=rf"'{wrong}' is unknown; use {{suite}}"):
            spec(caption=caption)
    with pytest.raises(UserError, match=r"expected '}'"):
        spec(caption="{suite")


OTHER_TASKS = {
    "segmentation": {"polyp_seg": ["kvasir-seg"]},
    "generation": {"objects": ["dreambooth-can"], "live": ["dreambooth-cat"]},
}


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_tables_fit_the_papers_suite(path):
    for name, data in yaml.safe_load(path.read_text()).items():
        described = parse_spec(name, data)
        suite = replace(PAPER, groups=OTHER_TASKS.get(described.task, PAPER.groups))
        groups = {**suite.groups, "four": ["sun397", "clevr_count"]}  # of suite vtab1k-four
        others = {s: replace(PAPER, name=s, groups=groups) for s in described.suites}
        columns = expand_columns(described, suite, Metrics(), others)
        assert len(columns) == COLUMNS.get(name, len(columns))


def test_rows_of_no_method_and_spread_over_data_sets():
    """A constant row prints another metric of any record; the deviation is over data sets."""
    found = records(lambda method, dataset, seed: 0.6 if dataset == "photos" else 0.5)
    for record in found:
        for metrics in record["metrics"].values():
            metrics["ceiling"] = 0.9
    constants = [{"label": "Ceiling", "metrics": {"top1": "ceiling"}}]
    columns = [{"label": "Mean", "mean_of": ["natural"], "mean": "tasks"},
               {"label": "P", "value": "trainable"}]  # fmt: skip
    table = make(found, columns=columns, constants=constants, spread="datasets", reference=None)
    (key, value) = (column.key for column in table.columns)
    cell = table.cells["= Ceiling", key]
    assert (cell.text, cell.spread, cell.mark) == ("90.0", "0.0", "")
    assert table.cells["= Ceiling", value].mean is None
    assert not table.cells["= Ceiling", value].note
    assert table.rows[0].methods == ["= Ceiling"] and table.labels["= Ceiling"] == "Ceiling"
    assert "= Ceiling" not in table.methods
    assert "standard deviation over data sets" in table.remarks[0]
    assert any(float(c.spread) > 0 for (m, k), c in table.cells.items()
               if k == key and m != "= Ceiling")  # fmt: skip


def test_columns_of_which_the_same_is_said_share_a_sentence():
    mean = {"mean_of": ["natural"], "mean": "tasks"}
    table = make(records(), columns=[{"label": "A", **mean}, {"label": "B", **mean}])
    assert "A, B: over the 2 data sets." in table.remarks


@pytest.mark.parametrize("suite", list(load().suites))
def test_every_shipped_table_takes_the_runs_that_its_suite_plans(suite):
    """No table refuses, when all runs are done, what the configuration itself asked for."""
    config = plan.with_suite(load(), suite)
    task = plan.suite_task(config)
    checked = []
    for name, table in config.tables.items():
        if table.get("task", "classification") != task:
            continue
        try:
            runs = tables.table_runs(config, name)
        except UserError:  # a table of groups that the suite does not have
            continue
        if not runs:  # a table of other rows
            continue
        checked.append(name)
        fields = [
            {"suite": run.suite, "method": run.method.name, "dataset": run.dataset.name}
            | {"backbone": run.backbone.name}
            | {f"protocol.{k}": str(v) for k, v in run.protocol.model_dump().items()}
            | {f"protocol.{k}": str(v) for k, v in run.settings.items()}
            for run in runs
            if run.seed == runs[0].seed
        ]
        for _, part in pd.DataFrame(fields).groupby("suite"):
            check_comparable(part, parse_spec(name, table).mixed)
    assert checked
