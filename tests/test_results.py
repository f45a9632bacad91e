"""The public frame of all results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from report_support import record, schema1, write_run

import snella.results
from snella.errors import UserError
from snella.jobs import tables
from snella.report.frame import COLUMNS
from snella.suite import config as configuration


def test_every_number_is_a_row_and_a_failed_run_one_without(tmp_path):
    made = record("full", "digits", 0.5)
    made["metrics"]["val"] = {"epoch": 3, "top1": 0.6}
    made["groups"] = {"last": {"top1": {"a": 0.4, "b": 0.7}}}
    folder = write_run(tmp_path, made, {"last/top1": np.ones(4)})
    write_run(tmp_path, record("linear", "digits", None, status="oom", reason="too big"))
    frame = snella.results.frame(tmp_path)
    assert list(frame.columns[: len(COLUMNS)]) == list(COLUMNS)
    rows = frame.set_index(["method", "selection"])
    assert rows["value"].to_dict() == pytest.approx(
        {("full", "last"): 0.5, ("full", "val"): 0.6, ("linear", "last"): np.nan}, nan_ok=True
    )
    last = rows.loc[("full", "last")]
    assert (last["unit"], last["epoch"], bool(last["selected"])) == ("%", 9, True)
    assert (last["commit"], last["torch"], last["hardware"]) == ("0123456789", "2.8.0", "A CPU")
    assert (last["protocol.lr"], last["with_head"], last["scores"]) == (1e-3, 12_300, "scores.npz")
    assert last["folder"] == str(folder) and not rows.loc[("full", "val"), "selected"]
    assert (rows.loc[("linear", "last"), "status"], rows["reason"].iloc[-1]) == ("oom", "too big")
    parts = snella.results.frame(tmp_path, subsets=True)
    assert parts.set_index("subset")["value"].loc[["a", "b"]].tolist() == [0.4, 0.7]


def test_records_of_the_first_version_are_read(tmp_path):
    write_run(tmp_path, schema1(0.5))
    (row,) = snella.results.frame(tmp_path).to_dict("records")
    assert (row["value"], row["title"], row["task"]) == (0.5, "Top-1 accuracy", "classification")


def test_an_edited_record_is_refused(tmp_path):
    folder = write_run(tmp_path, record("full", "digits", 0.5))
    text = json.loads((folder / "record.json").read_text())
    text["metrics"]["last"]["top1"] = 0.9
    (folder / "record.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="digest"):
        snella.results.frame(tmp_path)


def test_a_configuration_adds_labels_groups_and_what_is_missing(tmp_path):
    config = configuration.load(overrides={"suite": "smoke", "results": str(tmp_path)})
    names = {"suite": "smoke", "backbone": "vit-quick"}
    write_run(tmp_path, record("snella-8", "digits", 0.5, **names))
    frame = snella.results.frame(tmp_path, config, stale=lambda folder, made: "code changed")
    done = frame[frame.status == "ok"].iloc[0]
    assert (done["label"], done["group"], done["stale"]) == ("SNELLA-8", "natural", "code changed")
    suite = config.suites["smoke"]
    expected = len(suite.datasets) * len(suite.methods) * len(suite.seeds)
    assert len(frame) == expected and (frame.status == "not run").sum() == expected - 1


def test_no_results_are_an_empty_frame(tmp_path):
    frame = snella.results.frame(tmp_path)
    assert frame.empty and "value" in frame.columns


def test_the_example_of_the_documentation_runs(tmp_path):
    for method, value in (("full", 0.6), ("linear", 0.5)):
        write_run(tmp_path, record(method, "digits", value))
    example = Path(__file__).parent.parent / "docs" / "examples" / "frame.py"
    done = subprocess.run(
        [sys.executable, example, tmp_path, tmp_path / "frame.png"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "2 runs, 2 methods" in done.stdout and (tmp_path / "frame.png").stat().st_size > 5_000


def test_the_plain_files_of_a_table_are_of_one_suite(tmp_path):
    def of(suite: str):
        return configuration.load(overrides={"suite": suite, "results": str(tmp_path)})

    def plain() -> set[str]:
        return {p.name for p in tmp_path.glob("table1*")}

    tables.write_statistics(of("smoke"), "table1")
    ranks = {"table1_ranks.pdf", "table1_ranks.png"}
    statistics = {f"table1_statistics.{kind}" for kind in ("tex", "csv", "md")}
    table = {"table1.tex", "table1.csv", "table1.md", "table1_cells.csv"}
    tables.write(of("smoke"), "table1")
    assert plain() == table | statistics | ranks  # the table leaves its own suite's companions
    kept = (tmp_path / "smoke" / "table1.tex").read_bytes()
    assert (tmp_path / "table1.tex").read_bytes() == kept
    (tmp_path / "table1.pdf").touch()
    tables.write_statistics(of("quick"), "table1")
    assert plain() == statistics | ranks
    assert "suite quick;" in (tmp_path / "table1_statistics.tex").read_text()
    tables.write(of("smoke"), "table1")
    assert plain() == table | statistics  # nothing of the other suite stays
    assert "suite smoke;" in (tmp_path / "table1_statistics.tex").read_text()
    assert (tmp_path / "quick" / "table1_statistics.tex").exists()
    assert (tmp_path / "smoke" / "table1.tex").read_bytes() == kept
