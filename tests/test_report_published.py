"""Our numbers beside the published ones."""

from __future__ import annotations

import csv
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from report_support import FGVC, METHODS, PAPER, QUICK, REAL, VTAB, records, spec

from snella.errors import UserError
from snella.report import parse_spec, write_table
from snella.report.published import read_table
from snella.report.tables import build_table
from snella.report.versus import compare_published

TABLES = Path(__file__).parent.parent / "config" / "tables"
TASKS = [task for group in VTAB.values() for task in group]
SAME = {"selection": "best-test", "normalisation": "imagenet", "schedule": "released"}
ROWS = {
    label.lower(): label
    for label in ("Full", "Bias", "LoRA-8", "LoRA-16", "SNELL-8", "SNELLA-8", "SNELLA-32")
}
# the paper's own tables disagree here: Table 13 repeats another paper's cells
DISAGREE = {("lora-8", "structured"), ("lora-8", "VTAB-1k mean")}


def shipped(name):
    return parse_spec(name, yaml.safe_load((TABLES / f"{name}.yaml").read_text())[name])


def printed(number):
    return {
        (line["label"], line["dataset"]): float(line["value"]) / 100
        for line in read_table("snella", number)
        if line["dataset"]
    }


def as_if_published():
    """Records that hold exactly the paper's cells: FGVC of Table 1, VTAB-1k of Table 13."""
    cells = printed(1) | printed(13)
    runs = records(
        lambda m, d, s: cells[ROWS[m], d], ROWS, [*FGVC, *TASKS], suite="paper", protocol=SAME
    )
    for run in runs:
        run["metrics"]["best-test"] = run["metrics"].pop("last")
    return runs


def test_all_numbers_of_the_package_are_there():
    tables = [f for f in (files("snella.report") / "published").iterdir() if f.name.endswith("csv")]
    lines = [line for f in tables for line in csv.DictReader(f.read_text().splitlines())]
    assert (len(tables), len(lines)) == (35, 2466)
    assert all(float(line["value"]) >= 0 for line in lines)


def test_the_papers_cells_give_the_papers_table():
    versus = compare_published(build_table("t", shipped("table1"), PAPER, ROWS, as_if_published()))
    assert len(versus.pairs) == len(ROWS) * 10
    for (method, column), pair in versus.pairs.items():
        if (method, column) not in DISAGREE:
            assert abs(pair.difference) < 0.06, (method, column)
    assert not [r for r in versus.remarks if r.startswith("Mismatch")]


def test_the_mean_of_table_13_is_over_tasks():
    versus = compare_published(build_table("t", shipped("table13"), PAPER, ROWS, as_if_published()))
    assert abs(versus.pairs["snella-32", "mean"].difference) < 0.06
    assert versus.pairs["snella-32", "mean"].published.value == 74.9


def test_means_of_different_kinds_are_never_compared():
    data = yaml.safe_load((TABLES / "table1.yaml").read_text())["table1"]
    data["columns"][2]["mean"] = "tasks"
    table = build_table("t", parse_spec("table1", data), PAPER, ROWS, as_if_published())
    pair = compare_published(table).pairs["snella-32", "VTAB-1k mean"]
    assert pair.published is None
    assert pair.note == "the published mean is over groups, ours over tasks"


def test_a_mean_over_other_tasks_has_no_published_counterpart():
    suite = replace(PAPER, groups={**PAPER.groups, "natural": VTAB["natural"][:6]})
    table = build_table("t", shipped("table1"), suite, ROWS, as_if_published())
    columns = [c.key for c in compare_published(table).columns]
    assert "natural" not in columns and "VTAB-1k mean" not in columns and "cub" in columns


def test_every_difference_of_protocol_is_noted(tmp_path):
    runs = records(0.5, ["full", "mine"], [*FGVC, *TASKS], seeds=[0, 1], suite="paper")
    methods = {"full": "Full", "mine": "Mine"}
    paths = write_table(shipped("table1"), PAPER, methods, runs, tmp_path, "t")
    names = {f"t_vs_published.{kind}" for kind in ("csv", "md", "tex")}
    assert names <= {p.name for p in paths}
    text = (tmp_path / "t_vs_published.md").read_text()
    for word in ("best-test", "ours: last", "ImageNet mean", "of 1 seed; ours: 2", "JPEG", "EMA"):
        assert word in text
    assert "50.0 ± 0.0" in text and "87.3 (−37.3)" in text
    assert "not in the published table" in text
    rows = list(csv.DictReader((tmp_path / "t_vs_published.csv").open()))
    full = next(r for r in rows if (r["method"], r["column"]) == ("full", "cub"))
    assert float(full["difference"]) == pytest.approx(-37.3)
    assert full["published_label"] == "Full"


def test_a_demo_or_foreign_suite_is_never_compared():
    source = {"source": "snella", "table": 1}
    for suite in (QUICK, REAL):
        table = build_table("t", spec(published=source), suite, METHODS, [])
        assert compare_published(table) is None
    demo = build_table("t", shipped("table1"), replace(PAPER, demo=True), ROWS, [])
    assert compare_published(demo) is None


def test_printed_rows_can_be_named_and_must_exist():
    data = yaml.safe_load((TABLES / "table1.yaml").read_text())["table1"]
    data["published"]["rows"] = {"mine": "SNELLA-8"}
    table = build_table("t", parse_spec("table1", data), PAPER, {"mine": "Mine"}, [])
    assert compare_published(table).pairs["mine", "cub"].published.value == 89.8
    data["published"]["rows"] = {"mine": "SNELA-8"}
    table = build_table("t", parse_spec("table1", data), PAPER, {"mine": "Mine"}, [])
    with pytest.raises(UserError, match="Did you mean 'SNELLA-8'"):
        compare_published(table)


def test_unknown_tables_and_ambiguous_rows_are_reported():
    with pytest.raises(UserError, match=r"snella_table14\.csv"):
        read_table("snella", 14)
    data = yaml.safe_load((TABLES / "table1.yaml").read_text())["table1"]
    data["published"]["table"] = 2
    table = build_table("t", parse_spec("table1", data), PAPER, ROWS, [])
    with pytest.raises(UserError, match=r"more than once; name `backbone` and `pretraining`"):
        compare_published(table)
    data["published"]["pretraining"] = "mae_in1k"
    table = build_table("t", parse_spec("table1", data), PAPER, ROWS, [])
    assert compare_published(table).pairs["snella-8", "natural"].published.value == 69.2
