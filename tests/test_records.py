"""Records are written whole or not at all, and read only where they are understood."""

from __future__ import annotations

import errno
import json

import pytest

from snella import records
from snella.errors import UserError


def record(status: str) -> dict:
    return {"schema": records.SCHEMA, "status": status, "reason": None}


def test_final_and_broken_records_replace_each_other(tmp_path):
    records.write_record(tmp_path, record("failed"))
    assert records.read_record(tmp_path)["status"] == "failed"
    records.write_record(tmp_path, record("ok"))
    assert records.read_record(tmp_path)["status"] == "ok"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.json"]
    records.write_record(tmp_path, record("oom"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["failure.json"]


def test_no_record_is_none(tmp_path):
    assert records.read_record(tmp_path) is None


@pytest.mark.parametrize("content", ['{"schema": 0}', "{}", "[]", '{"schema": 99}'])
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

    def full(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.Path, "write_text", full)
    with pytest.raises(UserError, match=r"record\.json: No space left"):
        records.write_json(path, {"new": True})
    assert json.loads(path.read_bytes()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_provenance_says_where_and_with_what():
    found = records.provenance()
    assert set(found) == {"git", "python", "packages", "hardware", "command", "started"}
    assert found["packages"]["torch"] and found["hardware"]["cores"] >= 1
