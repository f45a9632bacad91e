"""Paired comparison over data sets and seeds."""

from __future__ import annotations

import csv
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_support import METHODS, REAL, record, records, spec

from snella.errors import UserError
from snella.report import write_table
from snella.report.statistics import average_ranks, bootstrap, compare, holm, midranks, wilcoxon

SMALL = st.lists(st.integers(-5, 5).map(float), max_size=8)


@given(SMALL)
def test_wilcoxon_equals_counting_all_signs(differences):
    nonzero = [d for d in differences if d]
    ranks = midranks([abs(d) for d in nonzero])
    centre = sum(ranks) / 2

    def far(signs):
        return abs(sum(r for r, s in zip(ranks, signs, strict=True) if s) - centre)

    observed = far([d > 0 for d in nonzero])
    outcomes = [far(signs) for signs in product([False, True], repeat=len(nonzero))]
    expected = sum(o >= observed for o in outcomes) / len(outcomes)
    assert wilcoxon(differences) == pytest.approx(expected)


def test_wilcoxon_agrees_with_scipy():
    values = [1.2, -0.3, 2.1, 0.7, -0.9, 3.3, 1.1, 0.4, 2.6, -0.2]
    assert wilcoxon(values) == 0.048828125  # scipy.stats.wilcoxon(values, method="exact")


def test_rounding_noise_is_a_tie():
    assert wilcoxon([0.1 + 0.2 - 0.3] * 6) == 1.0


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_keeps_the_order_and_never_helps(p):
    corrected = holm(p)
    assert all(a <= b <= 1 for a, b in zip(p, corrected, strict=True))
    order = sorted(range(len(p)), key=p.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=3), min_size=2, max_size=4))
def test_bootstrap_interval_lies_within_the_data_and_repeats(differences):
    low, high = bootstrap(differences)
    flat = [d for ds in differences for d in ds]
    assert min(flat) - 1e-9 <= low <= high <= max(flat) + 1e-9
    assert bootstrap(differences) == (low, high)


def test_seeds_are_paired_and_only_shared_ones_count():
    ours = {"a": {0: 3.0, 1: 5.0}, "b": {0: 1.0}, "c": {7: 9.0}}
    base = {"a": {0: 1.0, 1: 1.0, 2: 100.0}, "b": {0: 2.0}, "c": {0: 0.0}}
    (row,) = compare({"x": ours, "base": base}, "base")
    assert (row.datasets, row.wins, row.ties, row.losses) == (2, 1, 0, 1)
    assert row.difference == pytest.approx((3.0 - 1.0) / 2)
    (worse,) = compare({"x": ours, "base": base}, "base", higher_is_better=False)
    assert worse.difference == pytest.approx(-1.0)


def test_one_shared_data_set_is_no_test():
    (row,) = compare({"x": {"a": {0: 1.0}}, "base": {"a": {0: 0.0}}}, "base")
    assert (row.wins, row.p, row.low, row.p_holm) == (1, None, None, None)


def test_average_ranks_share_ties_and_need_every_method():
    scores = {
        "x": {"a": {0: 1.0}, "b": {0: 2.0}, "c": {0: 0.0}},
        "y": {"a": {0: 1.0}, "b": {0: 1.0}},
    }
    assert average_ranks(scores) == {"x": 1.25, "y": 1.75}
    assert average_ranks(scores, higher_is_better=False) == {"x": 1.75, "y": 1.25}
    assert average_ranks({}) == {} and average_ranks({"x": {}, "y": {}}) == {}


def test_unknown_reference():
    with pytest.raises(UserError, match="'lora-8'"):
        compare({"lora-8": {}}, "lora8")


def test_statistics_are_written_beside_the_table(tmp_path):
    runs = records(lambda m, d, s: {"full": 0.5, "linear": 0.4, "lora-8": 0.6}[m] + s / 1000)
    runs[5] = record("linear", "beetles", None, status="diverged", reason="NaN")
    paths = write_table(spec(reference="full"), REAL, METHODS, runs, tmp_path, "t")
    assert {"t_statistics.csv", "t_statistics.md"} <= {p.name for p in paths}
    rows = {r["method"]: r for r in csv.DictReader((tmp_path / "t_statistics.csv").open())}
    assert float(rows["lora-8"]["difference"]) == pytest.approx(10)
    assert rows["linear"]["datasets"] == "4" and rows["linear"]["losses"] == "4"
    assert float(rows["full"]["average_rank"]) == 2.0
    assert "| Full | 2.00 | | | | | |" in (tmp_path / "t_statistics.md").read_text()
    without = {k: v for k, v in METHODS.items() if k != "full"}
    names = {
        p.name for p in write_table(spec(reference="full"), REAL, without, runs, tmp_path, "u")
    }
    assert "u_statistics.csv" not in names
