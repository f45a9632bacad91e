"""Coordinators, retries and requests, without a cluster; tests/slurm has the real thing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from snella.errors import UserError
from snella.jobs import coordinator, retries, slurm, submission
from snella.jobs.coordinator import Coordinator
from snella.jobs.requests import Requests
from snella.records import write_record
from snella.suite import config as configuration

HOLD = """
import sys, time
from pathlib import Path
from snella.jobs.coordinator import Coordinator
held = Coordinator(Path(sys.argv[1]))
held.note("snella_1")
print("held", flush=True)
time.sleep(600)
"""
PARTITIONS = "cpu*|(null)|64|256000\ngpu|gpu:a100:4(S:0-1)|32+|128000+\ngpu|gpu:4|16|64000\n"


@pytest.fixture
def answers(monkeypatch) -> dict[str, str | None]:
    """What SLURM's commands answer, by name."""
    said: dict[str, str | None] = {"sinfo": PARTITIONS, "squeue": ""}
    monkeypatch.setattr(slurm, "_ask", lambda command, *arguments: said[command])
    return said


def run_job(tmp_path: Path, method: str = "full", attempt: int = 1) -> SimpleNamespace:
    """As much of a Snakemake job as the decision about a retry looks at."""
    return SimpleNamespace(
        rule=SimpleNamespace(name="run", restart_times=2),
        wildcards=["search/", "s", "b", "digits", method, "0"],
        output=[str(tmp_path / method / "record.json")],
        attempt=attempt,
        is_group=lambda: False,
    )


def failure(folder: Path, transient: bool) -> None:
    run = dict.fromkeys(("suite", "backbone", "dataset", "method", "protocol"), "x") | {"seed": 0}
    write_record(
        folder, {"schema": 2, "status": "failed", "reason": "x", "run": run, "transient": transient}
    )


def test_the_second_coordinator_is_told_and_a_killed_one_leaves_no_lock(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {first.pid} on .* works on"):
        Coordinator(tmp_path)
    first.kill()
    first.wait()
    assert Coordinator(tmp_path).former["jobs"] == "snella_1"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX")
def test_a_results_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write results in"):
        Coordinator(tmp_path / "file" / "results")


def test_jobs_of_a_former_coordinator_are_waited_for(tmp_path, answers, monkeypatch):
    queue = iter(["7|RUNNING|None\n8|PENDING|Priority\n", None, "7|RUNNING|None\n", ""])
    monkeypatch.setattr(slurm, "_ask", lambda *command: next(queue))
    monkeypatch.setattr(coordinator, "POLL_SECONDS", 0)
    Coordinator(tmp_path).note("snella_1")
    said: list[str] = []
    assert Coordinator(tmp_path).wait_for_former(said.append)
    assert "SLURM 7, 8" in said[0] and "scancel --name snella_1" in said[0]
    assert len(said) == 3 and "does not answer" in said[1] and "SLURM 7)" in said[2]


def test_nothing_is_waited_for_where_no_coordinator_was(tmp_path):
    assert not Coordinator(tmp_path).wait_for_former(pytest.fail)


def test_why_jobs_wait_is_said_in_words(answers):
    answers["squeue"] = "1|PENDING|Resources\n2|PENDING|PartitionTimeLimit\n3|RUNNING|None\n"
    line = slurm.pending_line(slurm.jobs("x") or ())
    assert line.startswith("2 jobs pending: ") and "PartitionTimeLimit" in line
    assert "docs/cluster.md" in line
    answers["squeue"] = "1|PENDING|Priority\n"
    assert slurm.pending_line(slurm.jobs("x") or ()) == "1 job pending: 1 Priority"


@pytest.mark.parametrize(
    "request_,words",
    [
        (("gpus", 1, 1, 0), "There are: cpu, gpu"),
        (("cpu", 1, 1, 0), "has no GPU for rule run; name one that has (cluster.partition: gpu)"),
        (("", 1, 1, 0), "'cpu' has no GPU"),  # the cluster's default
        (("gpu", 1, 33, 0), "at most 32 cores"),
        (("gpu", 1, 1, 128_001), "at most 128000 MB"),
    ],
)
def test_a_request_that_no_node_could_meet_is_refused(answers, request_, words):
    partition, gpus, threads, memory = request_
    resources = {"slurm_partition": partition, "gpu": gpus, "mem_mb": memory}
    job = SimpleNamespace(rule=SimpleNamespace(name="run"), resources=resources, threads=threads)
    with pytest.raises(UserError) as caught:
        slurm.check_jobs([job])
    assert words in str(caught.value)


def test_requests_that_fit_pass_and_so_does_all_when_slurm_is_silent(answers):
    fits = {"slurm_partition": "cpu,gpu", "gpu": 1, "mem_mb": 128_000}
    job = SimpleNamespace(rule=SimpleNamespace(name="run"), resources=fits, threads=32)
    slurm.check_jobs([job])
    answers["sinfo"] = None
    job.resources = {"slurm_partition": "nowhere"}
    slurm.check_jobs([job])


def test_more_memory_ends_where_nodes_end(answers):
    assert slurm.largest_memory("gpu") == 128_000
    assert slurm.largest_memory("") == 256_000
    assert slurm.largest_memory("nowhere") is None


def test_a_failed_run_gets_more_memory_and_time_but_no_more_than_there_is(answers):
    config = configuration.load(overrides={"cluster": {"partition": "gpu", "memory_mb": 50_000}})
    asks = Requests(config, remote=lambda: True)
    asks.check([])
    assert [asks.memory(None, attempt) for attempt in (1, 2, 3)] == [50_000, 100_000, 128_000]
    assert [asks.minutes(None, attempt) for attempt in (1, 2)] == [120, 240]
    assert asks.gpu(None) == 1


def test_the_profile_says_in_one_line_that_the_executor_is_missing(monkeypatch, capsys):
    """As Snakemake reads it; its own answer would be its usage."""
    yte = pytest.importorskip("yte")
    text = (ROOT / "workflow/profiles/slurm/config.yaml").read_text()
    monkeypatch.setattr(slurm, "find_spec", lambda name: object())
    found = yte.process_yaml(text, require_use_yte=True)
    assert found["executor"] == "slurm" and found["default-resources"]["runtime"] == 60
    assert not [key for key in found if key.startswith("_")]
    monkeypatch.setattr(slurm, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        yte.process_yaml(text, require_use_yte=True)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("snella: ") and "[bench,cluster]" in line


def test_partitions_and_account_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SNELLA_PARTITION", "a100")
    monkeypatch.setenv("SNELLA_ACCOUNT", "lab")
    asks = Requests(configuration.load(), remote=lambda: True)
    assert (asks.partition(None), asks.account(None)) == ("a100", "lab")
    stated = configuration.load(overrides={"cluster": {"partition": "mine"}})
    assert Requests(stated, remote=lambda: True).partition(None) == "mine"


def test_only_what_may_end_otherwise_is_tried_again(tmp_path, answers):
    job, other = run_job(tmp_path), run_job(tmp_path, "linear")
    failure(tmp_path / "full", transient=False)  # of an earlier call: it may have been corrected
    chooses = retries.Retries([job.output[0], other.output[0]], "snella_1")
    assert not chooses.hopeless(job)
    time.sleep(0.01)
    failure(tmp_path / "full", transient=False)
    failure(tmp_path / "linear", transient=True)
    assert chooses.hopeless(job) and not chooses.hopeless(other)


def test_a_cancelled_job_is_not_tried_again(tmp_path, answers):
    job = run_job(tmp_path)
    chooses = retries.Retries([], "snella_1")
    answers["squeue"] = "9|CANCELLED|None\n10|TIMEOUT|TimeLimit\n11|CANCELLED|None\n"
    assert not chooses.hopeless(job)
    chooses.note(job, "10")
    assert not chooses.hopeless(job)
    chooses.note(job, "11")
    assert chooses.hopeless(job) == "SLURM job 11 was cancelled"
    answers["squeue"] = None
    assert not chooses.hopeless(job)


REFUSED = """SLURM sbatch failed. The error message was 'sbatch: error: {}
sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, \
user's size and/or time limits)'.
    sbatch call:
        sbatch --job-name x
"""


@pytest.mark.parametrize(
    "message,waits",
    [
        (REFUSED.format("QOSMaxSubmitJobPerUserLimit"), True),
        (REFUSED.format("AssocGrpSubmitJobsLimit"), True),
        (REFUSED.replace("sbatch: error: {}\n", ""), True),  # an old SLURM: it may be any of them
        (REFUSED.format("QOSMaxWallDurationPerJobLimit"), False),
        ("sbatch: error: Batch job submission failed: Invalid partition name specified", False),
        (
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
            True,
        ),
        ("Unable to contact slurm controller (connect failure)", True),
        ("Job submission failed with exception: no such thing", False),
        ("", False),
    ],
)
def test_what_sbatch_may_accept_later(message, waits):
    assert submission.temporary(message) == waits


def executor() -> SimpleNamespace:
    """As much of SLURM's executor as is watched."""
    made = SimpleNamespace(wait=True, submitted=[], failed=[])
    made.run_job = made.submitted.append
    made.report_job_error = lambda info, msg=None, **options: made.failed.append((info.job, msg))
    return made


def test_a_refused_job_is_submitted_again_and_has_not_failed(tmp_path, answers, monkeypatch):
    monkeypatch.setattr(submission, "AGAIN_SECONDS", 0)
    slurms, said, job = executor(), [], run_job(tmp_path)
    chooses = retries.Retries([], "snella_1")
    submission.watch(slurms, chooses, said.append)
    refused = SimpleNamespace(job=job, external_jobid=None)
    for number in (1, 2):
        slurms.report_job_error(refused, REFUSED.format("QOSMaxSubmitJobPerUserLimit"))
        wait_for(lambda number=number: len(slurms.submitted) == number)
    assert slurms.submitted == [job, job] and not slurms.failed and not chooses.hopeless(job)
    assert len(said) == 1 and "QOSMaxSubmitJobPerUserLimit; Batch job submission failed" in said[0]
    slurms.wait = False  # the workflow was ended meanwhile
    slurms.report_job_error(refused, REFUSED.format("QOSMaxSubmitJobPerUserLimit"))
    time.sleep(0.05)
    assert len(slurms.submitted) == 2


def test_what_sbatch_will_never_accept_is_not_tried_again(tmp_path, answers):
    slurms, job = executor(), run_job(tmp_path)
    chooses = retries.Retries([], "snella_1")
    submission.watch(slurms, chooses, pytest.fail)
    message = REFUSED.format("QOSMaxWallDurationPerJobLimit")
    slurms.report_job_error(SimpleNamespace(job=job, external_jobid=None), msg=message)
    assert slurms.failed == [(job, message)]
    assert "QOSMaxWallDurationPerJobLimit" in chooses.hopeless(job)


def wait_for(until):
    deadline = time.monotonic() + 30
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_cancelled_group_of_jobs_is_not_tried_again(tmp_path, answers, monkeypatch):
    from snakemake.jobs import GroupJob, Job

    for kind in (Job, GroupJob):
        monkeypatch.setattr(kind, "restart_times", kind.restart_times)
    said: list[str] = []
    chooses = retries.Retries([], "snella_1")
    retries.install(chooses, said.append)
    group = SimpleNamespace(
        jobs=[run_job(tmp_path), run_job(tmp_path, "linear")], attempt=1, is_group=lambda: True
    )
    times = GroupJob.restart_times.fget
    chooses.note(group, "12")
    answers["squeue"] = "12|TIMEOUT|None\n"
    assert times(group) == 2
    answers["squeue"] = "12|CANCELLED|None\n"
    assert times(group) == 0
    assert said == ["A job of 2 cells is not tried again: SLURM job 12 was cancelled"]


def test_snakemake_asks_before_it_repeats_a_job(tmp_path, answers, monkeypatch):
    from snakemake.jobs import GroupJob, Job

    for kind in (Job, GroupJob):
        monkeypatch.setattr(kind, "restart_times", kind.restart_times)
    broken, fine = run_job(tmp_path), run_job(tmp_path, "linear")
    said: list[str] = []
    retries.install(retries.Retries([broken.output[0], fine.output[0]]), said.append)
    of_job, of_group = Job.restart_times.fget, GroupJob.restart_times.fget
    assert of_job(broken) == 2
    failure(tmp_path / "full", transient=False)
    assert of_job(broken) == 0 and "full is not tried again" in said[0]
    assert of_group(SimpleNamespace(jobs=[broken, fine], attempt=1, is_group=lambda: True)) == 2
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear/finished.json").write_text("{}")
    assert of_group(SimpleNamespace(jobs=[broken, fine], attempt=1, is_group=lambda: True)) == 0
