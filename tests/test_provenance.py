"""What a run's folder says, what differs between trees, failures to try again, the crate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import report_support as support

from snella.cli import main
from snella.jobs.runs import find_run
from snella.report.runs.details import describe, repeat
from snella.report.runs.diff import compare, compare_records
from snella.suite.status import is_running

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"suite": "smoke", "seed": 0, "method": {"name": "lora-8"}, "results": "results"}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def results(tmp_path) -> Path:
    """A small tree: two methods on two data sets, one of them failed."""
    for method in ("full", "lora-8"):
        for dataset in ("digits", "leaves"):
            failed = (method, dataset) == ("full", "leaves")
            outcome = {"status": "failed", "reason": "RuntimeError: boom"} if failed else {}
            made = support.record(
                method, dataset, None if failed else 0.5, suite="smoke", **outcome
            )
            folder = support.write_run(tmp_path / "results", made)
            (folder / "config.json").write_text(json.dumps(SETTINGS))
            (folder / "log.txt").write_text("line\n" * 50 + "\x1b[2Jlast line\n")
            (folder / "history.csv").write_text("epoch,loss,val\n0,2.0,0.3\n1,inf,0.5\n")
    return tmp_path / "results"


def verb(results: Path, *arguments: str) -> int:
    return main([*arguments, "--config", "suite=smoke", f"results={results}"])


# show


def test_a_run_is_found_by_its_folder_its_name_or_parts_of_it(results, monkeypatch):
    folder = results / "runs/smoke/vit-quick/digits/lora-8/seed0"
    for name in (str(folder), f"{folder}/record.json", "smoke/vit-quick/digits/lora-8/seed0",
                 "digits/lora-8", "lora-8/seed0"):  # fmt: skip
        if name != "lora-8/seed0":
            assert find_run(results, name) == folder
    monkeypatch.chdir(results)
    assert (
        find_run(results, "runs/smoke/vit-quick/digits/lora-8/seed0").resolve() == folder.resolve()
    )


@pytest.mark.parametrize(
    "name,words",
    [
        ("lora-8/seed0", "fits 2 runs"),
        (
            "smoke/vit-quick/digits/lora-9/seed0",
            "Did you mean 'smoke/vit-quick/digits/lora-8/seed0'",
        ),
        ("tabel1", "Did you mean 'table1'"),
        ("../../etc/x", "There is no folder '../../etc/x', and no such run"),
        ("results-of/nobody", "There is no folder 'results-of/nobody', and no such run"),
    ],
)
def test_a_run_that_is_not_there_is_one_line(results, capsys, name, words):
    assert verb(results, "show", name) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_show_prints_everything_about_a_run(results, capsys):
    assert verb(results, "show", "digits/lora-8") == 0
    text = capsys.readouterr().out
    for words in ("Top-1 accuracy (last, epoch 10)", "50.00 %", "0123456789", "A CPU", "last line",
                  "git checkout 0123456789", "normalisation", "snella diff"):  # fmt: skip
        assert words in text, words
    assert "\x1b" not in text and text.count("  line\n") == 19
    assert repeat(SETTINGS) in text


def test_show_as_json_is_what_the_folder_says(results, capsys):
    assert verb(results, "show", "leaves/full", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "failed" and found["reason"] == "RuntimeError: boom"
    assert found["curve"]["loss"] == [2.0, None] and found["settings"] == SETTINGS
    assert verb(results, "show", "table1", "--json") == 0
    assert {"cells", "caption"} <= set(json.loads(capsys.readouterr().out))


def test_a_run_without_a_record_yet_is_shown_by_its_settings(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    found = describe(tmp_path)
    assert found["status"] == "unfinished" and found["run"]["method"] == "lora-8"


def test_a_file_that_is_not_as_recorded_is_named(tmp_path):
    files = dict.fromkeys(["adapter.safetensors", "predictions"], "0" * 64)
    made = support.record("full", "digits", 0.5, files=files)
    folder = support.write_run(tmp_path, made)
    (folder / "predictions").mkdir()
    assert describe(folder)["changed"] == ["adapter.safetensors", "predictions"]


def test_the_repeating_command_is_the_run_itself(make_run, tmp_path):
    """Its settings give a run of the same identity, in a results folder of its own."""
    import shlex

    from snella.runs.identity import settings_digest
    from snella.runs.run import Run

    run = make_run("linear")
    words = shlex.split(repeat(json.loads(run.to_json())))
    assert words[:3] == ["snella", "execute", "--settings"]
    twin = Run.from_json(words[3])
    assert settings_digest(twin) == settings_digest(run) and twin.results == "reproduced"


def test_the_repeating_command_gives_the_same_weights_and_numbers(make_run, tmp_path, monkeypatch):
    """What a person pastes trains the run anew, elsewhere, and `diff` finds nothing."""
    import shlex

    from snella.runs.execute import execute

    run = make_run("linear")
    assert execute(run)["status"] == "ok"
    *_, repeated, compared = describe(run.folder)["commands"]
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(repeated)[1:]) == 0
    assert (tmp_path / "reproduced" / "runs" / run.key / "adapter.safetensors").is_file()
    configured = ["--configfile", str(ROOT / "config/config.yaml")]
    assert main([*shlex.split(compared)[1:], *configured]) == 0


# diff


def test_equal_trees_are_equal_whatever_they_were_made_with(results, tmp_path, capsys):
    shutil.copytree(results, tmp_path / "copy")
    assert verb(results, "diff", str(results), str(tmp_path / "copy")) == 0
    assert "4 cells in both, 4 equal, 0 different" in capsys.readouterr().out


def test_differences_are_listed_cell_by_cell_with_their_causes(results, tmp_path, capsys):
    other = tmp_path / "other"
    changed = support.record(
        "lora-8", "digits", 0.52, suite="smoke", protocol={"lr": 0.01},
        provenance={"torch": "2.9.0", "commit": "fedcba"},
    )  # fmt: skip
    support.write_run(other, changed)
    support.write_run(other, support.record("linear", "digits", 0.4, suite="smoke"))
    assert verb(results, "diff", str(results), str(other)) == 1
    text = capsys.readouterr().out
    for words in ("50.00 %", "52.00 %", "+2", "protocol.lr: 0.001 → 0.01",
                  "packages.torch: 2.8.0 → 2.9.0", "git.commit: 0123456789 → fedcba",
                  "1 cells in both, 0 equal, 1 different; 3 only in A, 1 only in B"):  # fmt: skip
        assert words in text, words
    assert verb(results, "diff", str(results), str(other), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    (cell,) = found["different"]
    numbers = {c["name"]: c["difference"] for c in cell["outcome"]}
    assert numbers["metrics.last.top1"] == pytest.approx(0.02)


def test_two_runs_are_compared_whatever_they_are_called(results, capsys):
    runs = ["digits/full", "digits/lora-8"]
    assert verb(results, "diff", *runs) == 1
    assert "run.method: full → lora-8" in capsys.readouterr().out
    assert verb(results, "diff", runs[0], str(results)) == 2
    assert "Compare a run with a run" in capsys.readouterr().err


def test_only_what_ran_and_came_out_counts():
    a = support.record("full", "digits", 0.5)
    slower = support.record("full", "digits", 0.5, cost={"train_seconds": 99.0})
    assert compare({"": a}, {"": slower}).equal
    elsewhere = support.record("full", "digits", 0.5, provenance={"cpu": "B CPU"})
    found = compare_records("", a, elsewhere)
    assert found.equal and [c.name for c in found.origin] == ["hardware.cpu"]
    for changes in (
        {"status": "diverged"},
        {"protocol": {"lr": 1.0}},
        {"files": {"predictions": "x"}},
    ):
        assert not compare({"": a}, {"": support.record("full", "digits", 0.5, **changes)}).equal


# retry, status


def test_retry_clears_failures_and_keeps_results(results, capsys):
    failed = results / "runs/smoke/vit-quick/leaves/full/seed0"
    (failed / "checkpoint.pt").write_bytes(b"epoch 3")
    assert verb(results, "retry") == 0
    text = capsys.readouterr().out
    assert failed.as_posix() in text and "snakemake --cores all" in text and "suite=smoke" in text
    assert not (failed / "failure.json").exists() and (failed / "checkpoint.pt").exists()
    assert len(list(results.rglob("record.json"))) == 3
    assert verb(results, "retry") == 0
    assert "nothing to try again" in capsys.readouterr().out


def test_a_diverged_run_is_tried_again_only_by_name(tmp_path):
    made = support.record("full", "digits", None, suite="smoke", status="diverged", reason="nan")
    folder = support.write_run(tmp_path, made)
    assert verb(tmp_path, "retry") == 0 and (folder / "record.json").exists()
    assert verb(tmp_path, "retry", "digits/full") == 0 and not (folder / "record.json").exists()


def test_a_running_cell_is_left_alone_and_says_where_it_runs(make_run, capsys):
    from snella.records import write_record
    from snella.runs.execute import exclusive
    from snella.suite.status import state

    run = make_run("linear")
    run.folder.mkdir(parents=True)
    write_record(run.folder, support.record("linear", "tiny", None, status="failed", reason="x"))
    with exclusive(run.folder):
        how = state(run)
        assert how.name == "running" and f"process {os.getpid()}" in how.reason
        assert verb(Path(run.results), "retry") == 0
    assert "left alone" in capsys.readouterr().out and (run.folder / "failure.json").exists()


# crate


def test_the_crate_holds_every_run_and_says_how_it_ended(results, tmp_path, capsys):
    pytest.importorskip("rocrate")
    (results / "table1.tex").write_text("a table")
    out = tmp_path / "crate.zip"
    assert verb(results, "crate", str(out)) == 0
    with zipfile.ZipFile(out) as archive:
        names = set(archive.namelist())
        graph = json.loads(archive.read("ro-crate-metadata.json"))["@graph"]
    known = {entity["@id"]: entity for entity in graph}
    assert {"Snakefile", "table1.tex", "config/config.yaml"} <= names
    assert "runs/smoke/vit-quick/digits/lora-8/seed0/record.json" in names
    run = known["#run/smoke/vit-quick/leaves/full/seed0"]
    assert run["actionStatus"].endswith("FailedActionStatus") and "boom" in run["error"]
    assert known["#workflow-run"]["instrument"] == {"@id": "Snakefile"}
    files = {e["@id"] for e in graph if "File" in e["@type"]}
    assert files <= names


def test_a_crate_takes_the_place_of_nothing(results, tmp_path, capsys):
    pytest.importorskip("rocrate")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert verb(results, "crate", str(tmp_path / "full")) == 2
    assert "exists" in capsys.readouterr().err
    assert verb(tmp_path / "empty", "crate", str(tmp_path / "new")) == 2
    assert "no records" in capsys.readouterr().err and not (tmp_path / "new").exists()


VALIDATOR = shutil.which("rocrate-validator")
CONTEXT = "https://w3id.org/ro/crate/1.1/context"
TERMS = {
    "ComputationalWorkflow": "https://bioschemas.org/ComputationalWorkflow",
    "FormalParameter": "https://bioschemas.org/FormalParameter",
    "input": "https://bioschemas.org/ComputationalWorkflow#input",
    "output": "https://bioschemas.org/ComputationalWorkflow#output",
}
"""What the context of RO-Crate 1.1 says otherwise than the newer one that rocrate ships."""
PRIME = """
import io, sys, requests, urllib3, requests_cache
cache, url = sys.argv[1:]
body = sys.stdin.buffer.read()
response = requests.Response()
response.status_code, response._content, response.url = 200, body, url
response.request = requests.Request("GET", url).prepare()
response.headers["Content-Type"] = "application/ld+json"
response.raw = urllib3.HTTPResponse(io.BytesIO(body), status=200, preload_content=False)
requests_cache.CachedSession(cache, backend="sqlite", expire_after=-1).cache.save_response(response)
"""


@pytest.mark.skipif(
    VALIDATOR is None, reason="no rocrate-validator on PATH (uv tool install roc-validator)"
)
def test_the_public_validator_accepts_the_crate(results, tmp_path):
    """Workflow Run Crate 0.5, all that is required; offline, with a context put into its cache."""
    rocrate = pytest.importorskip("rocrate")
    (results / "table1.tex").write_text("a table")
    assert verb(results, "crate", str(tmp_path / "crate")) == 0
    shipped = Path(rocrate.__file__).parent / "data" / "ro-crate.jsonld"
    context = json.loads(shipped.read_text())
    context["@context"] |= TERMS
    python = Path(VALIDATOR).read_text().splitlines()[0].removeprefix("#!")
    cache = str(tmp_path / "cache")
    subprocess.run(
        [python, "-c", PRIME, cache, CONTEXT], input=json.dumps(context).encode(), check=True
    )
    done = subprocess.run(
        [VALIDATOR, "-y", "validate", "-p", "workflow-run-crate-0.5", "-l", "required", "--offline",
         "--cache-path", cache, "--skip-availability-check", "--no-paging", "-f", "json",
         "-o", str(tmp_path / "found.json"), str(tmp_path / "crate")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 0 and found["passed"], found["issues"]


def test_a_pipe_where_a_file_was_does_not_stop_the_look(results):
    folder = next(results.glob("runs/*/*/*/*/*/record.json")).parent
    for name in ("config.json", "history.csv", "log.txt", ".lock"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    found = describe(folder)
    assert (found["settings"], found["curve"], found["log"]) == (None, {}, [])
    assert not is_running(folder)
