"""Adding a method: one file and one line of configuration end as a row in the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from snella.check import Subject, examine
from snella.cli import main
from snella.errors import UserError
from snella.methods import template
from snella.methods.base import build_method
from snella.models.tiny import BASE_SIZE, missing_extra
from snella.suite import config as configuration
from snella.suite import plan

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "svf.py"
GUIDE = ROOT / "docs" / "add-a-baseline.md"
SUITE = {
    "title": "One data set",
    "backbone": "vit-quick",
    "protocol": "quick",
    "overrides": {"epochs": 1, "warmup_epochs": 0, "evaluate_every": 1},
    "groups": {"natural": ["digits"]},
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch) -> Path:
    """An empty working directory that is not the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_config(folder: Path, methods: dict) -> None:
    suite = {**SUITE, "methods": list(methods)}
    config = {"suite": "mine", "suites": {"mine": suite}, "methods": methods}
    (folder / "my.yaml").write_text(yaml.safe_dump(config))


def table1(folder: Path) -> subprocess.CompletedProcess[str]:
    """Ask the repository's Snakefile for Table 1 of the configuration in ``folder``."""
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", ".",
         "--configfile", "my.yaml",
         "--cores", "1", "--", "results/table1.tex"],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip


def record(folder: Path, method: str) -> dict:
    path = folder / f"results/runs/mine/vit-quick/digits/{method}/seed0/record.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_from_one_file_to_a_row_in_the_table(elsewhere: Path) -> None:
    """A new file, a file by path, a broken one: good rows finish; an edit retrains its row only."""
    assert main(["new-baseline", "mymethod"]) == 0
    file = elsewhere / "baselines" / "mymethod.py"
    (elsewhere / "broken.py").write_text(f"{EXAMPLE.read_text()}\nimport torhc\n")
    rows = {"mymethod": {"label": "My method"}, "svf": {"file": str(EXAMPLE), "label": "SVF"}}
    write_config(elsewhere, {**rows, "broken": {"file": "broken.py"}})

    done = table1(elsewhere)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("snella: ")]
    assert told and "broken.py does not import" in told[0], done.stderr
    before = {name: record(elsewhere, name) for name in rows}
    assert [r["status"] for r in before.values()] == ["ok", "ok"]
    assert not record(elsewhere, "broken")

    write_config(elsewhere, rows)
    file.write_text(file.read_text().replace("new_zeros", "new_ones"))
    done = table1(elsewhere)
    assert done.returncode == 0, done.stderr
    shown = (elsewhere / "results" / "table1.md").read_text()
    after = {name: record(elsewhere, name) for name in rows}
    assert after["svf"] == before["svf"]
    assert after["mymethod"]["identity"] != before["mymethod"]["identity"]
    for name, row in rows.items():
        line = next(line for line in shown.splitlines() if row["label"] in line)
        assert f"{100 * after[name]['metrics']['last']['top1']:.1f}" in line


def test_the_new_file_passes_the_check(elsewhere: Path, capsys) -> None:
    assert main(["new-baseline", "my_method"]) == 0
    told = capsys.readouterr().out
    assert "snella check my_method" in told and "methods: {my_method: {label" in told
    assert "further_methods" not in told  # the quick suite has all rows
    assert main(["check", "my_method"]) == 0
    shown = capsys.readouterr().out
    assert "55,296" in shown and "checks passed on vit, swin, convnext" in shown
    written = (elsewhere / "baselines" / "my_method.py").read_text()
    assert written.startswith('"""my_method: ') and "class MyMethod(Method):" in written
    assert "NAME" not in written and "Template" not in written
    assert main(["new-baseline", "one_more", "--config", "suite=dinov2"]) == 0
    assert "suites: {dinov2: {further_methods: [one_more]}}" in capsys.readouterr().out


def test_a_new_file_may_lie_anywhere(elsewhere: Path, capsys) -> None:
    assert main(["new-baseline", "somewhere/else/mine.py"]) == 0
    assert "mine: {file: somewhere/else/mine.py" in capsys.readouterr().out
    assert (elsewhere / "somewhere/else/mine.py").is_file()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("My-Method", "Try 'my_method'"),
        ("2stage", "Try 'my_2stage'"),
        ("_helper", "Try 'helper'"),
        ("class", "Try 'my_class'"),
        ("../escape", "Try 'escape'"),
        ("", "Try 'my'"),
        ("full", "full.py exists already"),
    ],
)
def test_bad_names_are_refused_with_a_better_one(elsewhere, capsys, name: str, words: str) -> None:
    assert main(["new-baseline", name]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert list(elsewhere.iterdir()) == []


def test_nothing_is_overwritten(elsewhere: Path, capsys) -> None:
    assert main(["new-baseline", "mine"]) == 0
    file = elsewhere / "baselines" / "mine.py"
    file.write_text("# my work\n")
    assert main(["new-baseline", "mine"]) == 2
    assert main(["new-baseline", str(file)]) == 2
    assert file.read_text() == "# my work\n"
    assert "left as it is" in capsys.readouterr().err


def test_a_row_is_called_like_its_file_unless_it_says_otherwise(elsewhere: Path) -> None:
    main(["new-baseline", "mine"])
    methods = {"mine": None, "twice": {"file": "mine", "hyperparameters": {"roles": ["fc1"]}}}
    config = configuration.load(overrides={"methods": methods})
    assert [plan.find_method(config, name) for name in ("mine", "twice", "linear")] == [
        (Path("baselines/mine.py"), {}),
        (Path("baselines/mine.py"), {"roles": ["fc1"]}),
        (ROOT / "baselines" / "linear.py", {}),
    ]
    with pytest.raises(UserError, match="Did you mean 'mine'"):
        plan.find_method(config, "mien")


def test_an_added_row_closes_every_table(elsewhere: Path) -> None:
    """In a suite that names its rows it is one of the further methods."""
    main(["new-baseline", "mine"])
    config = configuration.load(overrides={"methods": {"mine": {}}})
    for table in config.tables:
        suite = plan.for_table(config, table).suite
        named = config.suites[suite].methods is not None
        asked = {"methods": {"mine": {}}}
        if named:
            assert "mine" not in plan.table_methods(config, table)[-1][1]
            asked["suites"] = {suite: {"further_methods": ["mine"]}}
        rows = plan.table_methods(configuration.load(overrides=asked), table)
        assert rows[-1][1][-1] == "mine"
        if table in ("table1", "table5", "table6"):  # the main one of each family shows it
            assert config.tables[table].get("others", "") is not None


def test_a_row_of_one_table_may_be_added_to_another() -> None:
    """DoRA has its place in Table 13; asked for, it closes Table 1 as well."""
    asked = {"suites": {"quick": {"further_methods": ["dora"]}}}
    plain, config = configuration.load(), configuration.load(overrides=asked)
    assert "dora" not in [m for _, group in plan.table_methods(plain, "table1") for m in group]
    assert plan.table_methods(config, "table1")[-1] == (None, ["dora"])
    assert plan.suite_methods(config).count("dora") == 1
    with pytest.raises(UserError, match=r"Unknown method 'doar'\. Did you mean 'dora'"):
        wrong = {"suites": {"quick": {"further_methods": ["doar"]}}}
        plan.plan(configuration.load(overrides=wrong))


@pytest.mark.parametrize("kind", BASE_SIZE)
@pytest.mark.parametrize("path", [EXAMPLE, Path(template.__file__)], ids=["svf", "template"])
def test_example_and_template_pass_on_every_family(path: Path, kind: str) -> None:
    found = examine(Subject(build_method(path, {}), kind))
    assert [f for f in found if f.status != "passed"] == []
    if kind == "vit":
        assert found[1].text == "55,296"


def test_the_guide_shows_the_example_as_it_is() -> None:
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) <= 60
    assert f"```python\n{source}```" in GUIDE.read_text()


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_guides_method_that_chooses_by_data_passes(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "fisher.py"
    blocks = GUIDE.read_text().split("```python\n")[1:]
    file.write_text(next(b.split("```")[0] for b in blocks if "class Fisher" in b))
    found = examine(Subject(build_method(file, {}), kind), without=["parameters, full"])
    assert [f for f in found if f.status != "passed"] == []


@pytest.mark.parametrize("kind", ["sam", "sd3"])
def test_the_example_may_claim_further_families(tmp_path: Path, kind: str) -> None:
    if missing_extra(kind):
        pytest.skip(f"needs the extra {missing_extra(kind)}")
    file = tmp_path / "svf.py"
    claim = '    supports: ClassVar[frozenset[str]] = frozenset({"vit", "sam", "sd3"})\n'
    assert claim.strip() in GUIDE.read_text()
    file.write_text(EXAMPLE.read_text().replace("    def adapt", f"{claim}\n    def adapt"))
    found = examine(Subject(build_method(file, {}), kind))
    assert [f for f in found if f.status != "passed"] == []


def test_every_public_name_is_in_the_reference() -> None:
    import snella
    import snella.method
    import snella.tasks

    page = (ROOT / "docs" / "api.md").read_text()
    listed = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    for module in (snella, snella.method, snella.tasks):
        assert set(module.__all__) - listed <= {"__version__"}, module.__name__


def test_the_guide_names_every_hook_and_check() -> None:
    from snella.check import CHECKS
    from snella.method import Method

    guide = GUIDE.read_text()
    hooks = [n for n, v in vars(Method).items() if callable(v) and not n.startswith("_")]
    hooks = [n for n in hooks if not n.startswith("model_")]
    assert "adapt" in hooks and "load_state" in hooks
    assert [name for name in (*hooks, *CHECKS) if name not in guide] == []
