"""Search of settings: equal trials, validation examples alone, and a result that is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from snella import results
from snella.cli import main
from snella.errors import UserError
from snella.jobs import search as searching
from snella.jobs.workflow import WorkflowPlan
from snella.runs.execute import execute
from snella.suite import plan
from snella.suite.config import Config, Searched, load

RATES = [1.0e-3, 1.0e-2, 1.0e-1]
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture
def settings(tmp_path: Path, tiny_data: Path, monkeypatch) -> dict[str, Any]:
    """A suite of two rows and one data set of 40 images with a search of three rates."""
    monkeypatch.chdir(ROOT)
    return {
        "suite": "mini",
        "results": str(tmp_path / "results"),
        "data": str(tmp_path / "data"),
        "backbones": {"tiny": {"arch": "vit_tiny_patch16_224", "kwargs": TINY, "file": "random"}},
        "datasets": {"tiny": {"path": str(tiny_data)}},
        "protocols": {
            "mini": {
                "image_size": 16, "resize": "none", "epochs": 2, "warmup_epochs": 0,
                "batch_size": 20, "train_split": "trainval", "hyperparameters": "search",
            }
        },
        "suites": {
            "mini": {
                "title": "Mini", "backbone": "tiny", "protocol": "mini",
                "groups": {"natural": ["tiny"]}, "methods": ["full", "linear"],
                "search": {"grid": {"lr": RATES}},
            }
        },
    }  # fmt: skip


def configured(settings: dict[str, Any], **changes: Any) -> Config:
    return load(ROOT / "config/config.yaml", {**settings, **changes})


def searching_for(settings: dict[str, Any], **search: Any) -> Config:
    """The configuration with other fields of the suite's search."""
    suite = {**settings["suites"]["mini"], "search": search}
    return configured(settings, suites={"mini": suite})


def train(config: Config) -> list[Any]:
    return [execute(run) for run in plan.search_runs(config)]


def test_every_row_gets_the_same_trials_and_a_new_row_gets_the_default_ones(settings):
    settings["methods"] = {"mine": {"file": "bias"}}
    settings["suites"]["mini"]["methods"] = ["full", "linear", "mine"]
    runs = plan.search_runs(configured(settings))
    tried = {name: [r.protocol.lr for r in runs if r.method.name == name]
             for name in ("full", "linear", "mine")}  # fmt: skip
    assert set(map(tuple, tried.values())) == {tuple(RATES)}
    assert len({run.folder for run in runs}) == len(runs) == 9
    with pytest.raises(UserError, match="row 'full' has 2 trials and the others 3"):
        searching_for(settings, grid={"lr": RATES}, rows={"full": {"lr": [1e-3, 1e-2]}})


def test_trials_never_open_test_examples(settings, tiny_data):
    """They train and are scored with every file of the test split gone."""
    for file in [*tiny_data.glob("test_*"), *tiny_data.glob("sealed/*")]:
        file.unlink()
    config = configured(settings)
    records = train(config)
    assert {r["status"] for r in records} == {"ok"}
    assert {(r["test_size"], r["protocol"]["train_split"]) for r in records} == {(16, "train")}
    with pytest.raises(UserError, match="missing"):
        execute(plan.plan(config)[0])


def test_a_search_from_trials_to_the_runs_that_use_it(settings, tmp_path):
    config = configured(settings)
    records = train(config)
    before = [run.record.read_bytes() for run in plan.search_runs(config)]
    train(config)  # finished trials are not trained again
    assert [run.record.read_bytes() for run in plan.search_runs(config)] == before
    assert results.frame(config.results, config)["status"].eq("not run").all()

    paths = searching.write(config)
    assert [p.name for p in paths] == ["search.yaml", "lr_sweep.pdf", "lr_sweep.png"]
    content = yaml.safe_load(paths[0].read_text())
    found = Searched.model_validate(content)
    assert (found.trials, found.runs, found.grid) == (3, 6, {"lr": RATES})
    assert content["made"]["packages"]["torch"] and found.command
    for method in ("full", "linear"):
        scores = found.scores[method]["tiny"]
        mine = [r for r in records if r["run"]["method"] == method]
        assert scores == [r["metrics"]["last"]["top1"] for r in mine]
        best = found.rows[method]["tiny"].protocol["lr"]
        assert best == RATES[scores.index(max(scores))]
        assert ("lr" in found.edge.get(method, {}).get("tiny", [])) == (
            best in (RATES[0], RATES[2])
        )

    used = plan.plan(configured(settings, searched={"mini": content}))
    for run in used:
        assert run.protocol.lr == found.rows[run.method.name]["tiny"].protocol["lr"]
        assert (run.protocol.hyperparameters, run.dataset.scored) == ("search/mini", "test")
        assert ("lowest or highest" in "".join(run.notes)) == (run.method.name in found.edge)
    fixed = plan.plan(config)
    assert all("no settings in search/mini" in run.notes[0] for run in fixed)
    assert {run.protocol.hyperparameters for run in fixed} == {"fixed"}


def test_missing_trials_are_said_and_diverged_ones_never_win(settings, capsys):
    config = searching_for(settings, grid={"lr": [1.0e-2, 1.0e30]})
    with pytest.raises(UserError, match="4 of 4 trials of the search have no result"):
        searching.write(config)
    assert [r["status"] for r in train(config) if r["run"]["method"] == "full"][1] == "diverged"
    found = yaml.safe_load(searching.write(config)[0].read_text())
    assert found["rows"]["full"]["tiny"]["protocol"] == {"lr": 1.0e-2}
    assert found["scores"]["full"]["tiny"][1] is None
    assert found["edge"]["full"] == {"tiny": ["lr"]}
    assert any("mini-trial-2/tiny/tiny/full" in line for line in found["failed"])
    assert searching.at_edge(Searched.model_validate(found))[0] == (
        "full: the best lr is the lowest or highest tried on tiny"
    )


def test_a_row_may_have_one_setting_for_all_data_sets(settings, tiny_data):
    config = searching_for(settings, grid={"lr": RATES[:2]}, choose="row")
    train(config)
    content = yaml.safe_load(searching.write(config)[0].read_text())
    rate = content["rows"]["full"]["*"]["protocol"]["lr"]
    (run, *_) = plan.plan(configured(settings, searched={"mini": content}))
    assert run.protocol.lr == rate


def test_a_second_search_keeps_what_the_first_found(settings):
    first = {"rows": {"full": {"tiny": {"protocol": {"lr": 0.25}}}}}
    suite = {**settings["suites"]["mini"], "search": {"grid": {"weight_decay": [0.0, 0.1]}}}
    suite["methods"] = ["full"]
    config = configured(settings, searched={"mini": first}, suites={"mini": suite})
    assert {run.protocol.lr for run in plan.search_runs(config)} == {0.25}
    trials = [searching.Done(run, None, "") for run in plan.search_runs(config)]
    ok = {"status": "ok", "metric": "top1", "metrics": {"last": {"top1": 0.5}}}
    trials[1] = searching.Done(trials[1].run, ok, "")
    found = searching.summary(config, trials)
    assert found.rows["full"]["tiny"].protocol == {"lr": 0.25, "weight_decay": 0.1}


def test_a_rows_own_grid_may_vary_its_hyper_parameters(settings):
    settings["suites"]["mini"]["methods"] = ["adapter-8"]
    own = {"lr": [1.0e-3], "bottleneck": [2, 4]}
    config = searching_for(settings, grid={"lr": RATES[:2]}, rows={"adapter-8": own})
    runs = [r for r in plan.search_runs(config) if r.method.name == "adapter-8"]
    assert [r.method.hyperparameters["bottleneck"] for r in runs] == [2, 4]
    wrong = searching_for(settings, grid={"lrr": [1, 2]})
    with pytest.raises(UserError, match=r"setting in the grid.*'lrr'.*'lr'"):
        plan.search_runs(wrong)


def test_the_workflow_knows_every_trial(settings, capsys):
    work = WorkflowPlan(configured(settings), {})
    names = work.search_records(type("W", (), {"suite": "mini"}))
    assert len(names) == 6 and all("/search/runs/mini-trial-" in name for name in names)
    wild = {"place": "search/", "suite": "mini-trial-2", "backbone": "tiny", "dataset": "tiny",
            "method": "full", "seed": "0"}  # fmt: skip
    assert work.run(type("W", (), wild)).protocol.lr == RATES[1]
    with pytest.raises(SystemExit):
        work.run(type("W", (), {**wild, "suite": "mini-trial-9"}))
    assert "no trial 9" in capsys.readouterr().err


def test_a_search_needs_validation_examples(settings, tiny_data):
    import json

    manifest = json.loads((tiny_data / "manifest.json").read_text())
    del manifest["counts"]["val"], manifest["manifest_digest"]
    (tiny_data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no val split"):
        execute(plan.search_runs(configured(settings))[0])


def test_the_budget_is_stated_before_anything_runs(capsys):
    assert main(["plan", "--search", "--config", "suite=smoke"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "4 rows x 7 trials x 4 data sets x 1 seed = 112 runs" in first


def test_what_a_suite_costs_is_by_measured_seconds_per_image(settings, tmp_path, capsys):
    """40 training images and 16 of val in each of 2 epochs; 24 test images are looked at once."""
    from snella.jobs import budget

    config = configured(settings)
    (one,) = budget.suites(config, ["mini"])
    assert (one.runs, one.done, one.unmeasured) == (2, 0, ["full", "linear"])
    assert "not measured: 2 rows (full, linear)" in "\n".join(one.lines())
    record = execute(plan.search_runs(config)[0])
    (one,) = budget.suites(config, ["mini"])
    cost = record["cost"]
    expected = 112 * cost["train_seconds_per_image"] + 24 * cost["inference_seconds_per_image"]
    assert list(one.seconds.values()) == [pytest.approx(expected)]
    assert one.unmeasured == ["linear"] and one.size > 1000
    assert not one.missing and one.prepared == "1 of 1 data set"


def test_what_training_drops_costs_nothing(settings):
    """Of 40 images in batches of 16 the last 8 are left out of both epochs."""
    from snella.jobs.budget import _images

    run = plan.plan(configured(settings))[0]
    protocol = run.protocol.model_copy(update={"train_split": "train", "batch_size": 16})
    found = []
    for dropped in (False, True):
        own = {"protocol": protocol, "settings": {**run.settings, "drop_last": dropped}}
        found.append(_images(run.model_copy(update=own), {"train": 40, "val": 16, "test": 24})[0])
    assert found == [40 * protocol.epochs, 32 * protocol.epochs]


@pytest.mark.parametrize("text", ["[]", '{"counts": [1]}', '{"counts": {"train": "many"}}'])
def test_a_manifest_of_another_shape_tells_no_sizes(settings, text):
    from snella.jobs.budget import split_sizes

    config = configured(settings)
    (plan.prepared_folder(config, "tiny") / "manifest.json").write_text(text)
    assert split_sizes(config, "tiny") is None


def test_what_runs_lack_is_named_at_once(settings, tmp_path):
    from snella.jobs.inputs import missing_of

    settings["datasets"] |= {name: {"path": str(tmp_path / name)} for name in ("away", "gone")}
    settings["suites"]["mini"]["groups"] = {"natural": ["tiny", "away", "gone"]}
    settings["backbones"]["tiny"] = {**settings["backbones"]["tiny"], "file": "nowhere.npz"}
    data, weights = missing_of(config := configured(settings), plan.plan(config))
    assert "away" in data and "gone" in data and "tiny" not in data
    assert "nowhere.npz is missing" in weights


def test_a_backbone_by_name_takes_one_image_size(settings):
    settings["backbones"]["tiny"] = {"arch": "vit_base_patch16_224", "file": "random"}
    with pytest.raises(UserError, match="224 pixels, image_size is 16"):
        plan.plan(configured(settings))


def test_a_shipped_name_with_another_folder_says_what_it_keeps(settings, tmp_path, caplog):
    own = tmp_path / "my.yaml"
    settings["datasets"] |= {"pets": {"path": str(tmp_path)}}
    settings["suites"]["mini"]["groups"] = {"natural": ["pets"]}
    own.write_text(yaml.safe_dump(settings))
    plan.plan(load(own))
    assert caplog.messages == [m for m in caplog.messages if "pets (37)" in m] != []
    caplog.clear()
    settings["datasets"]["pets"]["num_classes"] = 5
    own.write_text(yaml.safe_dump(settings))
    plan.plan(load(own))
    assert not caplog.messages
