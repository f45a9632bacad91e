"""From records to cells: means, spread, failures and what may share a table."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_support import DATASETS, METHODS, REAL, record, records, spec

from snella.errors import UserError
from snella.report import Missing
from snella.report.tables import DASH, build_table

FRACTION = st.floats(0, 1)


def build(runs, **changes):
    suite = changes.pop("suite", REAL)
    selection = changes.pop("selection", None)
    methods = changes.pop("methods", METHODS)
    return build_table("table1", spec(**changes), suite, methods, runs, selection)


@given(st.lists(FRACTION, min_size=10, max_size=10))
def test_means_are_the_ones_computed_by_hand(numbers):
    score = {(d, s): numbers[2 * i + s] for i, d in enumerate(DATASETS) for s in (0, 1)}
    table = build(records(lambda m, d, s: score[d, s], ["full"], seeds=[0, 1]))
    natural = [(score["digits", s] + score["photos", s]) / 2 for s in (0, 1)]
    by_hand = {
        "beetles": [score["beetles", s] for s in (0, 1)],
        "FGVC mean": [(score["beetles", s] + score["leaves", s]) / 2 for s in (0, 1)],
        "natural": natural,
        "VTAB-1k mean": [(natural[s] + score["count", s]) / 2 for s in (0, 1)],
    }
    for key, values in by_hand.items():
        cell = table.cells["full", key]
        assert cell.mean == pytest.approx(100 * statistics.mean(values), abs=1e-9)
        assert cell.std == pytest.approx(100 * statistics.stdev(values), abs=1e-9)


def test_mean_over_tasks_weighs_tasks_and_over_groups_weighs_groups():
    runs = records(lambda m, d, s: {"digits": 0.9, "photos": 0.9, "count": 0.3}.get(d, 0))
    for kind, expected in (("tasks", 70.0), ("groups", 60.0)):
        columns = [{"label": "Mean", "mean_of": ["natural", "structured"], "mean": kind}]
        assert build(runs, columns=columns).cells["full", "mean"].mean == pytest.approx(expected)


@given(st.sets(st.sampled_from(DATASETS), min_size=1))
def test_an_empty_cell_never_enters_a_mean(lost):
    runs = [
        Missing("full", r["run"]["dataset"], 0)
        if r["run"]["method"] == "full" and r["run"]["dataset"] in lost
        else r
        for r in records()
    ]
    table = build(runs)
    for column in table.columns:
        covered = {d for ds in column.members.values() for d in ds}
        cell = table.cells["full", column.key]
        assert (cell.mean is None) == bool(covered & lost)
        assert (cell.text == DASH) == bool(cell.note) == (cell.mean is None)
        assert table.cells["linear", column.key].mean is not None


@pytest.mark.parametrize(
    ("status", "reason", "said"),
    [
        ("diverged", "loss became NaN in epoch 3", "diverged: loss became NaN in epoch 3"),
        ("oom", None, "out of memory"),
        ("timeout", "6 h", "time limit reached: 6 h"),
        ("failed", "two\nlines", "failed: two lines"),
    ],
)
def test_a_failure_is_a_reason_not_a_number(status, reason, said):
    runs = [*records(datasets=["leaves", "digits", "photos", "count"])]
    runs += [record(m, "beetles", 0.1, status=status, reason=reason) for m in METHODS]
    cell = build(runs).cells["full", "beetles"]
    assert (cell.mean, cell.note) == (None, said)


def test_a_run_without_file_and_without_mention_is_not_run():
    table = build(records(datasets=DATASETS[1:]))
    assert table.cells["full", "beetles"].note == "not run"
    assert table.cells["full", "FGVC mean"].note == "a member of this mean is missing"
    assert build([]).cells["full", "beetles"].note == "not run"


def test_a_group_column_lists_the_data_sets_that_hold_it_up():
    table = build(records(datasets=["beetles"]))
    assert table.cells["full", "natural"].note == "digits, photos: not run"


def test_one_failed_seed_blocks_the_cell_but_one_pending_seed_only_narrows_it():
    runs = records(seeds=[0, 1, 2])
    failed = [r for r in runs if not _is(r, "beetles", 1)]
    failed += [record(m, "beetles", None, 1, status="diverged", reason="NaN") for m in METHODS]
    assert build(failed).cells["full", "beetles"].note == "seed 1 diverged: NaN"
    pending = build([r for r in runs if not _is(r, "beetles", 1)])
    cell = pending.cells["full", "beetles"]
    assert (len(cell.values), cell.note) == (2, "2 of 3 seeds (seed 1 not run)")
    assert sorted(pending.cells["full", "FGVC mean"].values) == [0, 2]


def _is(run, dataset, seed):
    return run["run"]["dataset"] == dataset and run["run"]["seed"] == seed


def test_a_number_that_is_not_finite_is_no_number():
    runs = records(lambda m, d, s: float("nan") if d == "beetles" else 0.5)
    assert "finite" in build(runs).cells["full", "beetles"].note


def test_parameters_survive_a_failed_run_and_costs_do_not():
    columns = [
        {"label": "Params ({unit})", "value": "trainable"},
        {"label": "Time ({unit})", "value": "train_seconds"},
        {"datasets_of": "fgvc"},
    ]
    table = build(records(status="diverged", reason="NaN"), columns=columns)
    assert table.cells["full", "trainable"].text == "12.3"
    assert table.label(table.columns[0]) == "Params (k)"
    assert table.cells["full", "train_seconds"].mean is None


def test_another_selection_can_be_shown_from_the_same_records():
    runs = records()
    for run in runs:
        run["metrics"]["best-test"] = {"epoch": 3, "top1": 0.6}
    table = build(runs, selection="best-test")
    assert table.cells["full", "beetles"].mean == pytest.approx(60)
    assert "chosen on the test set" in table.caption
    assert "no 'val' selection" in build(runs, selection="val").cells["full", "beetles"].note


def test_records_that_differ_may_not_share_a_table():
    odd = {"normalisation": "imagenet"}
    runs = [*records(methods=["full"]), *records(methods=["linear"], protocol=odd)]
    with pytest.raises(UserError, match=r"normalisation.*imagenet \(linear\).*mixed: note"):
        build(runs)
    assert any("in normalisation: imagenet" in note for note in build(runs, mixed="note").remarks)
    tuned = [*records(methods=["full"]), *records(methods=["linear"], protocol={"lr": 0.1})]
    build(tuned)
    for changes, name in (({"backbone": "b"}, "backbone"), ({"suite": "s"}, "suite")):
        with pytest.raises(UserError, match=f"differ in {name}"):
            build([*records(methods=["full"]), *records(methods=["linear"], **changes)])
    with pytest.raises(UserError, match="selection"):
        build(
            [
                *records(methods=["full"]),
                *records(methods=["linear"], protocol={"selection": "val"}),
            ]
        )


def test_data_sets_may_differ_in_protocol_because_rows_are_compared_within_a_column():
    runs = records(datasets=DATASETS[:2], protocol={"augmentation": "flip"})
    build([*runs, *records(datasets=DATASETS[2:], protocol={"augmentation": "none"})])


def test_a_record_of_another_suite_schema_or_a_second_one_is_refused():
    with pytest.raises(UserError, match="suite 'quick' in a table of suite 'mine'"):
        build(records(suite="quick"))
    with pytest.raises(UserError, match=r"full on beetles, seed 0, has schema 0.*rerun"):
        build(records(schema=0))
    with pytest.raises(UserError, match="Two records of full on beetles, seed 0"):
        build([record("full", "beetles", 0.5), Missing("full", "beetles", 0)])


def test_no_metric_is_special():
    runs = records()
    for run in runs:
        run["metrics"]["last"] = {"mdice": 0.91234, "lpips": 0.2}
        if run["run"]["method"] == "full":
            run["metrics"]["last"]["lpips"] = 0.1
    columns = [
        {"datasets_of": "fgvc", "metric": "mdice"},
        {"datasets_of": "fgvc", "metric": "lpips"},
    ]
    table = build(runs, columns=columns)
    assert table.cells["full", "beetles mdice"].text == "0.9123"
    assert table.cells["full", "beetles lpips"].mark == "best"
    assert table.cells["linear", "beetles lpips"].mark == "second"
