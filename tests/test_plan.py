"""Configuration and plan: strict keys, one place of expansion, identities that mean something."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from snella.errors import UserError
from snella.jobs import tables
from snella.runs.run import Run
from snella.seeds import derive_seed
from snella.suite import config as configuration
from snella.suite import plan

ROOT = Path(__file__).resolve().parents[1]


def load(**overrides):
    return configuration.load(ROOT / "config/config.yaml", overrides)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_shipped_suite_expands():
    for suite in load().suites:
        config = load(suite=suite)
        runs = plan.plan(config)
        assert runs and len({run.folder for run in runs}) == len(runs)
        assert all(Run.from_json(run.to_json()) == run for run in runs)


def test_every_shipped_table_finds_its_runs():
    config = load()
    for table in config.tables:
        task = config.tables[table].get("task", "classification")
        suite = config.task_suites.get(task, "quick")
        named = {column.get("suite", suite) for column in config.tables[table]["columns"]}
        found = {run.suite for run in tables.table_runs(config, table)}
        assert found and found <= named


def test_order_is_methods_then_data_sets_then_seeds():
    config = load(suite="smoke", suites={"smoke": {"seeds": [0, 1]}})
    runs = plan.plan(config, methods=["full", "linear"], datasets=["digits", "count"])
    assert [(r.method.name, r.dataset.name, r.seed) for r in runs[:5]] == [
        ("full", "digits", 0), ("full", "digits", 1), ("full", "count", 0), ("full", "count", 1),
        ("linear", "digits", 0),
    ]  # fmt: skip


def test_a_file_of_ones_own_adds_to_the_main_configuration(tmp_path):
    """`snella --configfile my.yaml` plans what Snakemake plans of the same two files."""
    mine = tmp_path / "my.yaml"
    mine.write_text("methods: {mine: {file: full}}\nsuites.smoke.seeds: [3]\n")
    main = configuration.DEFAULT
    merged = yaml.safe_load(main.read_text()) | yaml.safe_load(mine.read_text())
    ours = configuration.load(mine)
    theirs = configuration.from_snakemake(merged, [main, mine])
    assert ours.model_dump() == theirs.model_dump()
    assert ours.suite == "quick" and "segmentation" in ours.task_suites
    assert "mine" in ours.methods and ours.suites["smoke"].seeds == [3]
    assert ours.where(["suite"]).startswith("config/config.yaml")


def test_layers_of_settings():
    """Preset < method's own < suite's overrides < suite's word on that method."""
    config = load(
        suites={
            "quick": {
                "overrides": {"lr": 0.5, "epochs": 7, "hyperparameters": "fixed"},
                "method_overrides": {"linear": {"protocol": {"epochs": 3}}},
            }
        },
        methods={"bias": {"protocol": {"lr": 0.25, "weight_decay": 0.125}}},
    )
    bias = plan.resolve(config, "bias", "digits", 0).protocol
    linear = plan.resolve(config, "linear", "digits", 0).protocol
    assert (bias.lr, bias.epochs, bias.weight_decay) == (0.5, 7, 0.125)
    assert linear.epochs == 3


def test_released_hyper_parameters_come_per_data_set():
    config = load(
        suites={"quick": {"overrides": {"hyperparameters": "released"}}},
        released={"full": {"digits": {"protocol": {"lr": 0.125}}}},
    )
    assert plan.resolve(config, "full", "digits", 0).protocol.lr == 0.125
    without = plan.resolve(config, "full", "count", 0)
    assert without.protocol.lr == load().methods["full"].protocol["lr"]
    assert "full on count" in without.notes[0]


def test_a_suites_word_on_a_row_holds_against_a_search():
    word = {"full": {"protocol": {"lr": 0.125}}}
    config = load(suites={"quick": {"method_overrides": word}})
    assert plan.resolve(config, "full", "digits", 0).protocol.lr == 0.125
    assert plan.resolve(load(), "full", "digits", 0).protocol.hyperparameters == "search/quick"


def test_seeds_pair_methods():
    assert derive_seed(0, "digits", 0) == derive_seed(0, "digits", 0)
    different = {derive_seed(b, d, k) for b in (0, 1) for d in ("x", "y") for k in (0, 1)}
    assert len(different) == 8


def test_a_method_that_no_table_lists_joins_every_table():
    config = load(methods={"mine": {"file": "full", "label": "Mine"}})
    assert plan.table_methods(config, "table1")[-1] == (None, ["mine"])


@pytest.mark.parametrize(
    "overrides,words",
    [
        ({"suit": "quick"}, ["'suit'", "'suite'"]),
        ({"suite": "quik"}, ["suite 'quik'", "'quick'"]),
        ({"methods": {"full": {"fil": "full"}}}, ["methods.full.fil", "methods.full.file"]),
        ({"methods": {"x": {"file": "ful"}}}, ["'ful'", "'full'"]),
        ({"suites": {"quick": {"methods": ["ful"]}}}, ["method 'ful'", "'full'"]),
        ({"suites": {"quick": {"protocol": "quik"}}}, ["protocol 'quik'", "'quick'"]),
        ({"suites": {"quick": {"backbone": "vit"}}}, ["backbone 'vit'"]),
        ({"suites": {"quick": {"groups": {"natural": ["digit"]}}}}, ["'digit'", "'digits'"]),
        ({"suites": {"quick": {"seeds": []}}}, ["suites.quick.seeds"]),
        ({"protocols": {"quick": {"epoch": 3}}}, ["'epoch'", "'epochs'", "protocol 'quick'"]),
        ({"protocols": {"quick": {"weight_decay": -1}}}, ["weight_decay", "greater than"]),
        ({"protocols": {"quick": {"epochs": "many"}}}, ["epochs", "'many'"]),
    ],
)
def test_a_mistake_is_one_line_that_names_place_and_remedy(overrides, words):
    with pytest.raises(UserError) as error:
        plan.plan(load(**overrides))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_unreadable_and_malformed_files(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read.*nowhere\.yaml"):
        configuration.load(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("suite: [quick")
    with pytest.raises(UserError, match=r"bad\.yaml is not valid YAML"):
        configuration.load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- suite")
    with pytest.raises(UserError, match="mapping"):
        configuration.load(tmp_path / "list.yaml")


def test_one_file_of_ones_own_is_enough(tmp_path):
    own = {
        "suite": "mine",
        "datasets": {"pets": {"path": "/data/pets"}},
        "suites": {
            "mine": {
                "title": "Mine", "backbone": "vit-quick", "protocol": "quick",
                "groups": {"natural": ["pets"]}, "methods": ["full"],
            }
        },
    }  # fmt: skip
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(own))
    (run,) = plan.plan(configuration.load(tmp_path / "my.yaml"))
    assert run.key == "mine/vit-quick/pets/full/seed0"
