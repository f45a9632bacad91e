"""From records to cells: means, spread, failures and what may share a table."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_support import DATASETS, GROUPS, METHODS, REAL, TOP1, make, record, records, spec

from snella.errors import UserError
from snella.report import Missing, SuiteInfo, build_table, tidy
from snella.report.table import DASH

FRACTION = st.floats(0, 1)


@settings(max_examples=20, deadline=None)
@given(st.lists(FRACTION, min_size=10, max_size=10))
def test_means_are_the_ones_computed_by_hand(numbers):
    score = {(d, s): numbers[2 * i + s] for i, d in enumerate(DATASETS) for s in (0, 1)}
    table = make(records(lambda m, d, s: score[d, s], ["full"], seeds=[0, 1]))
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
        assert make(runs, columns=columns).cells["full", "mean"].mean == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.sampled_from(DATASETS), min_size=1))
def test_an_empty_cell_never_enters_a_mean(lost):
    runs = [
        Missing("full", r["run"]["dataset"], 0, "mine")
        if r["run"]["method"] == "full" and r["run"]["dataset"] in lost
        else r
        for r in records()
    ]
    table = make(runs)
    for column in table.columns:
        covered = set(column.datasets)
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
    cell = make(runs).cells["full", "beetles"]
    assert (cell.mean, cell.note) == (None, said)


def test_a_run_without_file_and_without_mention_is_not_run():
    table = make(records(datasets=DATASETS[1:]))
    assert table.cells["full", "beetles"].note == "not run"
    assert table.cells["full", "FGVC mean"].note == "a member of this mean is missing"
    assert make([]).cells["full", "beetles"].note == "not run"


def test_a_group_column_lists_the_data_sets_that_hold_it_up():
    table = make(records(datasets=["beetles"]))
    assert table.cells["full", "natural"].note == "digits, photos: not run"


def test_one_failed_seed_blocks_the_cell_but_one_pending_seed_only_narrows_it():
    runs = records(seeds=[0, 1, 2])
    failed = [r for r in runs if not _is(r, "beetles", 1)]
    failed += [record(m, "beetles", None, 1, status="diverged", reason="NaN") for m in METHODS]
    assert make(failed).cells["full", "beetles"].note == "seed 1 diverged: NaN"
    pending = make([r for r in runs if not _is(r, "beetles", 1)])
    cell = pending.cells["full", "beetles"]
    assert (len(cell.values), cell.note) == (2, "2 of 3 seeds (seed 1 not run)")
    assert sorted(pending.cells["full", "FGVC mean"].values) == [0, 2]


def _is(run, dataset, seed):
    return run["run"]["dataset"] == dataset and run["run"]["seed"] == seed


def test_a_number_that_is_not_finite_is_no_number():
    runs = records(lambda m, d, s: float("nan") if d == "beetles" else 0.5)
    assert "finite" in make(runs).cells["full", "beetles"].note


def test_parameters_survive_a_failed_run_and_costs_do_not():
    columns = [
        {"label": "Params ({unit})", "value": "trainable"},
        {"label": "Time ({unit})", "value": "train_seconds"},
        {"datasets_of": "fgvc"},
    ]
    table = make(records(status="diverged", reason="NaN"), columns=columns)
    assert table.cells["full", "trainable"].text == "12.3"
    assert table.label(table.columns[0]) == "Params (k)"
    assert table.cells["full", "train_seconds"].mean is None


def test_another_selection_can_be_shown_from_the_same_records():
    metrics = {"last": {"epoch": 9, "top1": 0.5}, "best-test": {"epoch": 3, "top1": 0.6}}
    table = make(records(metrics=metrics, protocol={"selection": "best-test"}))
    assert table.cells["full", "beetles"].mean == pytest.approx(60)
    assert "chosen on the test set" in table.caption
    lacking = make(records(metrics=metrics, protocol={"selection": "val"}))
    assert "no 'val' selection" in lacking.cells["full", "beetles"].note


def test_records_that_differ_may_not_share_a_table():
    odd = {"normalisation": "imagenet"}
    runs = [*records(methods=["full"]), *records(methods=["linear"], protocol=odd)]
    with pytest.raises(UserError, match=r"normalisation.*imagenet \(linear\).*mixed: note"):
        make(runs)
    assert any("in normalisation: imagenet" in note for note in make(runs, mixed="note").remarks)
    tuned = [*records(methods=["full"]), *records(methods=["linear"], protocol={"lr": 0.1})]
    make(tuned)
    with pytest.raises(UserError, match="differ in backbone"):
        make([*records(methods=["full"]), *records(methods=["linear"], backbone="b")])
    with pytest.raises(UserError, match="selection"):
        make(
            [
                *records(methods=["full"]),
                *records(methods=["linear"], protocol={"selection": "val"}),
            ]
        )


def test_data_sets_may_differ_in_protocol_because_rows_are_compared_within_a_column():
    runs = records(datasets=DATASETS[:2], protocol={"augmentation": "flip"})
    make([*runs, *records(datasets=DATASETS[2:], protocol={"augmentation": "none"})])


def test_a_record_of_another_suite_or_a_second_one_is_refused():
    with pytest.raises(UserError, match="suite 'quick' in a table of suite 'mine'"):
        make(records(suite="quick"))
    with pytest.raises(UserError, match="Two records of full on beetles, seed 0"):
        make([record("full", "beetles", 0.5), Missing("full", "beetles", 0, "mine")])


def test_no_metric_is_special():
    info = [
        {"name": "mdice", "title": "mDice", "unit": "", "higher_is_better": True},
        {"name": "error", "title": "Error", "unit": "px", "higher_is_better": False},
    ]
    runs = records(metric="mdice", metric_info=info)
    for run in runs:
        run["metrics"]["last"] = {"mdice": 0.91234, "error": 12.345}
    table = make(runs, columns=[{"datasets_of": "fgvc", "metric": ["mdice", "error"]}])
    assert [c.block for c in table.columns] == ["mDice", "mDice", "Error", "Error"]
    assert table.cells["full", "beetles mdice"].text == "0.9123"
    assert table.cells["full", "beetles error"].text == "12.35"
    assert table.label(table.columns[2]) == "beetles ↓"
    assert "mDice, Error (%)" in table.caption
    plain = make(runs, columns=[{"datasets_of": "fgvc"}])
    assert plain.cells["full", "beetles"].text == "0.9123"  # the records' primary metric


def test_groups_of_a_record_are_columns():
    runs = records(datasets=["beetles"])
    for run in runs:
        run["groups"] = {"last": {"top1": {"b": 0.7, "a": 0.5}}}
    subsets = {"subsets_of": "beetles", "mean": "tasks"}
    table = make(runs, columns=[subsets])
    assert [(c.label, c.block) for c in table.columns] == [
        ("a", "beetles"),
        ("b", "beetles"),
        ("All", "beetles"),
    ]
    assert [table.cells["full", c.key].text for c in table.columns] == ["50.0", "70.0", "50.0"]


def test_columns_of_another_suite_stand_beside_it():
    other = SuiteInfo("big", "Big", GROUPS, labels={"vit-l": "ViT-L"}, backbone="vit-l")
    runs = [*records(0.5), *records(0.7, suite="big", backbone="vit-l")]
    columns = [{"datasets_of": "fgvc"}, {"datasets_of": "fgvc", "suite": "big", "block": "Large"}]
    described = spec(columns=columns)
    table = build_table("t", described, REAL, METHODS, tidy(runs), others={"big": other})
    assert [c.key for c in table.columns][2:] == ["beetles (big)", "leaves (big)"]
    assert [table.cells["full", c.key].text for c in table.columns] == ["50.0"] * 2 + ["70.0"] * 2
    assert table.backbone == "vit-quick, ViT-L"
    with pytest.raises(UserError, match="suite of a table's column: 'big'"):
        make(runs, columns=columns)
    optional = [columns[0], columns[1] | {"optional": True}]
    assert len(make(runs, columns=optional).columns) == 2


def test_both_kinds_of_mean_stand_side_by_side():
    runs = records(lambda m, d, s: {"digits": 0.9, "photos": 0.9, "count": 0.3}.get(d, 0))
    columns = [{"block": "V", "groups": ["natural", "structured"], "mean": "both"}]
    table = make(runs, columns=columns)
    means = {c.label: table.cells["full", c.key].text for c in table.columns[2:]}
    assert means == {"Mean (tasks)": "70.0", "Mean (groups)": "60.0"}


def test_a_table_says_where_its_numbers_differ_in_origin():
    runs = records(methods=["full"], provenance={"commit": "aaaaaaaaaa"})
    runs += records(methods=["linear"], provenance={"commit": "bbbbbbbbbb", "torch": "2.9.0"})
    runs[0]["identity"] = {"code": "of another commit"}
    runs[1]["warnings"] = ["two images occur twice", "no settings; the fixed ones were used"]
    runs[2]["stale"] = "code changed"
    said = " ".join(make(runs).remarks)
    assert "different commits: aaaaaaa (5), bbbbbbb (5)" in said
    assert "differ in torch: 2.8.0 (5), 2.9.0 (5)" in said
    assert "made by different code: full" in said
    assert "Warning of 1 of 10 runs (full): two images occur twice." in said
    assert "Warning of 1 of 10 runs (full): no settings; the fixed ones were used." in said
    assert "1 of 10 runs do not fit the current configuration" in said
    assert "stale: code changed" in make(runs).cells["full", "natural"].note
    one = " ".join(make(records()).remarks)
    assert not any(word in one for word in ("differ", "commit", "code", "stale"))


def test_a_table_says_that_its_settings_were_searched():
    runs = records()
    for run in runs[:3]:
        run["protocol"] |= {"batch_size": 16}  # searched as well, so rows may differ in it
    for run in runs:
        run["protocol"] |= {"hyperparameters": "search/mine"}
    said = " ".join(make(runs).remarks)
    assert "Settings are those of search/mine" in said
    assert "search" not in " ".join(make(records()).remarks)


def test_rows_at_chance_are_flagged():
    info = [TOP1 | {"chance": 0.25}]
    runs = records(lambda m, d, s: {"full": 0.6, "linear": 0.27, "lora-8": 0.2}[m])
    for run in runs:
        run["metric_info"] = info
    table = make(runs)
    notes = {m: table.cells[m, "beetles"].note for m in METHODS}
    assert notes["full"] == "" and notes["linear"] == "not above chance (25.0)" == notes["lora-8"]
