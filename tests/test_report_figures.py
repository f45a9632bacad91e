"""Figures, and the audit of all published numbers."""

from __future__ import annotations

import shutil

import pytest
from report_support import VTAB, make, record, records

from snella.errors import UserError
from snella.report import tidy
from snella.report.figures import cliques, critical_difference, lr_sweep, sweep
from snella.report.published import audit_texts as texts
from snella.report.published.audit import audit, totals
from snella.report.published.papers import read_table
from snella.report.published.versus import VERDICTS
from snella.report.statistics import table_statistics

TASKS = [task for group in VTAB.values() for task in group]


def test_bars_join_what_lies_within_the_critical_difference():
    assert cliques([1.0, 1.5, 3.0, 3.2, 9.0], 2.0) == [(0, 2), (1, 3)]
    assert cliques([1.0, 5.0, 9.0], 2.0) == []
    assert cliques([1.0, 2.0, 3.0], 9.0) == [(0, 2)]


def test_ranks_are_drawn_the_same_every_time(tmp_path):
    level = {"full": 0.5, "linear": 0.4, "lora-8": 0.6}
    found = table_statistics(make(records(lambda m, d, s: level[m])), "full")
    paths = critical_difference(found, tmp_path / "t_ranks")
    assert [p.name for p in paths] == ["t_ranks.pdf", "t_ranks.png"]
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in critical_difference(found, tmp_path / "t_ranks")] == first
    alone = table_statistics(make(records(methods=["full"]), methods={"full": "Full"}), "full")
    assert len(critical_difference(alone, tmp_path / "none")) == 2  # it says what is missing


def searched():
    """Two rates for two methods; a third, unfinished, for one."""
    runs = []
    for method in ("lora-8", "snella-8"):
        for lr, value in ((1e-3, 0.5), (1e-2, 0.7)):
            for dataset in ("digits", "count"):
                runs.append(record(method, dataset, value, protocol={"lr": lr}))
    runs.append(record("lora-8", "digits", 0.99, protocol={"lr": 1e-1}))
    runs.append(record("lora-8", "count", None, status="diverged", protocol={"lr": 1e-1}))
    return runs


def test_accuracy_over_the_learning_rate(tmp_path):
    table, unit, title = sweep(tidy(searched()))
    assert (unit.symbol, title) == ("%", "Top-1 accuracy")
    rates = table.set_index(["method", "lr"])["value"].to_dict()
    assert rates == pytest.approx(
        {(m, lr): v for m in ("lora-8", "snella-8") for lr, v in ((1e-3, 0.5), (1e-2, 0.7))}
    )
    paths = lr_sweep(tidy(searched()), tmp_path / "lr_sweep", labels={"lora-8": "LoRA-8"})
    assert paths[0].read_bytes().startswith(b"%PDF") and paths[1].stat().st_size > 5_000
    with pytest.raises(UserError, match="two learning rates"):
        lr_sweep(tidy(records()), tmp_path / "x")
    with pytest.raises(UserError, match="No finished runs"):
        lr_sweep(tidy([]), tmp_path / "x")


def published_runs(shift=0.0, seeds=(0, 1, 2)):
    """SNELLA-32 and Bias on VTAB-1k as Table 13 prints them, with a little spread over seeds."""
    cells = {
        (line["label"], line["dataset"]): float(line["value"]) / 100
        for line in read_table("snella", 13)
        if line["dataset"]
    }
    return [
        record(
            method,
            task,
            cells[label, task] + (seed - 1) / 1000 + shift,
            seed,
            suite="vtab1k",
            backbone="vit-b16",
        )
        for method, label in (("snella-32", "SNELLA-32"), ("bias", "Bias"))
        for task in TASKS
        for seed in seeds
    ]


def one(found, **where):
    for name, value in where.items():
        found = found[found[name] == value]
    (row,) = found.to_dict("records")
    return row


def test_every_published_number_has_a_verdict():
    found = audit(tidy(published_runs()))
    assert len(found) == 2466 and set(found["verdict"]) <= set(VERDICTS)
    cell = one(found, source="snella", table=13, row=20, dataset="svhn")
    assert (cell["verdict"], cell["seeds"]) == ("reproduced", 3)
    assert cell["ours"] == pytest.approx(cell["printed"])
    assert cell["command"] == "snella run --method snella-32 --dataset svhn --config suite=vtab1k"
    mean = one(found, source="snella", table=13, row=20, group="mean")
    assert mean["ours"] == pytest.approx(74.9, abs=0.06)
    group = one(found, source="snella", table=1, row=22, suite="vtab1k", group="mean")
    assert group["ours"] == pytest.approx(77.2, abs=0.06)
    # the same runs meet the same number in a companion paper
    assert one(found, source="s2ft", table=1, row=3, dataset="svhn")["verdict"] == "reproduced"
    assert one(found, source="snella", table=1, row=22, dataset="cub")["why"] == "not yet run"
    fixed = one(found, source="snella", table=17, row=1, dataset="cub")
    assert (fixed["verdict"], fixed["method"]) == ("open", "snell-32-fixed-linear")
    ablation = one(found, source="snella", table=11, row=1, dataset="sun397")
    assert ablation["verdict"] == "open"
    assert "--method snella-32-budget-0.01 --dataset sun397" in ablation["command"]


def test_a_number_beyond_noise_is_explained_or_refuted():
    found = audit(tidy(published_runs(shift=-0.05)))
    cell = one(found, source="snella", table=13, row=20, dataset="svhn")
    assert cell["verdict"] == "explained" and "best-test" in cell["why"]
    runs = published_runs(shift=-0.05)
    for run in runs:
        run["protocol"] |= {
            "selection": "best-test",
            "normalisation": "imagenet",
            "schedule": "released",
            "epochs": 100,
            "drop_path": 0.1,
            "hyperparameters": "released",
        }
        run["metrics"]["best-test"] = run["metrics"].pop("last")
    found = audit(tidy(runs))
    cell = one(found, source="snella", table=13, row=20, dataset="svhn")
    assert cell["verdict"] == "refuted" and "no known difference" in cell["why"]


def test_the_audit_is_written_in_every_format(tmp_path):
    paths = texts.write(tidy(published_runs()), tmp_path)
    names = {p.name for p in paths}
    assert {"audit.csv", "audit.md", "audit.html", "audit.tex"} <= names
    assert ("audit.pdf" in names) == (shutil.which("pdflatex") is not None)
    text = (tmp_path / "audit.md").read_text()
    assert text.splitlines()[2].startswith("2466 published numbers: ")
    page = (tmp_path / "audit.html").read_text()
    assert page.count("<tr data-verdict=") == 2466 and "http" not in page.split("<body>")[1]
    assert "<!--" not in page.replace("<!doctype", "")
    again = tmp_path / "again"
    texts.write(tidy(published_runs()), again)
    assert (again / "audit.html").read_bytes() == (tmp_path / "audit.html").read_bytes()


def test_without_runs_everything_is_open():
    found = audit(tidy([]))
    assert set(found["verdict"]) == {"open"}
    counted = totals(found)
    assert int(counted["numbers"].sum()) == int(counted["open"].sum()) == 2466
