"""The command line: verbs do what they say, mistakes are one line and exit status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from snella.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def fails(capsys, *arguments: str) -> str:
    """The one line on stderr of a call that must end with status 2."""
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("snella: ") and message.count("\n") == 1
    return message


def places(tmp_path: Path) -> list[str]:
    return [f"results={tmp_path / 'results'}", f"data={tmp_path / 'data'}"]


def test_one_run_from_the_command_line(tmp_path, capsys):
    config = [*places(tmp_path), "protocols.quick.epochs=2", "suite=smoke"]
    assert main(["run", "--method", "linear", "--dataset", "digits", "--config", *config]) == 0
    shown = capsys.readouterr().out
    record = tmp_path / "results/runs/smoke/vit-quick/digits/linear/seed0/record.json"
    assert "epoch 2/2" in shown and "loss" in shown and "left" in shown
    assert record.name in shown and json.loads(record.read_text())["status"] == "ok"
    assert {p.name for p in record.parent.iterdir()} >= {
        "config.json", "record.json", "history.csv", "adapter.safetensors", "log.txt",
    }  # fmt: skip

    assert main(["plan", "--config", *config]) == 0
    assert "16 runs, 1 done, 15 to do" in capsys.readouterr().out
    assert main(["show", "table1", "--config", *config]) == 0
    shown = capsys.readouterr().out
    assert "not run" in shown and "Linear" in shown


def test_lists(capsys):
    assert main(["methods"]) == 0
    assert "SNELLA-32" in capsys.readouterr().out
    assert main(["datasets"]) == 0
    assert "digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["run", "--method", "snela-8", "--dataset", "digits"], "Did you mean 'snella-8'"),
        (["run", "--method", "full", "--dataset", "digit"], "Did you mean 'digits'"),
        (["plan", "--config", "suite=quik"], "Did you mean 'quick'"),
        (["plan", "--config", "protocols.quick.epoch=3"], "'epochs'"),
        (["plan", "--config", "suite"], "KEY=VALUE"),
        (["plan", "--configfile", "nowhere.yaml"], "nowhere.yaml"),
        (["prepare", "x", "--config", "datasets.x.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["prepare", "x", "--config", "datasets.x.label=X"], "datasets.x.path"),
        (["table", "table99"], "table99"),
    ],
)
def test_mistakes(capsys, arguments, words):
    assert words in fails(capsys, *arguments)


def test_a_run_on_a_missing_backbone(tmp_path, capsys):
    config = [*places(tmp_path), "backbones.vit-quick.file=nowhere.safetensors"]
    arguments = ["run", "--method", "linear", "--dataset", "digits", "--config", *config]
    assert "nowhere.safetensors is missing" in fails(capsys, *arguments)


def test_a_folder_in_the_community_layout(tmp_path, capsys):
    import numpy as np
    from PIL import Image

    root = tmp_path / "mine"
    rng = np.random.default_rng(0)
    lists = {"train800": 12, "val200": 4, "test": 6}
    for split, n in lists.items():
        (root / "images" / split).mkdir(parents=True)
        lines = []
        for i in range(n):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.png")
            lines.append(f"images/{split}/{i}.png {i % 2}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    both = (root / "train800.txt").read_text() + (root / "val200.txt").read_text()
    (root / "train800val200.txt").write_text(both)
    config = [
        *places(tmp_path), "suite=smoke", f"datasets.mine.path={root}",
        "protocols.quick.resize=square",
    ]  # fmt: skip
    assert main(["run", "--method", "linear", "--dataset", "mine", "--config", *config]) == 0
    assert "record:" in capsys.readouterr().out.replace("\n", "")
    (root / "images" / "test" / "3.png").write_bytes(b"\x89PNG broken")
    message = fails(capsys, "prepare", "mine", "--config", *config)
    assert "test.txt" in message and "3.png" in message


def test_a_thread_that_was_left_running_does_not_keep_the_program_alive():
    code = (
        "import sys, threading, time\n"
        "from snella.cli import main\n"
        "threading.Thread(target=time.sleep, args=[999]).start()\n"
        "sys.argv = ['snella']\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True)
    assert done.returncode == 0 and done.stdout and b"thread" in done.stderr
