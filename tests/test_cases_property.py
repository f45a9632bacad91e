"""Whatever a user writes: one line and status 2, or success; never a traceback, never a hang."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

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
    "backbones": {
        "small": {
            "arch": "vit_tiny_patch16_224", "kwargs": {"depth": 2, "img_size": 32}, "file": "x",
        }
    },
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
    if verb not in ("run", "execute", "prepare", "check", "new-baseline", "schema"):
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


def lists_of(count: int, split: str) -> str:
    return "".join(f"images/{split}/{i}.png {i % 2}\n" for i in range(count))


LISTS = {"train800": lists_of(3, "a"), "val200": lists_of(2, "b"), "test": lists_of(3, "c")}
LISTS["train800val200"] = LISTS["train800"] + LISTS["val200"]
tokens = st.sampled_from(
    ["images/a/0.png", "images/c/0.png", "0", "1", "-1", "9" * 30, "1e3", " ", "\t", "\n", "\r",
     "\\", "../outside/kept.txt", "/etc/passwd", '"', ",", ";", "\ufeff", "é", "C:",
     "x" * 300, "\x00"]
)  # fmt: skip


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """``content`` cut, with bytes changed, or with something put in."""
    places_ = st.integers(0, len(content))
    cut = places_.map(lambda n: content[:n])
    put = st.tuples(places_, st.binary(min_size=1, max_size=20)).map(
        lambda x: content[: x[0]] + x[1] + content[x[0] :]
    )
    over = st.tuples(places_, st.binary(min_size=1, max_size=4)).map(
        lambda x: content[: x[0]] + x[1] + content[x[0] + len(x[1]) :]
    )
    return st.one_of(cut, put, over, st.binary(max_size=60))


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """A good folder of eight images, a file outside it, and a place for what is prepared."""
    root = tmp_path_factory.mktemp("raw")
    (root / "outside").mkdir()
    (root / "outside/kept.txt").write_text("kept")
    for split, count in (("a", 3), ("b", 2), ("c", 3)):
        (root / f"copy/images/{split}").mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(np.full((8, 8, 3), 40 * i + ord(split) % 9, np.uint8))
            image.save(root / f"copy/images/{split}/{i}.png")
    return root


def prepares(raw: Path, split: str, content: bytes, image: bytes | None = None) -> None:
    """Prepare the folder with one list and perhaps one image changed; nothing else is touched."""
    for name, text in LISTS.items():
        (raw / f"copy/{name}.txt").write_bytes(content if name == split else text.encode())
    if image is not None:
        (raw / "copy/images/c/0.png").write_bytes(image)
    before = contents(raw, "prepared")
    calmly("prepare", "mine", "--config", f"datasets.mine.path={raw}/copy", f"data={raw}/prepared")
    assert contents(raw, "prepared") == before


def contents(folder: Path, besides: str) -> dict[str, bytes]:
    """All files below ``folder`` but those of one part."""
    files = (p for p in folder.rglob("*") if p.is_file())
    names = ((p.relative_to(folder), p) for p in files)
    return {str(name): p.read_bytes() for name, p in names if name.parts[0] != besides}


@bounded
@given(
    split=st.sampled_from(list(LISTS)),
    content=st.lists(tokens | texts, max_size=9).map(lambda parts: "".join(parts).encode())
    | damaged(LISTS["test"].encode()),
)
def test_any_list(raw, split, content):
    prepares(raw, split, content)


def encodings() -> list[bytes]:
    """A small picture in every format that is read, and in some that are not."""
    image = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    found = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PDF"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        found.append(buffer.getvalue())
    return found


@bounded
@given(image=st.sampled_from(encodings()).flatmap(damaged))
def test_any_image(raw, image):
    prepares(raw, "none", b"", image)


WEIGHTS = {"model": {"blocks.0.norm1.weight": torch.ones(24), "cls_token": torch.zeros(1, 1, 24)},
           "epoch": 3, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)}  # fmt: skip


def torch_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


tensors = st.sampled_from(
    [torch.ones(24), torch.full((24,), torch.nan), torch.zeros(3, dtype=torch.int8),
     torch.zeros(0), torch.ones(2, 2).to_sparse()]
)  # fmt: skip
weights = st.one_of(
    damaged(torch_bytes(WEIGHTS)).map(lambda data: ("w.pth", data)),
    mutated(WEIGHTS).map(lambda content: ("w.pth", torch_bytes(content))),
    st.dictionaries(texts | st.just("cls_token"), tensors | leaves, max_size=3).map(
        lambda content: ("w.bin", torch_bytes({"state_dict": content}))
    ),
    damaged(safetensors.torch.save({"cls_token": torch.zeros(1, 1, 24)})).map(
        lambda data: ("w.safetensors", data)
    ),
    st.binary(max_size=60).map(lambda data: ("w.npz", data)),
    st.binary(max_size=60).map(lambda data: ("w.onnx", data)),
)


@bounded
@given(file=weights)
def test_any_weights_and_the_finished_run_stays(tmp_path, make_run, file):
    """A run with weights of another file fails; what it had finished before is as it was."""
    run = make_run(epochs=1, warmup_epochs=0)
    if not (run.folder / "finished.json").exists():
        assert calmly("execute", "--settings", run.to_json()) == 0
    before = (run.folder / "finished.json").read_bytes()
    name, content = file
    (tmp_path / name).write_bytes(content)
    backbone = run.backbone.model_copy(update={"file": (tmp_path / name).as_posix()})
    settings_ = run.model_copy(update={"backbone": backbone}).to_json()
    assert calmly("execute", "--settings", settings_) == 2
    assert (run.folder / "finished.json").read_bytes() == before


def billions() -> bytes:
    anchors = "".join(f"b{i + 1}: &b{i + 1} [{f'*b{i}, ' * 9}x]\n" for i in range(9))
    return f"b0: &b0 [x]\n{anchors}".encode()


def flat_png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def zipped_zeros() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(2**28))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("copy/test.txt", b"images/c/0.png 1000000000\n", 2),
        ("copy/test.txt", b"images/c/0.png " + b"9" * 2**20, 2),
        ("copy/images/c/0.png", flat_png(7000), 0),
        ("copy/images/c/0.png", flat_png(30000), 2),
        ("my.yaml", billions(), 2),
    ],
    ids=["label", "digits", "49 megapixels", "bomb", "yaml"],
)
def test_memory_is_bounded(tmp_path, name, content, status):
    """In a process that may not take more than 1 GB of addresses."""
    for split, text in LISTS.items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / f"copy/{split}.txt").write_text(text)
    for split, count in (("a", 3), ("b", 2), ("c", 3)):
        (tmp_path / f"copy/images/{split}").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, ord(split))).save(
                tmp_path / f"copy/images/{split}/{i}.png"
            )
    (tmp_path / "my.yaml").write_text("suite: smoke\n")
    (tmp_path / name).write_bytes(content)
    places_ = [f"datasets.mine.path={tmp_path}/copy", f"data={tmp_path}/data"]
    done = limited("prepare", "mine", "--configfile", f"{tmp_path}/my.yaml", "--config", *places_)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


def claiming(values: int) -> bytes:
    """A safetensors file of 16 bytes whose header claims a tensor of ``values`` numbers."""
    tensor = {"dtype": "F32", "shape": [values], "data_offsets": [0, 16]}
    header = json.dumps({"cls_token": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


def zeros_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{"embedding/kernel": np.zeros(2**26, np.float32)})
    return buffer.getvalue()


ENDLESS = {
    "zip": ("w.pth", zipped_zeros), "npz": ("w.npz", zeros_npz),
    "shape": ("w.safetensors", lambda: claiming(2**40)),
    "header": ("w.safetensors", lambda: (2**40).to_bytes(8, "little") + b"{}"),
    "pickle": ("w.pth", lambda: b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + bytes(64)),
    "onnx": ("w.onnx", lambda: b"\x3a\xff\xff\xff\xff\x7f" + bytes(64)),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDLESS)
def test_weights_that_claim_more_than_there_is(tmp_path, make_run, case):
    """Read in a process that may not take more than 1 GB besides the files it maps."""
    name, content = ENDLESS[case]
    (tmp_path / name).write_bytes(content())
    run = make_run(epochs=1, warmup_epochs=0)
    backbone = run.backbone.model_copy(update={"file": (tmp_path / name).as_posix()})
    settings_ = run.model_copy(update={"backbone": backbone}).to_json()
    done = limited("execute", "--settings", settings_, what=resource.RLIMIT_DATA)
    assert done.returncode == 2 and name in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def limited(*arguments: str, what: int = resource.RLIMIT_AS) -> subprocess.CompletedProcess[str]:
    """The command in a process of at most 1 GB and 10 s of processor time.

    Addresses are counted or, as torch's libraries alone have more, what is no file that is mapped.
    """

    def limit() -> None:
        resource.setrlimit(what, (2**30, 2**30))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    return subprocess.run(
        [sys.executable, "-m", "snella.cli", *arguments], cwd=ROOT, capture_output=True, text=True,
        check=False, preexec_fn=limit,
    )  # fmt: skip
