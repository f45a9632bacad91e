"""Table 6 and S²FT's Table 3 of full size, from records made up for it, beside the printed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from report_support import record

from snella.jobs.tables import suite_info
from snella.report.columns import VALUES
from snella.report.frame import tidy
from snella.report.published.versus import compare_published, versus_grid
from snella.report.spec import parse_spec
from snella.report.statistics import statistics_grid, table_statistics
from snella.report.table import Table, build_table
from snella.report.write import cells
from snella.suite import plan
from snella.suite.config import load
from snella.tasks import find_task

INFO = find_task("generation", "tasks").metrics
Value = Callable[[str, int], float]


def made(
    table: str, value: Value = lambda metric, subject: 0.5, suite: str = "dreambooth"
) -> Table:
    """The table of records in which subject number i has ``value(metric, i)`` of every metric."""
    config = load(overrides={"suite": suite})
    own, spec = suite_info(config), parse_spec(table, config.tables[table])
    methods = {m: config.methods[m].label or m for m in plan.suite_methods(config)}
    rows = {m for group in spec.rows for m in group.methods}
    about: dict[str, Any] = {"metric": "clip_i", "metric_info": [vars(m) for m in INFO]}
    about |= {"task": "generation", "suite": suite, "backbone": own.backbone}
    subjects = [name for names in own.groups.values() for name in names]
    found = [
        record(method, subject, None, **about)
        | {"metrics": {"last": {"epoch": 9} | {m.name: value(m.name, i) for m in INFO}}}
        for method in methods
        for i, subject in enumerate(subjects)
    ]
    return build_table(table, spec, own, {m: methods[m] for m in methods if m in rows}, tidy(found))


def test_real_images_stand_beside_the_printed_row() -> None:
    """A row that no method made is paired by its label; one that the paper lacks is left alone."""
    versus = compare_published(made("s2ft_table3"))
    assert versus is not None
    labels, pairs = versus.table.labels, versus.pairs.values()
    found = {(labels[p.method], p.column.label): p.value for p in pairs}
    assert found["Real images", "DINO"] == pytest.approx(0.703)
    assert found["Real images", "CLIP-I"] == pytest.approx(0.864)
    assert found["Real images", "LPIPS"] == pytest.approx(0.695)
    assert found["Real images", "CLIP-T"] is None  # photographs have no prompt
    assert found["Unadapted model", "DINO"] is None
    assert found["Full", "DINO"] == pytest.approx(0.614)
    lines = [line.label for line in versus_grid(versus).lines]
    first = lines.index("Real images")
    assert lines[first : first + 4] == ["Real images", "published", "difference", "Unadapted model"]


def test_table_6_stands_beside_the_printed_one() -> None:
    versus = compare_published(made("table6"))
    assert versus is not None
    printed = {(p.method, p.column.label): p.value for p in versus.pairs.values() if p.value}
    assert printed["snella-8", "Concept align."] == pytest.approx(0.8599)
    assert printed["lora-8", "Text align."] == pytest.approx(0.2612)
    assert not any(method.startswith("=") for method, _ in printed)
    assert versus_grid(versus).lines


def test_means_over_subjects_have_a_bootstrap_interval() -> None:
    """Of the mean over subjects: narrower than the spread of subjects, and around the mean."""
    table = made("table6", lambda metric, subject: 0.4 + 0.01 * subject)
    frame = cells(table).set_index(["label", "column"])
    cell = frame.loc["SNELLA-8", "mean clip_i"]
    assert cell["mean"] == pytest.approx(0.545)
    error = np.std([0.01 * i for i in range(30)]) / np.sqrt(30)
    assert cell["low"] == pytest.approx(0.545 - 1.96 * error, abs=2e-3)
    assert cell["high"] == pytest.approx(0.545 + 1.96 * error, abs=2e-3)
    assert frame.loc["Unadapted model", "mean clip_i"]["high"] == pytest.approx(cell["high"])
    assert np.isnan(frame.loc["SNELLA-8", "trainable"]["low"])
    assert "95 % intervals of the mean: table6_cells.csv" in table.remarks[0]


def test_paired_differences_of_cosines_keep_their_digits() -> None:
    table = made("table6", lambda metric, subject: 0.4 + 0.01 * subject)
    found = statistics_grid(table_statistics(table, "lora-8"))
    assert {entry.text for line in found.lines for entry in line.cells} >= {"+0.0000"}


def test_a_count_is_printed_in_a_unit_that_shows_all_rows() -> None:
    counts = VALUES["trainable"]
    assert counts.unit([85.8e6, 36_000]).symbol == "M"
    assert counts.unit([2.9e6, 3_400]).symbol == "k"  # 0.00 M says nothing
    assert counts.unit([2.9e6, 12_700]).symbol == "k"  # 0.01 M little
    assert counts.unit([2.9e6, 0]).symbol == "M"  # no parameter at all is zero in any unit
    assert counts.unit([]).symbol == "k"
