"""Environments hold what pyproject.toml asks for, at the pins of requirements.txt, on their own."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ENVS = ROOT / "envs"
KINDS: dict[str, tuple[str, ...]] = runpy.run_path(str(ENVS / "environments.py"))["KINDS"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = """#!PYTHON
import json, pathlib, sys

place, words = pathlib.Path(__file__).resolve().parents[1], sys.argv[1:]
if words[:1] == ["info"]:
    print(json.dumps({"conda_prefix": str(place), "root_prefix": str(place), "platform": "none"}))
elif "--version" in words:
    print("conda 24.9.0")
elif words[:2] == ["env", "create"]:
    at = next(i for i, word in enumerate(words) if word.startswith("--file"))
    file = pathlib.Path(words[at].partition("=")[2] or words[at + 1])
    with (place / "created").open("a") as created:
        created.write(file.read_text())
else:
    print(json.dumps({"get": {"channel_priority": "strict"}}))
"""


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-").replace(".", "-")


def pins(lines: list[str]) -> dict[str, str]:
    """Versions by package."""
    return {name_of(line): line.partition("==")[2] for line in lines if "==" in line}


REQUIREMENTS = pins((ENVS / "requirements.txt").read_text().splitlines())


def environment(kind: str) -> tuple[list[str], dict[str, str]]:
    """An environment's programs, and its pins."""
    content = yaml.safe_load((ENVS / f"{kind}.yaml").read_text())["dependencies"]
    return [d for d in content if isinstance(d, str)], pins(content[-1]["pip"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_environment_is_in_step_with_the_project(kind):
    programs, found = environment(kind)
    wanted = [*PROJECT["dependencies"]]
    for extra in KINDS[kind]:
        wanted += PROJECT["optional-dependencies"][extra]
    assert {name_of(w) for w in wanted} <= set(found)
    assert {n: v for n, v in found.items() if REQUIREMENTS.get(n) != v} == {}
    assert "python=3.11" in programs
    assert "pip install" in (ENVS / f"{kind}.post-deploy.sh").read_text()


def test_the_pinned_environment_has_every_extra_that_it_is_said_to_have():
    extras = re.search(r"\[(.*)\]", PROJECT["optional-dependencies"]["dev"][0])
    assert extras
    for extra in ("dev", *extras[1].split(",")):
        for requirement in PROJECT["optional-dependencies"][extra]:
            if not requirement.startswith("snella["):
                assert name_of(requirement) in REQUIREMENTS, requirement


@pytest.mark.parametrize("file", ["Dockerfile", "envs/snella.def"])
def test_images_are_built_from_the_pins_and_from_files_there_are(file):
    text = (ROOT / file).read_text()
    assert "--requirement envs/requirements.txt" in text
    assert "--no-deps --editable ." in text
    copied = re.findall(r"^COPY (\S+) ", text, re.M)
    if "%files" in text:
        section = text.split("%files")[1].split("%post")[0]
        copied = [line.split()[0] for line in section.strip().splitlines()]
    assert copied and all((ROOT / name).exists() for name in copied)


def test_every_rule_names_an_environment_that_exists():
    for rules in (ROOT / "workflow/rules").glob("*.smk"):
        for name in re.findall(r'"(\.\./\.\./envs/[^"]*)"', rules.read_text()):
            assert (rules.parent / name).resolve().is_file(), (rules.name, name)


def test_snakemake_creates_them_where_it_copies_them(tmp_path):
    """With a stand-in for conda: what it is told to create names no other file."""
    conda = tmp_path / "bin" / "conda"
    conda.parent.mkdir()
    conda.write_text(CONDA.replace("PYTHON", sys.executable))
    conda.chmod(0o755)
    (tmp_path / "bin" / "activate").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--sdm", "conda",
         "--conda-create-envs-only", "--conda-prefix", str(tmp_path / "prefix"),
         "--config", "suite=smoke", f"results={tmp_path}/results", f"data={tmp_path}/data",
         "--", f"{tmp_path}/results/table1.tex"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    created = (tmp_path / "created").read_text()
    assert "torch==" in created and "-r " not in created
