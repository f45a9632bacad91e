"""Paired comparison over data sets and seeds."""

from __future__ import annotations

import csv
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_support import METHODS, make, record, records, scored, write
from scipy import stats
from scipy.stats import rankdata

from snella.errors import UserError
from snella.report import tidy
from snella.report.noise import Noise, holm, leading, measure, p_value, read_scores
from snella.report.statistics import (
    average_ranks,
    bootstrap,
    compare,
    datasets_needed,
    friedman,
    smallest_p,
    statistics_grid,
    table_statistics,
    wilcoxon,
)

SMALL = st.lists(st.integers(-5, 5).map(float), max_size=8)


@given(SMALL)
def test_wilcoxon_equals_counting_all_signs(differences):
    nonzero = [d for d in differences if d]
    ranks = rankdata([abs(d) for d in nonzero]) if nonzero else []
    centre = sum(ranks) / 2

    def far(signs):
        return abs(sum(r for r, s in zip(ranks, signs, strict=True) if s) - centre)

    observed = far([d > 0 for d in nonzero])
    outcomes = [far(signs) for signs in product([False, True], repeat=len(nonzero))]
    expected = sum(o >= observed for o in outcomes) / len(outcomes)
    assert wilcoxon(differences) == pytest.approx(expected)


def test_wilcoxon_agrees_with_scipy():
    values = [1.2, -0.3, 2.1, 0.7, -0.9, 3.3, 1.1, 0.4, 2.6, -0.2]
    assert wilcoxon(values) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)


@settings(deadline=None)
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=10, unique_by=lambda v: round(abs(v), 6)))
def test_wilcoxon_without_ties_is_scipys(values):
    nonzero = [v for v in values if abs(v) > 1e-6]
    if nonzero:
        assert wilcoxon(nonzero) == pytest.approx(stats.wilcoxon(nonzero, method="exact").pvalue)


def test_rounding_noise_is_a_tie():
    assert wilcoxon([0.1 + 0.2 - 0.3] * 6) == 1.0


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_keeps_the_order_and_never_helps(p):
    corrected = list(dict(sorted(holm(dict(enumerate(p))).items())).values())
    assert all(a <= b <= 1 for a, b in zip(p, corrected, strict=True))
    order = sorted(range(len(p)), key=p.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )


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
    (row,) = compare({"x": ours, "base": base}, "base").itertuples()
    assert (row.datasets, row.wins, row.ties, row.losses) == (2, 1, 0, 1)
    assert row.difference == pytest.approx((3.0 - 1.0) / 2)
    (worse,) = compare({"x": ours, "base": base}, "base", higher_is_better=False).itertuples()
    assert worse.difference == pytest.approx(-1.0)


def test_one_shared_data_set_is_no_test():
    (row,) = compare({"x": {"a": {0: 1.0}}, "base": {"a": {0: 0.0}}}, "base").itertuples()
    assert row.wins == 1 and np.isnan([row.p, row.low, row.p_holm]).all()


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


def test_friedman_is_scipys_and_the_critical_difference_is_demsars():
    rng = np.random.default_rng(0)
    table = rng.random((14, 4))
    scores = {str(m): {str(d): {0: table[d, m]} for d in range(14)} for m in range(4)}
    found = friedman(scores)
    wanted = stats.friedmanchisquare(*table.T)
    assert (found.chi_squared, found.p) == (pytest.approx(wanted[0]), pytest.approx(wanted[1]))
    assert found.f == pytest.approx(13 * wanted[0] / (14 * 3 - wanted[0]))
    # Demšar (2006), Table 5: q = 2.569 for four classifiers
    assert found.critical_difference == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), abs=1e-3)
    same = {m: {str(d): {0: 1.0} for d in range(3)} for m in "abc"}
    assert (friedman(same).chi_squared, friedman(same).p) == (0.0, 1.0)
    assert friedman({"a": same["a"], "b": same["b"]}) is None and friedman({}) is None


def test_the_smallest_possible_p_is_said():
    assert smallest_p(7, 20) == pytest.approx(20 / 64)
    assert smallest_p(2, 20) == 1.0
    assert datasets_needed(20) == 10 and smallest_p(10, 20) <= 0.05 < smallest_p(9, 20)
    table = make(records(lambda m, d, s: {"full": 0.5, "linear": 0.4, "lora-8": 0.6}[m]))
    said = " ".join(table_statistics(table, "linear").limits)
    assert "5 data sets and 2 comparisons: the smallest possible corrected p" in said
    assert "is 0.12, so it cannot show a difference at level 0.05 (that takes 7 data sets)" in said
    assert "Friedman" in said and "Nemenyi" in said


def images(tmp_path, right, dataset="beetles"):
    """Frame rows of runs; ``right`` maps a method to the (N,) scores of each seed."""
    return tidy(
        scored(tmp_path, m, dataset, r, s)
        for m, seeds in right.items()
        for s, r in enumerate(seeds)
    )


def test_one_seed_of_right_and_wrong_is_mcnemars_exact_test(tmp_path):
    a, b = np.zeros(100), np.zeros(100)
    a[:60], b[:50], b[60:63] = 1, 1, 1
    noise = measure(images(tmp_path, {"a": [a], "b": [b]}))
    expected = pytest.approx(stats.binomtest(10, 13).pvalue, rel=1e-12)
    assert p_value([(1.0, 0.07, noise)], "a", "b") == expected
    assert p_value([(1.0, 0.0, noise)], "a", "a") == 1.0


def test_a_mean_over_test_images_has_a_bootstrap_interval(tmp_path):
    """scipy's percentile interval of the same scores, seeds averaged per image."""
    rng = np.random.default_rng(0)
    a, b = rng.beta(4, 2, (2, 120)), (rng.random((2, 120)) < 0.8).astype(float)
    noise = measure(images(tmp_path, {"a": list(a), "b": list(b)}))
    for name, scores in (("a", a), ("b", b)):
        means = np.float32(scores).mean(axis=0, dtype=np.float64)
        expected = stats.bootstrap(
            (means,), np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(1)
        ).confidence_interval
        assert noise.interval(name) == pytest.approx(tuple(expected), abs=5e-3)
    assert noise.interval("another") is None and Noise({}, 0, 0, None, None).interval("a") is None


@pytest.mark.parametrize("kind", ["noise", "npy", "text", "square", "cut"])
def test_damaged_scores_are_said_and_not_compared(tmp_path, caplog, kind):
    path = tmp_path / "scores.npz"
    arrays = {"text": np.array(["a", "b"]), "square": np.ones((2, 2))}
    np.savez(path, **{"last/top1": arrays.get(kind, np.ones(4, np.float32))})
    data = {"noise": b"\xff" * 99, "cut": path.read_bytes()[:-30]}.get(kind, path.read_bytes())
    path.write_bytes(data)
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.ones(4))
    run = SimpleNamespace(
        folder=tmp_path, scores="scores.npz", selection="last", metric="top1", value=1.0
    )
    assert read_scores(run) is None
    assert "scores.npz is damaged" in caplog.text


def test_other_scores_are_the_paired_t_test(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.random(50), rng.random(50)
    noise = measure(images(tmp_path, {"a": [a], "b": [b]}))
    p = p_value([(1.0, float(np.float32(a).mean() - np.float32(b).mean()), noise)], "a", "b")
    assert p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-3)


def test_the_paired_test_agrees_with_a_bootstrap_over_images_of_several_data_sets(tmp_path):
    rng = np.random.default_rng(3)
    parts, draws = [], np.zeros(4000)
    for dataset in ("beetles", "leaves"):
        a = (rng.random(800) < 0.6).astype(float)
        b = np.where(rng.random(800) < 0.03, 1 - a, a)
        noise = measure(images(tmp_path, {"a": [a], "b": [b]}, dataset))
        d = a - b
        parts.append((0.5, d.mean(), noise))
        draws += 0.5 * d[rng.integers(800, size=(4000, 800))].mean(axis=1)
    difference = sum(w * d for w, d, _ in parts)
    z = abs(difference) / draws.std()
    assert p_value(parts, "a", "b") == pytest.approx(2 * stats.norm.sf(z), abs=0.02)


def test_seeds_widen_what_images_alone_would_separate(tmp_path):
    rng = np.random.default_rng(5)
    base = (rng.random(3000) < 0.7).astype(float)

    def shifted(seed, amount):
        found = base.copy()
        lost = np.flatnonzero(base)[seed :: round(1 / amount)]
        found[lost] = 0
        return found

    same = [base, base, base]
    steady = measure(images(tmp_path / "a", {"a": same, "b": [shifted(s, 0.03) for s in range(3)]}))
    shaky = measure(images(tmp_path / "b", {"a": same, "b": [base, shifted(0, 0.08), base]}))
    assert p_value([(1.0, 0.02, steady)], "a", "b") < 1e-3
    assert p_value([(1.0, 0.02, shaky)], "a", "b") > 0.2


def test_scores_that_are_not_what_the_metric_averages_are_left_out(tmp_path):
    run = scored(tmp_path, "a", "beetles", np.ones(10))
    run["metrics"]["last"]["top1"] = 0.5
    assert measure(tidy([run])).images is None
    (run["folder"] / "scores.npz").unlink()
    assert measure(tidy([run])).n == 0
    assert p_value([(1.0, 0.1, Noise({"a": 0, "b": 1}, 0, 1, None, None))], "a", "b") is None
    assert leading("a", {"b": None}) is None
    assert leading("a", {"b": 0.001, "c": 0.3, "d": None}) == ["a", "c"]


def test_statistics_are_written_beside_the_table(tmp_path):
    runs = records(lambda m, d, s: {"full": 0.5, "linear": 0.4, "lora-8": 0.6}[m] + s / 1000)
    runs[5] = record("linear", "beetles", None, status="diverged", reason="NaN")
    paths = write(tmp_path, runs, reference="full")
    assert {f"t_statistics.{k}" for k in ("csv", "md", "tex")} <= {p.name for p in paths}
    rows = {r["method"]: r for r in csv.DictReader((tmp_path / "t_statistics.csv").open())}
    assert float(rows["lora-8"]["difference"]) == pytest.approx(10)
    assert rows["linear"]["datasets"] == "4" and rows["linear"]["losses"] == "4"
    assert float(rows["full"]["average_rank"]) == 2.0
    assert "| Full | 2.0 |  |  |  |  |  |" in (tmp_path / "t_statistics.md").read_text()
    assert r"\toprule" in (tmp_path / "t_statistics.tex").read_text()
    without = {k: v for k, v in METHODS.items() if k != "full"}
    names = {p.name for p in write(tmp_path / "u", runs, reference="full", methods=without)}
    assert "t_statistics.csv" not in names


def test_any_row_can_be_the_reference_and_images_add_a_p_value(tmp_path):
    rng = np.random.default_rng(0)
    runs = []
    for dataset in ("beetles", "leaves"):
        base = (rng.random(900) < 0.8).astype(float)
        worse = np.where(rng.random(900) < 0.05, 0.0, base)
        runs += [
            scored(tmp_path, "lora-8", dataset, base),
            scored(tmp_path, "full", dataset, worse),
        ]
    table = make(runs, columns=[{"datasets_of": "fgvc"}], methods={"full": "F", "lora-8": "L"})
    (row,) = table_statistics(table, "lora-8").rows.itertuples()
    assert row.method == "full" and row.p == 0.5 and row.p_images_holm < 1e-6
    heads = [h.label for h in statistics_grid(table_statistics(table, "lora-8")).headings]
    assert "p images (Holm)" in heads
