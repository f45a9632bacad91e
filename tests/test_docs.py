"""What README and docs tell people to type works as printed, in a folder of any name."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import report_support
import yaml
from PIL import Image

from snella.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "baselines|benchmarks|config|docs|envs|profiles|snella|tests|workflow"
NOT_HERE = ("config/search/NAME.yaml", "tests/test_custom_models.py")
"""A placeholder, and a file of PEFT."""
RUNS = ("show", "diff", "crate")
"""Verbs that look at runs: two of them are there."""
SMALL = ["--config", "protocols.quick.epochs=1", "protocols.quick.warmup_epochs=0"]
"""Settings that shorten the one command that trains."""
CHECKED_ELSEWHERE = ("snella check ",)
"""Verbs of half a minute each, whose tests are tests/test_check.py and test_add_baseline.py."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def commands() -> list[str]:
    """Every command line of README and docs, once, without its comment."""
    found: dict[str, None] = {}
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s+#.*|^#.*", "", line).strip()
                if command:
                    found[command] = None
    return list(found)


def listed() -> list[Path]:
    """The repository's files, seen from its root."""
    found = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    return [Path(name) for name in filter(None, found.split("\0")) if (ROOT / name).is_file()]


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as GitHub and the site spell them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_no_file_is_empty():
    empty = [f for f in listed() if f.name != "py.typed" and not (ROOT / f).stat().st_size]
    assert empty == []


def test_every_document_has_a_heading_and_text():
    for file in (f for f in listed() if f.suffix == ".md"):
        first, _, rest = (ROOT / file).read_text().partition("\n")
        assert first.startswith("# ") and len(rest.split()) > 5, file


def test_the_navigation_holds_every_page_once():
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"\S+\.md$", text.partition("\nnav:")[2].partition("\nplugins:")[0], re.M)
    assert sorted(named) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


def test_links_lead_somewhere():
    """Files and headings; what pages name in code is a file, too, where it looks like one."""
    documents = [ROOT / file for file in listed() if file.suffix == ".md"]
    for page in documents:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith(("http://", "https://", "mailto:")):
                continue
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(file), f"{page}: {target}"
    for page in documents:
        for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", page.read_text()):
            assert (ROOT / name).exists() or name in NOT_HERE, f"{page}: {name}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The repository in a folder whose name has a space and an umlaut, and files of pages."""
    folder = tmp_path_factory.mktemp("docs") / "a folder, größer" / "snella-bench"
    for name in listed():
        if name.parts[0] not in ("tests", "docs", "benchmarks"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (own,) = [b for b in blocks(ROOT / "README.md", "yaml") if b.startswith("# my.yaml")]
    (folder / "my.yaml").write_text(own)
    (own,) = blocks(ROOT / "docs/add-a-task.md", "yaml")
    (folder / "spots.yaml").write_text(own)
    shutil.copytree(ROOT / "tests/families", folder / "tasks")
    return folder


def write_runs(folder: Path) -> None:
    """The same run in two results folders, and none of an earlier crate."""
    (folder / "results-crate.zip").unlink(missing_ok=True)
    for results in ("results", "reproduced"):
        made = report_support.record("snella-8", "digits", 0.5, suite="quick")
        shutil.rmtree(folder / results, ignore_errors=True)
        report_support.write_run(folder / results, made)


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments], cwd=folder, capture_output=True,
        text=True, check=False, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_there_are_commands_to_test():
    assert len(commands()) > 15


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("snella ")])
def test_verbs(clone, monkeypatch, capsys, command):
    if command.startswith(CHECKED_ELSEWHERE):
        command = "snella check --help"
    monkeypatch.chdir(clone)
    arguments = shlex.split(command.partition(">")[0])[1:]
    if arguments[:1] == ["new-baseline"]:
        (clone / "baselines" / f"{arguments[1]}.py").unlink(missing_ok=True)
    if arguments[0] in RUNS:
        write_runs(clone)
    if arguments[0] == "run" and "--help" not in arguments:
        arguments += SMALL
    try:
        status = main(arguments)
    except SystemExit as ended:  # --help, --version
        status = ended.code
    written = capsys.readouterr()
    assert status == 0 or (arguments[0] == "doctor" and status == 1), written.err
    assert written.out


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("snakemake ")])
def test_workflow_commands_are_understood(clone, command):
    """Snakemake takes them as they are printed, and finds what there is to do."""
    slurm = importlib.util.find_spec("snakemake_executor_plugin_slurm")
    if "profiles/slurm" in command and slurm is None:
        pytest.skip("the SLURM plug-in is not installed")
    arguments = shlex.split(command)[1:]
    done = snakemake(clone, *([] if "--unlock" in arguments else ["--dry-run"]), *arguments)
    assert done.returncode == 0, done.stderr


def test_a_target_never_follows_an_option_that_takes_several_values():
    texts = [page.read_text() for page in PAGES]
    others = [*ROOT.glob("config/*.yaml"), *ROOT.glob("workflow/**/*.yaml"), ROOT / "Snakefile"]
    for text in [*texts, *(path.read_text() for path in others)]:
        for line in re.findall(r"snakemake (?:--)?[^`\n]*?results/table1\.tex", text):
            assert " -- " in line, line


def test_the_workflow_writes_a_table_in_a_folder_of_any_name(clone):
    """The whole way of a job: shell, log, overlay, table; no training."""
    arguments = ["--cores", "1", "--config", "suite=smoke", "allow_missing=true"]
    done = snakemake(clone, *arguments, "--", "results/table1.tex")
    assert done.returncode == 0, done.stderr
    assert "not run" in (clone / "results/table1.tex").read_text()
    done = snakemake(clone, *arguments[2:], "--report", "s.html", "--", "results/table1.tex")
    assert done.returncode == 0 and "table1.tex" in (clone / "s.html").read_text(), done.stderr


ONE_RUN = [
    "suite=smoke", "protocols={quick: {epochs: 1, warmup_epochs: 0}}",
    "suites={smoke: {methods: [linear], groups: {natural: [digits], specialized: null, "
    "structured: null, fgvc: null}}}",
]  # fmt: skip
OWN_DATA = [
    "protocols={fair: {epochs: 1, warmup_epochs: 0, image_size: 32}}",
    "suites={mine: {backbone: vit-quick, methods: [linear], seeds: [0]}}",
]  # fmt: skip


@pytest.fixture
def fresh(clone, tmp_path) -> Path:
    """A clone in which nothing has run."""
    folder = tmp_path / "a folder, größer" / "snella-bench"
    made = {"results", "reproduced", "data", "logs", ".snakemake"}
    shutil.copytree(clone, folder, ignore=lambda at, _: made if at == str(clone) else set())
    return folder


def typed(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command as a user types it there."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_make_table1_really_runs(fresh):
    """README's first command, of one run: data, training, table, PDF; then nothing is left."""
    small = shlex.join(["snakemake", "--cores", "1", "--config", *ONE_RUN])
    done = typed(fresh, "make", "table1", "-o", ".venv/.ready", f"SNAKEMAKE={small}")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("linear on digits, seed 0: ok, top1") == 1 and "(1 of 1" in said
    text = (fresh / "results/table1.tex").read_text()
    assert "Linear" in text and r"\begin{tabular}" in text
    assert (fresh / "results/table1.pdf").exists() == bool(shutil.which("pdflatex"))
    again = typed(fresh, *shlex.split(small), "--", "results/table1.tex")
    assert "Nothing to be done" in again.stdout + again.stderr


def test_own_data_really_run(fresh):
    """README's my.yaml and its command, with a small folder of images for /data/vtab-1k/..."""
    place = fresh / "eigene Bilder, größer"
    for split, count in (("train800", 8), ("val200", 4), ("test", 6)):
        (place / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 36), (90 * (i % 3), i, len(split))).save(
                place / f"{split}/{i}.jpg"
            )
        lines = (f"{split}/{i}.jpg {i % 3}\n" for i in range(count))
        (place / f"{split}.txt").write_text("".join(lines))
    union = (place / "train800.txt").read_text() + (place / "val200.txt").read_text()
    (place / "train800val200.txt").write_text(union)
    own = (fresh / "my.yaml").read_text()
    (fresh / "my.yaml").write_text(own.replace("/data/vtab-1k/oxford_iiit_pet", f'"{place}"'))
    (printed,) = [
        command for command in commands()
        if command.startswith("snakemake --cores all --configfile my.yaml -- results/table1.tex")
    ]  # fmt: skip
    before, target = printed.split(" -- ")
    done = typed(fresh, *shlex.split(before), "--config", *OWN_DATA, "--", target)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (fresh / "results/table1.tex").read_text()
    assert "suite mine" in text and "Linear &" in text
    assert "1 test image is also a training image" in text  # the grey ones of i = 1


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_targets_exist(command):
    done = subprocess.run(
        ["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def make(folder: Path, *arguments: str) -> str:
    """What make says, without making an environment first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["make", "-o", ".venv/.ready", *arguments], cwd=folder, capture_output=True, text=True,
        check=False, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("target", ["table1", "table5", "table6", "pretrain"])
def test_what_make_types_is_understood(clone, target):
    printed = make(clone, "--dry-run", target).replace("\\\n", " ")
    commands_ = re.findall(r"(?<![\w-])snakemake (-[^;|\n]*)", printed)
    assert commands_
    for command in commands_:
        done = snakemake(clone, "--dry-run", *shlex.split(command))
        assert done.returncode == 0, done.stderr


def test_make_writes_the_page_and_cleans_up(clone):
    write_runs(clone)
    (clone / "results/README.md").write_text("tracked")
    assert "results/report.html" in make(clone, "report")
    make(clone, "clean")
    assert [path.name for path in (clone / "results").iterdir()] == ["README.md"]


def test_no_command_is_left_untested():
    known = (
        "snella ",
        "snakemake ",
        "make ",
        "pip ",
        "uv ",
        "python benchmarks/",
        "python scripts/",
    )
    assert [c for c in commands() if not c.startswith(known)] == []


def test_configuration_in_the_docs_is_accepted():
    """Every YAML block of README and docs fits the models when it is laid over the shipped one."""
    from snella.suite import config as configuration

    for page in PAGES:
        for block in blocks(page, "yaml"):
            content = yaml.safe_load(block)
            if isinstance(content, dict) and set(content) <= set(configuration.Config.model_fields):
                configuration.load(ROOT / "config/config.yaml", content)


def test_python_of_the_public_interface_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(ROOT / "docs" / "api.md", "python"):
        exec(compile(block, "docs/api.md", "exec"), {})


def test_the_example_of_results_plots(tmp_path, monkeypatch, capsys):
    """On the records of two runs."""
    import matplotlib

    from snella.records import write_record

    matplotlib.use("Agg")
    info = {"name": "top1", "title": "Top-1 accuracy", "unit": "%", "higher_is_better": True}
    for method, value in (("full", 0.5), ("linear", 0.25)):
        names = {"suite": "smoke", "backbone": "vit-quick", "dataset": "digits", "method": method}
        record = {
            "schema": 2, "status": "ok", "reason": None, "task": "classification",
            "run": {**names, "protocol": "quick", "seed": 0}, "metric": "top1",
            "protocol": {"selection": "last", "name": "quick"},
            "metric_info": [{**info, "lower": 0.0, "upper": 1.0}],
            "metrics": {"last": {"epoch": 1, "top1": value}},
            "parameters": {"trainable": 10, "total": 20, "head": 1, "with_head": 11},
        }  # fmt: skip
        folder = tmp_path / f"results/runs/smoke/vit-quick/digits/{method}/seed0"
        folder.mkdir(parents=True)
        write_record(folder, record)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py"])
    runpy.run_path(str(ROOT / "docs/examples/results.py"))
    assert "50.0" in capsys.readouterr().out
    assert (tmp_path / "results.png").exists()


def test_the_library_example_trains(tmp_path, monkeypatch):
    """README's loop, on a tiny model and one batch."""
    import torch
    from torch.nn.functional import cross_entropy

    from snella.models.tiny import tiny_backbone

    class Optimizer:
        def step(self) -> None: ...

        def zero_grad(self) -> None: ...

    monkeypatch.chdir(tmp_path)
    model = tiny_backbone()
    size = model.patch_embed.img_size
    batch = (torch.zeros(2, 3, *size), torch.tensor([0, 1]))
    (block,) = blocks(ROOT / "README.md", "python")
    names = {
        "model": model, "epochs": 1, "loader": [batch], "optimizer": Optimizer(),
        "loss": lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
    }  # fmt: skip
    exec(compile(block, "README.md", "exec"), names)
    assert list((tmp_path / "adapter").glob("*.safetensors"))


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    site = ["--site-dir", str(tmp_path / "s")]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", *site],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "snella.results.frame" in (tmp_path / "s/api/index.html").read_text()
    assert (tmp_path / "s/step_time_gpu.png").is_file()  # pictures that pages show lie in docs/
