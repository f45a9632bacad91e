"""Whatever a user writes: one line and status 2, or success; never a traceback, never a hang."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snella.cli import main
from snella.records import sign

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 10
bounded = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
BASE = {
    "suite": "mine",
    "allow_missing": False,
    "datasets": {"pets": {"path": "/nowhere/pets", "num_classes": 3, "label": "Pets"}},
    "methods": {"mine": {"file": "peft", "hyperparameters": {"rank": 4}, "protocol": {"lr": 0.1}}},
    "protocols": {"fast": {"epochs": 2, "warmup_epochs": 0, "image_size": 32, "resize": "none"}},
    "backbones": {"small": {"arch": "vit_tiny_patch16_224", "kwargs": {"depth": 2}, "file": "x"}},
    "tables": {
        "table9": {
            "caption": "x", "rows": [{"methods": ["mine"]}],
            "columns": [{"datasets_of": "natural"}],
        }
    },
    "suites": {
        "mine": {
            "title": "Mine", "backbone": "small", "protocol": "fast", "seeds": [0, 1],
            "groups": {"natural": ["pets"]}, "methods": ["mine", "full"],
            "overrides": {"batch_size": 4}, "method_overrides": {"full": {"protocol": {"lr": 1}}},
        }
    },
}  # fmt: skip
RECORD = sign({
    "schema": 2, "status": "ok", "reason": None, "task": "classification", "metric": "top1",
    "run": {"suite": "smoke", "backbone": "vit-quick", "dataset": "digits", "method": "full",
            "protocol": "quick", "seed": 0},
    "protocol": {"selection": "last", "name": "quick"},
    "metric_info": [{"name": "top1", "title": "Top-1 accuracy", "unit": "%",
                     "higher_is_better": True, "lower": 0.0, "upper": 1.0}],
    "metrics": {"last": {"epoch": 1, "top1": 0.5}}, "groups": {}, "scores": None,
    "parameters": {"trainable": 10, "total": 20, "head": 1, "with_head": 11},
    "cost": {"gflops": 0.1, "train_seconds": 2.0}, "identity": {"run": "x"}, "warnings": [],
})  # fmt: skip

texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=("Cs",)), max_size=40)
odd = st.sampled_from(
    ["", " ", "..", "../x", "a b", "a;b", "'", '"', "{x}", "%s", "é", "x" * 500, "\n", "\x1b[31m",
     "null", "~", "0x10", "1e400", "-0", "yes", "[", "*a", "&a", "!!int x", "<<", "digit", "ful"]
)  # fmt: skip
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), texts, odd
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | odd, inner, max_size=3),
    max_leaves=6,
)


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all parts of a nested value."""
    parts: Any = enumerate(content) if isinstance(content, list) else ()
    parts = content.items() if isinstance(content, dict) else parts
    return [path, *(found for key, value in parts for found in places(value, (*path, key)))]


def changed(content: Any, path: tuple, value: Any, how: str) -> Any:
    """A copy with the part at ``path`` replaced, removed, or under another name."""
    if not path:
        return value
    key, *rest = path
    copy = dict(content) if isinstance(content, dict) else list(content)
    if rest:
        copy[key] = changed(content[key], tuple(rest), value, how)
    elif how == "remove":
        del copy[key]
    elif how == "rename" and isinstance(copy, dict):
        copy[str(value)[:50]] = copy.pop(key)
    else:
        copy[key] = value
    return copy


def mutated(base: Any) -> st.SearchStrategy:
    """``base`` with one to three parts changed."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> Any:
        content = base
        for _ in range(draw(st.integers(1, 3))):
            if not isinstance(content, dict | list):
                break
            path = draw(st.sampled_from(places(content)))
            how = draw(st.sampled_from(["replace", "remove", "rename"]))
            content = changed(content, path, draw(values), how)
        return content

    return draw_one()


def calmly(*arguments: str) -> int:
    """Call ``main``; the status, after checking what every call must keep."""
    out, err = io.StringIO(), io.StringIO()
    begin = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(arguments))
        except SystemExit as ended:  # --help, --version
            status = ended.code or 0
    message = err.getvalue()
    assert time.process_time() - begin < SECONDS
    assert "Traceback" not in message + out.getvalue()
    assert status in (0, 2), f"{status}: {message}"
    if status == 2:
        assert message.startswith("snella: ") and message.count("\n") == 1, message
        assert message.isprintable() or message[:-1].isprintable(), ascii(message)
    return int(status)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_unchanged_configuration_is_accepted(tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(BASE))
    assert calmly("plan", "--configfile", f"{tmp_path}/my.yaml", "table9") == 0


@bounded
@given(content=mutated(BASE), table=st.sampled_from(["table1", "table9"]))
def test_any_configuration(tmp_path, content, table):
    (tmp_path / "my.yaml").write_text(yaml.dump(content, allow_unicode=True), encoding="utf-8")
    results = f"results={tmp_path}/results"
    calmly("plan", table, "--configfile", f"{tmp_path}/my.yaml", "--config", results)


@bounded
@given(
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace"))
)
def test_any_bytes_as_configuration(tmp_path, content):
    (tmp_path / "my.yaml").write_bytes(content)
    calmly("methods", "--configfile", f"{tmp_path}/my.yaml")


KEYS = st.sampled_from(
    ["suite", "results", "methods.full", "methods.full.label", "suites.smoke.seeds", "tables",
     "protocols.quick.epochs", "suites.smoke.groups.natural", "datasets.a.b", ".", "a..b", "="]
)  # fmt: skip


@bounded
@given(pairs=st.lists(st.tuples(KEYS | texts, odd | texts), max_size=3))
def test_any_pairs(tmp_path, pairs):
    given_ = [f"{key}={value}" for key, value in pairs if not f"{key}".startswith("-")]
    calmly("datasets", "--config", "suite=smoke", *given_)


@bounded
@given(
    arguments=st.lists(
        texts | odd | st.sampled_from(["--json", "--config", "--seed", "--"]), max_size=4
    )
)
def test_any_arguments(arguments):
    verb = arguments[0] if arguments else ""
    if verb not in ("run", "worker", "execute", "prepare", "check", "new-baseline", "schema"):
        calmly("methods", *arguments)
        if arguments:
            calmly(*arguments)


@bounded
@given(content=mutated(RECORD))
def test_any_record(tmp_path, content):
    folder = tmp_path / "results/runs/smoke/vit-quick/digits/full/seed0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(content))
    arguments = ["--config", "suite=smoke", f"results={tmp_path}/results", f"data={tmp_path}/data"]
    calmly("status", *arguments)
    calmly("show", "table1", *arguments)
    if isinstance(content, dict):  # and one whose digest was made to fit
        (folder / "record.json").write_text(json.dumps(sign(content)))
        calmly("show", "table1", *arguments)


SETTINGS = {
    "suite": "x", "backbone": {"name": "x", "arch": "vit_tiny_patch16_224"},
    "dataset": {"name": "d", "task": "classification", "prepared": "/nowhere"},
    "method": {"name": "full", "file": "baselines/full.py"},
    "protocol_name": "p", "protocol": {"epochs": 1, "warmup_epochs": 0},
}  # fmt: skip


@bounded
@given(content=mutated(SETTINGS))
def test_any_settings(tmp_path, content):
    if isinstance(content, dict):
        content = {**content, "results": f"{tmp_path}/results"}
    assert calmly("execute", "--settings", json.dumps(content)) == 2
