"""Records are written whole or not at all, and read only where they are understood."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from snella import records
from snella.errors import UserError

RUN = {"suite": "s", "backbone": "b", "dataset": "d", "method": "m", "protocol": "p", "seed": 0}
INFO = {"name": "mse", "lower": 0.0, "upper": 4.0}


def record(status: str, value: float = 1.5) -> dict:
    metrics = {"metric_info": [INFO], "metrics": {"last": {"epoch": 1, "mse": value}}}
    ended = metrics if status == "ok" else {}
    return {"schema": records.SCHEMA, "status": status, "reason": None, "run": RUN, **ended}


def test_a_failure_never_destroys_a_finished_result(tmp_path):
    records.write_record(tmp_path, record("failed"))
    assert records.read_record(tmp_path)["status"] == "failed"
    records.write_record(tmp_path, record("ok"))
    assert records.read_record(tmp_path)["status"] == "ok"
    assert not (tmp_path / "failure.json").exists()
    records.write_record(tmp_path, record("oom"))
    assert records.read_record(tmp_path)["status"] == "ok"
    assert records.read_failure(tmp_path)["status"] == "oom"
    (tmp_path / "record.json").unlink()  # as the workflow does before it tries again
    assert records.read_record(tmp_path)["status"] == "ok"


@pytest.mark.parametrize(
    "old,new,words",
    [
        ('"mse": 1.5', '"mse": 1.4', "changed by hand"),
        ('"mse": 1.5', '"mse": NaN', "changed by hand"),
        ('"status": "ok"', '"status": "fine"', "status 'fine' is unknown"),
        ('"method": "m",', "", "lacks or breaks 'run.method'"),
    ],
)
def test_a_record_edited_by_hand_is_refused(tmp_path, old, new, words):
    path = records.write_record(tmp_path, record("ok"))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=rf"record\.json: .*{words}.*delete"):
        records.read_record(tmp_path)


@pytest.mark.parametrize("value", [4.5, -0.1, float("nan"), float("inf"), None])
def test_a_value_outside_the_metrics_range_is_refused(tmp_path, value):
    records.write_record(tmp_path, record("ok", value))
    with pytest.raises(UserError, match="out of its range"):
        records.read_record(tmp_path)


def test_a_group_outside_the_metrics_range_is_refused(tmp_path):
    made = record("ok") | {"groups": {"last": {"mse": {"cats": 1.0, "dogs": 7.0}}}}
    records.write_record(tmp_path, made)
    with pytest.raises(UserError, match=r"last mse of 'dogs' 7\.0 is out of its range"):
        records.read_record(tmp_path)


def test_records_of_the_first_version_are_read(tmp_path):
    old = {
        "schema": 1, "status": "ok", "reason": None, "run": RUN, "metric": "top1",
        "metrics": {"last": {"epoch": 5, "top1": 0.5}}, "identity": "abc", "digests": {"data": "d"},
    }  # fmt: skip
    (tmp_path / "record.json").write_text(json.dumps(old))
    read = records.read_record(tmp_path)
    assert (read["schema"], read["task"]) == (2, "classification")
    assert read["metrics"] == old["metrics"] and read["identity"]["run"] == "abc"
    assert read["metric_info"][0]["name"] == "top1"
    old["metrics"]["last"]["top1"] = 1.7
    (tmp_path / "record.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="out of its range"):
        records.read_record(tmp_path)


def test_no_record_is_none(tmp_path):
    assert records.read_record(tmp_path) is None


def test_a_record_of_a_newer_version_is_no_reason_to_delete_it(tmp_path):
    (tmp_path / "record.json").write_text('{"schema": 99}')
    with pytest.raises(UserError, match=r"record\.json.*schema 99.*update snella"):
        records.read_record(tmp_path)


def test_text_that_is_no_utf8_stays_readable(tmp_path):
    """Arguments with such bytes stand in a record as lone surrogates."""
    (tmp_path / "record.json").write_text('{"schema": 0, "x": "\\udcff"}')
    with pytest.raises(UserError, match="schema 0"):
        records.read_record(tmp_path)


@pytest.mark.parametrize("content", ['{"schema": 0}', "{}", "[]"])
def test_another_schema_is_refused_with_the_remedy(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=r"record\.json.*schema.*delete"):
        records.read_record(tmp_path)


def test_half_a_record_is_refused(tmp_path):
    (tmp_path / "record.json").write_text('{"schema": 1, "sta')
    with pytest.raises(UserError, match="not a readable record"):
        records.read_record(tmp_path)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    records.write_json(path, {"old": True})

    def full(self, text, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"record\.json: No space left"):
        records.write_json(path, {"new": True})
    assert json.loads(path.read_bytes()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_provenance_says_where_and_with_what():
    found = records.provenance()
    assert set(found) == {"git", "python", "packages", "hardware", "command", "started"}
    assert found["packages"]["torch"] and found["hardware"]["cores"] >= 1


@pytest.mark.parametrize("wrong", ["x", -1, [1], [{"a": 1}], 10**400, True])
@pytest.mark.parametrize(
    "key",
    ["run", "cost", "parameters", "provenance", "metrics", "metric_info", "warnings", "files"],
)
def test_a_record_of_another_shape_is_refused_though_its_digest_fits(tmp_path, key, wrong):
    content = records.sign({**record("ok"), key: wrong})
    (tmp_path / "record.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"record\.json: it lacks or breaks '{key}.*delete it"):
        records.read_record(tmp_path)


def not_regular(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # to open it would wait for ever
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(records.LARGEST + 1)
    else:
        path.write_bytes({"empty": b"", "binary": b"\xff\x00\x81", "deep": b"[" * 10**5}[kind])


@pytest.mark.parametrize("kind", ["folder", "pipe", "huge", "empty", "binary", "deep"])
def test_a_file_that_is_no_record_names_the_copy_that_counts(tmp_path, kind):
    path = records.write_record(tmp_path, record("ok"))
    path.unlink()
    not_regular(path, kind)
    with pytest.raises(UserError, match=r"no.* readable record \(.*\); .*copy finished\.json"):
        records.read_record(tmp_path)
    (tmp_path / "finished.json").unlink()
    with pytest.raises(UserError, match="delete it and rerun"):
        records.read_record(tmp_path)


def test_settings_of_another_shape_are_shown_as_far_as_they_go(tmp_path):
    from snella.report.runs.details import describe

    (tmp_path / "config.json").write_text('{"backbone": 3, "method": ["x"], "suite": "mine"}')
    run = describe(tmp_path)["run"]
    assert (run["suite"], run["backbone"], run["method"]) == ("mine", "", "")
