"""Mistakes in configuration and on the command line: one line that says what, where, what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from snella.cli import main
from snella.errors import UserError, unknown
from snella.methods.base import load_method
from snella.suite import config as configuration
from snella.suite import plan
from snella.validation import check_distinct

ROOT = Path(__file__).resolve().parents[1]
SUITE = {
    "title": "Mine", "backbone": "vit-quick", "protocol": "quick",
    "groups": {"natural": ["digits"]}, "methods": ["full"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def says(capsys, *arguments: str, status: int = 2) -> str:
    """The one line on stderr of a call that must end with ``status``."""
    assert main([str(a) for a in arguments]) == status
    message = capsys.readouterr().err
    assert message.startswith("snella: ") and message.count("\n") == 1, message
    assert "Traceback" not in message
    return message


def write(folder: Path, content: dict | str | bytes) -> str:
    """A configuration file; returns its path."""
    path = folder / "my.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump({"suite": "mine", "suites": {"mine": SUITE}, **content})
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


FILES = {
    "latin-1": ("suite: quick\n# größe\n".encode("latin-1"), ["line 2", "UTF-8"]),
    "binary": (b"\x00\x01\x02\x89PNG", ["my.yaml"]),
    "tabs": ("suite:\n\tquick\n", ["not valid YAML (line 2", "correct it"]),
    "open bracket": ("suite: [1\n", ["not valid YAML (line"]),
    "object": ("suite: !!python/object:os.system x\n", ["not valid YAML"]),
    "list": ("- suite\n", ["mapping"]),
    "table": ("tables: {audit2: {rows: []}}\n", ["tables.audit2", "other results are called so"]),
    "twice": ("suite: quick\nsuite: smoke\n", ["line 2", "'suite' stands twice"]),
    "endless": ("suite: &a [*a]\n", ["anchors repeat"]),
    "billions": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ), ["anchors repeat"],
    ),
    "deep": ("suite: " + "[" * 20000, ["my.yaml"]),
    "octal": ("suite: quick\nsuites: {quick: {seeds: [010]}}\n", ["line 2", "010", "base 8"]),
    "minutes": ("suite: quick\nprotocols: {quick: {epochs: 1:30}}\n", ["line 2", "1:30", "60"]),
    "null": ("suite: quick\nmethods:\n", ["line 2", "mapping", "it is empty"]),
    "table key": (
        "suite: quick\ntables: {table1: {colums: []}}\n", ["my.yaml, line 2", "'columns'"],
    ),
    "bad date": ("suite: 2020-99-99\n", ["Unknown suite '2020-99-99'"]),
    "top key": ("suit: quick\n", ["my.yaml, line 1", "'suit'", "Did you mean 'suite'"]),
    "number as name": ("suite: quick\nmethods: {1: {file: full}}\n", ["my.yaml, line 2", "quotes"]),
    "escape": ('suite: quick\nmethods: {full: {label: "a\\e[31mb"}}\n', ["line 2", "control"]),
    "table rows": ("suite: quick\ntables: {table1: {rows: 3}}\n", ["line 2", "rows", "methods"]),
    "table row": (
        "suite: quick\ntables: {table1: {rows: [{metods: [full]}]}}\n",
        ["line 2", "group 1", "metods"],
    ),
    "table method": (
        "suite: quick\ntables: {table1: {rows: [{methods: [ful]}]}}\n", ["'ful'", "'full'"],
    ),
    "truth as name": ("suite: quick\nmethods: {no: {}}\n", ["line 2", "name no", "quotes"]),
    "null as name": ("suite: quick\nnull: 1\n", ["line 2", "name null as null"]),
    "decimal comma": (
        "suite: quick\nprotocols: {quick: {lr: 0,5}}\n", ["line 2", "follow a point"],
    ),
    "utf-16": ("suite: quick\n".encode("utf-16"), ["line 1", "UTF-8"]),
    "other case": (
        "suite: quick\nmethods: {Full: {label: Mine}}\n",
        ["line 2", "methods.Full", "methods.full", "case alone"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_faulty_file_is_one_line_with_its_place(tmp_path, capsys, case):
    content, words = FILES[case]
    message = says(capsys, "plan", "--configfile", write(tmp_path, content))
    assert [word for word in words if word not in message] == [], message


def mine(**changes) -> dict:
    return {"suites": {"mine": {**SUITE, **changes}}}


ENTRIES = {
    "space": ({"methods": {"my row": {"file": "full"}}}, ["methods.my row", "'my_row'", "label"]),
    "semicolon": ({"methods": {"a;b": {"file": "full"}}}, ["a;b", "letters, digits"]),
    "quote": ({"datasets": {"a'b": {"path": "/x"}}}, ["a'b", "letters, digits"]),
    "parent": ({"suites": {"../x": SUITE}}, ["../x", "letters, digits"]),
    "accents": ({"backbones": {"größe": {"arch": "vit"}}}, ["letters, digits"]),
    "long": ({"methods": {"x" * 300: {"file": "full"}}}, ["at most 64 characters"]),
    "dotted data set": ({"datasets": {"a.b": {"path": "/x"}}}, ["a.b", "'a_b'"]),
    "negative seed": (mine(seeds=[-1]), ["suites.mine.seeds.0", "-1"]),
    "seed twice": (mine(seeds=[0, 0]), ["suites.mine.seeds", "stands twice"]),
    "seed true": (mine(seeds=[True]), ["suites.mine.seeds.0", "integer"]),
    "seed text": (mine(seeds="many"), ["suites.mine.seeds", "list"]),
    "column twice": (mine(groups={"a": ["digits"], "b": ["digits"]}), ["'digits' stands twice"]),
    "row twice": (mine(methods=["full", "full"]), ["'full' stands twice"]),
    "empty group": (mine(groups={"a": []}), ["'a' has no data set", "a: null"]),
    "no group": (mine(groups={}), ["needs a group"]),
    "no rows": (mine(methods=[]), ["suites.mine.methods"]),
    "required": (
        {"suites": {"mine": {**{k: v for k, v in SUITE.items() if k != "title"}, "titel": "x"}}},
        ["'suites.mine.titel'", "Did you mean 'suites.mine.title'"],
    ),
    "missing": (
        {"suites": {"mine": {k: v for k, v in SUITE.items() if k != "backbone"}}},
        ["suites.mine.backbone is missing"],
    ),
    "override row": (
        mine(method_overrides={"ful": {"protocol": {"lr": 1}}}), ["'ful'", "Did you mean 'full'"],
    ),
    "override key": (
        mine(method_overrides={"full": {"protokol": {"lr": 1}}}), ["protokol", "protocol'"],
    ),
    "override field": (
        mine(method_overrides={"full": {"protocol": {"lrr": 1}}}), ["'lrr'", "'lr'"],
    ),
    "hidden nonsense": (
        mine(overrides={"lr": "x"}, method_overrides={"full": {"protocol": {"lr": 1.0}}}),
        ["suites.mine.overrides.lr", "valid number"],
    ),
    "infinite": (mine(overrides={"lr": float("inf")}), ["overrides.lr", "finite"]),
    "hyper-parameter": (
        mine(methods=["lora-8"], method_overrides={"lora-8": {"hyperparameters": {"ranc": 4}}}),
        ["'ranc'", "Did you mean 'rank'", "peft.py"],
    ),
    "hyper-parameter value": (
        mine(methods=["lora-8"], method_overrides={"lora-8": {"hyperparameters": {"rank": 0}}}),
        ["hyper-parameter rank", "greater than 0"],
    ),
    "lr true": (mine(overrides={"lr": True}), ["suites.mine.overrides.lr", "must be a number"]),
    "rank true": (
        mine(methods=["lora-8"], method_overrides={"lora-8": {"hyperparameters": {"rank": True}}}),
        ["hyper-parameter rank", "must be a number"],
    ),
    "infinite alpha": (
        mine(
            methods=["lora-8"],
            method_overrides={"lora-8": {"hyperparameters": {"alpha": float("inf")}}},
        ),
        ["hyper-parameter alpha", "finite"],
    ),
    "absurd": (mine(overrides={"steps": 10**22}), ["overrides.steps", "less than"]),
    "contradiction": (
        mine(overrides={"epochs": 2, "warmup_epochs": 3}), ["overrides.warmup_epochs", "below"],
    ),
    "optimizer": (mine(overrides={"optimizer": "adamm"}), ["'adamm'", "Did you mean 'adam'"]),
    "searched settings": (mine(overrides={"hyperparameters": "search/x"}), ["search 'x'"]),
    "endless search": (
        mine(search={"grid": {k: list(range(1, 99)) for k in ("lr", "weight_decay", "epochs")}}),
        ["941,192 trials", "at most 10,000"],
    ),
    "class count": ({"datasets": {"x": {"path": "/x", "num_classes": -3}}}, ["num_classes"]),
    "no path": ({"datasets": {"x": {"path": " "}}}, ["datasets.x.path", "not empty"]),
    "image size": (mine(overrides={"image_size": 64}), ["32 pixels", "image_size is 64"]),
    "results": ({"results": ""}, ["results", "not empty"]),
    "searched table": (mine(search={"table": "tabel1"}), ["Unknown table", "'table1'"]),
    "path of what is made": (
        {"datasets": {"digits": {"path": "/my/digits"}}}, ["kind quick", "`path` does nothing"],
    ),
    "digest": ({"backbones": {"vit-quick": {"md5": "d9715g"}}}, ["backbones.vit-quick.md5"]),
    "pipeline": (
        {
            "backbones": {"sd3-quick": {"arch": "StableDiffusionPipeline"}},
            **mine(backbone="sd3-quick", protocol="quick-generation", groups={"a": ["robot"]}),
        },
        ["'StableDiffusion3Pipeline'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENTRIES)
def test_a_faulty_entry_is_found_when_runs_are_planned(tmp_path, case):
    content, words = ENTRIES[case]
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        plan.plan(configuration.load(Path(path)))
    message = str(error.value)
    assert "my.yaml, line" in message, message
    assert [word for word in words if word not in message] == [], message


PICS = {"suites": {"mine": {**SUITE, "groups": {"natural": ["pics"]}}}}
OWN = {"suites": {"mine": {**SUITE, "backbone": "own"}}}
WRONG: dict[str, tuple[dict, list[str]]] = {
    "kind": ({"datasets": {"pics": {"kind": "foldr"}}}, ["'foldr'", "'folder'"]),
    "task": ({"datasets": {"pics": {"task": "clasification"}}}, ["Unknown task"]),
    "option": ({"datasets": {"pics": {"options": {"val_shar": 0.1}}}}, ["'val_share'"]),
    "option value": ({"datasets": {"pics": {"options": {"val_share": 2}}}}, ["less than 1"]),
    "official": ({"datasets": {"pics": {"options": {"official": "fgvc/cubs"}}}}, ["'fgvc/cub'"]),
    "true": ({"datasets": {"pics": {"options": {"first_label": True}}}}, ["must be a number"]),
    "architecture": (
        {"backbones": {"own": {"arch": "vit_base_patch16_22", "file": "random"}}},
        ["'vit_base_patch16_224'"],
    ),
    **{
        f"kwargs {next(iter(kwargs.items()))}": (
            {"backbones": {"own": {"arch": "vit_tiny_patch16_224", "kwargs": kwargs}}}, words,
        )
        for kwargs, words in (
            ({"dept": 2}, ["'dept'", "Did you mean 'depth'"]),
            ({"depth": "two"}, ["kwargs.depth` is 'two'", "takes int"]),
            ({"qkv_bias": 1}, ["kwargs.qkv_bias` is 1", "takes bool"]),
            ({"variant": "x"}, ["Unknown argument"]),
            ({"num_classes": 3}, ["Unknown argument"]),
            ({"checkpoint_path": "/x"}, ["Unknown argument"]),
            ({"depth": -1}, ["kwargs.depth` is -1", "from 0"]),
            ({"patch_size": [16, 0]}, ["kwargs.patch_size`", "from 1"]),
            ({"mlp_ratio": float("inf")}, ["kwargs.mlp_ratio` is inf", "finite"]),
            ({"drop_path_rate": 1.0}, ["kwargs.drop_path_rate`", "below 1"]),
            ({"global_pool": "avgg"}, ["kwargs.global_pool`", "'avg'"]),
            ({"num_heads": 7}, ["embed_dim 192", "num_heads 7"]),
        )
    },
    "hub": ({"backbones": {"own": {"arch": "hf-hub:timm/x", "file": "random"}}}, ["hf-hub:timm"]),
    **{
        f"img_size {size!r}": (
            {"backbones": {"own": {"arch": "vit_tiny_patch16_224", "kwargs": {"img_size": size}}}},
            ["no number of pixels"],
        )
        for size in ("32", "big", [], None, 32.0, {"a": 1}, True)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_job_would_stumble_over_is_known_when_runs_are_planned(tmp_path, case):
    content, words = WRONG[case]
    path = write(tmp_path, content | (PICS if "datasets" in content else OWN))
    with pytest.raises(UserError) as error:
        plan.plan(configuration.load(Path(path)))
    assert [word for word in ["my.yaml, line", *words] if word not in str(error.value)] == []


SAMS = {
    "arch": ({"arch": "sam_vit_bb"}, "Did you mean 'sam_vit_b'"),
    "name": ({"kwargs": {"encoder_dept": 2}}, "Did you mean 'encoder_depth'"),
    "heads": ({"kwargs": {"encoder_heads": 5}}, "encoder_dim 96 is no multiple"),
    "patch": ({"kwargs": {"image_size": 100}}, "image_size 100 is no multiple"),
    "blocks": ({"kwargs": {"global_blocks": ["a"]}}, "global_blocks` is ['a']"),
}


@pytest.mark.parametrize("case", SAMS)
def test_sizes_of_a_sam_are_known_when_runs_are_planned(tmp_path, case):
    entry, words = SAMS[case]
    (tmp_path / "my.yaml").write_text(
        yaml.safe_dump({"suite": "quick_segmentation", "backbones": {"sam-quick": entry}})
    )
    with pytest.raises(UserError) as error:
        plan.plan(configuration.load(tmp_path / "my.yaml"))
    assert "my.yaml, line" in str(error.value) and words in str(error.value)


def test_what_planning_knows_of_sam_is_what_the_model_takes():
    from snella.models import sam
    from snella.suite import packages

    sizes = packages.sam_sizes()
    assert set(sizes) == set(sam.ARCHITECTURES)
    assert all(set(known) == set(sam._KEYS) for known in sizes.values())


def broken(folder: Path) -> dict:
    """A configuration of its own data set, whose list of test images is faulty."""
    for split in ("train800", "val200", "test"):
        (folder / f"{split}.txt").write_text(f"{split}.png{' 0' * (split != 'test')}\n")
    return {"datasets": {"pics": {"path": str(folder)}}, **PICS}


def test_names_in_a_table_are_known_when_runs_are_planned(tmp_path, capsys):
    for key, word in (("metric", "top2"), ("reference", "ful")):
        pair = f"tables.table1.{key}={word}"
        message = says(capsys, "plan", "--config", "suite=smoke", pair)
        assert "table1" in message or "--config" in message
        assert f"'{word}'" in message and "Did you mean" in message


def test_files_that_scoring_lacks_are_named_when_runs_are_planned(capsys):
    pairs = ["suite=quick_generation", "protocols.quick-generation.dino_file=/nowhere/x.pth"]
    assert main(["plan", "table6", "--config", *pairs]) == 0
    assert "needs `dino_file: /nowhere/x.pth`" in capsys.readouterr().out


def test_a_faulty_list_is_named_when_runs_are_planned(tmp_path, capsys):
    path = write(tmp_path, broken(tmp_path) | {"data": f"{tmp_path}/data"})
    assert main(["plan", "--configfile", path]) == 0
    assert "missing: " in (shown := capsys.readouterr().out) and "test.txt:1: 'test.png'" in shown
    (tmp_path / "test.txt").write_text("test.png 0\n")  # which is seen when it is read
    assert main(["plan", "--configfile", path]) == 0
    assert "missing: " not in capsys.readouterr().out


FILES_OF_NONE = {
    "https://x.org/a.pth": "is an address",
    "package:../etc/passwd": "no file of a package",
    "package:no.such/x": "no file of a package",
    "~nobody_there/w.pth": "is missing",
}


@pytest.mark.parametrize("file", FILES_OF_NONE)
def test_weights_that_cannot_be_there(capsys, file):
    pairs = [f"backbones.vit-quick.file={file}", "suite=smoke"]
    assert main(["plan", "--config", *pairs]) == 0
    assert FILES_OF_NONE[file] in capsys.readouterr().out


def test_any_installed_architecture_and_optimizer_may_be_named():
    """What planning reads from the text of timm and torch is what they have."""
    import timm

    from snella.runs.optimizers import EIGHT_BIT, optimizer_names
    from snella.suite import packages

    assert set(optimizer_names()) - set(EIGHT_BIT) <= packages.optimizers()
    assert [name for name in timm.list_models() if not packages.is_architecture(name)] == []
    assert "vit_base_patch16_224" in packages.architectures()
    assert not packages.is_architecture("vit_base_patch16_22")


def test_of_many_names_the_closest_are_listed():
    message = str(unknown("row", "row77", [f"row{i}" for i in range(500)]))
    assert "Did you mean 'row77'" in message and "Closest of 500: row77, " in message
    assert len(message) < 500
    message = str(unknown("data set of a suite:", "zzz", [f"row{i}" for i in range(500)]))
    assert message.endswith("None of the 500 is like it; `snella datasets` lists them.")


@pytest.mark.parametrize(
    ("suite", "table"), [("smoke", "table1"), ("kvasir", "table5"), ("dreambooth", "table6")]
)
def test_the_table_of_a_suite_is_one_of_its_task(capsys, suite, table):
    assert main(["plan", "--json", "--config", f"suite={suite}"]) == 0
    assert json.loads(capsys.readouterr().out)["table"] == table


@pytest.mark.parametrize("sign", ["\n", "\x1b", "\x7f", "\u2028", "\u202e"])
def test_a_path_with_a_sign_that_is_not_printed(sign):
    with pytest.raises(UserError, match=r"results|line break"):
        configuration.load(overrides={"results": f"a{sign}b"})


def test_a_list_of_many_seeds_is_checked_at_once():
    with pytest.raises(ValueError, match="7 stands twice"):
        check_distinct([*range(100_000), 7])


def test_a_shipped_group_can_be_left_out(tmp_path):
    config = configuration.load(
        ROOT / "config/config.yaml", {"suites.smoke.groups.fgvc": None, "suite": "smoke"}
    )
    assert plan.current_suite(config).datasets == ["digits", "retina", "count"]


CALLS = {
    "open bracket": (["plan", "--config", "suite=[1"], ["--config suite", "not valid YAML"]),
    "value and part": (["plan", "--config", "suite=x", "suite.y=1"], ["suite", "a part of it"]),
    "part and value": (["plan", "--config", "suite.y=1", "suite=x"], ["suite", "a part of it"]),
    "twice": (["plan", "--config", "suite=quick", "suite=smoke"], ["suite twice"]),
    "no value": (["plan", "--config", "suite"], ["KEY=VALUE"]),
    "folder": (["plan", "--configfile", "config"], ["config", "a folder"]),
    "verb": (["rn"], ["'rn'", "Did you mean 'run'"]),
    "option": (["run", "--metod", "x"], ["'--metod'", "Did you mean '--method'"]),
    "choice": (["completion", "bsh"], ["'bsh'", "bash"]),
    "seed": (["run", "--method", "full", "--dataset", "digits", "--seed", "-1"], ["--seed", "-1"]),
    "seed word": (["run", "--method", "full", "--dataset", "digits", "--seed", "x"], ["--seed"]),
    "no argument": (["prepare"], ["dataset", "--help"]),
    "settings": (["execute", "--settings", "{"], ["--settings", "JSON"]),
    "empty settings": (["execute", "--settings", "{}"], ["--settings", "missing"]),
    "overlay": (["plan", "--overlay", "[1]"], ["--overlay", "object"]),
    "no tex": (["pdf", "nofile.tex"], ["nofile.tex", "snella table"]),
    "csv": (["pdf", "results/table1.csv"], ["no .tex file"]),
    "page": (["report", "--out", "a.pdf"], ["--out a.pdf", ".html"]),
    "other task": (
        ["run", "--method", "full", "--dataset", "polyps", "--config", "suite=smoke"],
        ["'polyps' is of segmentation", "'smoke' of classification"],
    ),
    "table's suite": (
        ["plan", "table5", "--config", "task_suites.segmentation=nope"],
        ["--config", "'nope'"],
    ),
    "dotted section": (["plan", "--config", "protocol.quick.lr=1"], ["'protocol'", "'protocols'"]),
    "dots alone": (["plan", "--config", "..=1"], ["'..'", "Known: allow_missing"]),
    "option twice": (
        ["plan", "--configfile", "a.yaml", "--configfile", "b.yaml"],
        ["--configfile", "twice"],
    ),
    "nul": (["plan", "--configfile", "a\0b"], ["null byte", "correct the path"]),
    "no task": (["plan", "--config", "task_suites.a=smoke"], ["--config", "'a'", "segmentation"]),
    "task of another": (
        ["plan", "--config", "task_suites.segmentation=quick"],
        ["task_suites.segmentation", "'quick'", "classification"],
    ),
    "no folder": (["diff", "results", "reproduced"], ["There is no folder"]),
    "no method at all": (["check", "qqq"], ["'qqq'", "`snella methods` lists them"]),
    "no data at all": (["prepare", "zzz"], ["'zzz'", "`snella datasets` lists them"]),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_faulty_call_is_one_line(capsys, case):
    arguments, words = CALLS[case]
    message = says(capsys, *arguments)
    assert [word for word in words if word not in message] == [], message


def test_dotted_keys_reach_rows_whose_names_have_dots():
    config = configuration.load(ROOT / "config/config.yaml", {"methods.dyt-0.5.label": "Mine"})
    assert config.methods["dyt-0.5"].label == "Mine"


@pytest.mark.parametrize("value", ["0", "-1", "two", "4,0", "²"])
def test_numbers_of_threads_that_are_none(monkeypatch, capsys, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert "OMP_NUM_THREADS" in says(capsys, "methods")


@pytest.mark.parametrize("place", ["results", "data"])
def test_a_file_where_a_folder_is_needed(tmp_path, capsys, place):
    (tmp_path / "taken").write_text("")
    free = {"results": tmp_path / "r", "data": tmp_path / "d", place: tmp_path / "taken"}
    pairs = [f"{key}={value}" for key, value in free.items()]
    verb = ["prepare", "digits"] if place == "data" else ["table", "table1"]
    message = says(capsys, *verb, "--config", "suite=smoke", *pairs)
    assert "taken" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_access(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o555)
    message = says(capsys, "prepare", "digits", "--config", f"data={tmp_path}/locked/data")
    assert "locked" in message


def test_links_that_lead_in_a_circle(tmp_path, capsys):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "loop" in says(capsys, "plan", "--configfile", tmp_path / "loop.yaml")
    message = says(capsys, "table", "--config", "suite=smoke", f"results={tmp_path}/loop.yaml")
    assert "loop.yaml" in message and "in a circle" in message


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert "working directory is gone" in says(capsys, "methods")


def test_one_name_in_two_files_of_a_section(tmp_path, capsys):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    shutil.copy(tmp_path / "config/tables/table1.yaml", tmp_path / "config/tables/mine.yaml")
    message = says(capsys, "plan", "--configfile", tmp_path / "config/config.yaml")
    assert "table1.yaml: 'table1'" in message and "rename" in message
    (tmp_path / "config/tables/mine.yaml").unlink()
    (tmp_path / "config/released/mine.yaml").write_text("rows: [full]\n")
    message = says(capsys, "plan", "--configfile", tmp_path / "config/config.yaml")
    assert "mine.yaml: `rows` maps" in message


def test_an_interruption_while_the_first_modules_are_imported():
    command = (
        "import sys\nclass Finder:\n    def find_spec(self, name, *rest):\n"
        "        if name == 'snella.cli.main': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\nimport snella.cli"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130 and done.stderr.startswith("snella: interrupted"), done.stderr


def test_nothing_is_imported_before_ctrl_c_is_one_line():
    """What the package imports by itself would be interrupted with a traceback."""
    command = "import sys\nold = set(sys.modules)\nimport snella\nprint(set(sys.modules) - old)"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{'snella'}\n"


def test_what_cannot_be_written_is_named_and_not_the_file_beside_it(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/x", "x" * 300):
        message = says(capsys, "schema", "--out", tmp_path / place)
        assert "Cannot write" in message and ".config.schema" not in message, message


def test_folders_of_plug_ins_must_be_there(capsys):
    for key in ("tasks", "baselines"):
        message = says(capsys, "methods", "--config", f"{key}=/nowhere")
        assert "no folder /nowhere" in message and key in message


def test_a_package_that_a_method_imports_is_missed_when_runs_are_planned(tmp_path, caplog):
    (tmp_path / "mine.py").write_text(
        "import no_such_package.part\nimport helper\nimport __main__\n\n\nclass Mine(X): ...\n"
    )
    (tmp_path / "helper.py").write_text("")
    entry = {"methods": {"mine": {"file": f"{tmp_path}/mine.py"}}}
    path = write(tmp_path, {**entry, "suites": {"mine": {**SUITE, "methods": ["mine"]}}})
    plan.plan(configuration.load(Path(path)))
    assert "imports no_such_package, which is not installed" in caplog.text
    assert "helper" not in caplog.text


def test_streams_that_are_closed_are_no_error():
    command = f"{sys.executable} -m snella.cli methods <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("arguments", [["-v"], ["--versio"], ["help", "plna"], ["data"]])
def test_words_before_a_verb(capsys, arguments):
    assert "Unknown" in (message := says(capsys, *arguments)) or "required" in message


def test_download_takes_its_options_in_any_order(tmp_path, capsys):
    for arguments in (["--to", str(tmp_path), "svhm"], ["svhm", "--to", str(tmp_path)]):
        assert "Did you mean 'svhn'" in says(capsys, "data", "download", *arguments)


def test_the_traceback_is_in_the_log_alone(tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise ZeroDivisionError("1 / 0")

    monkeypatch.setattr(configuration, "load", broken)
    monkeypatch.chdir(tmp_path)
    message = says(capsys, "methods", status=1)
    assert "internal error: ZeroDivisionError: 1 / 0" in message and "logs/snella.log" in message
    assert "Traceback" in (tmp_path / "logs/snella.log").read_text()


def test_an_end_from_inside_is_a_broken_run(monkeypatch, capsys):
    def broken(*arguments):
        raise SystemExit(0)

    monkeypatch.setattr(configuration, "load", broken)
    assert "SystemExit" in says(capsys, "methods", status=1)


HOOKS = {
    "on_epoch_begin": ("def on_epoch_begin(self, model, epoch, epochs): ...", "on_epoch_start"),
    "on_step": ("def on_step(self, model): ...", "on_step_end"),
    "calibrat": ("def calibrat(self, model, batches, loss_fn): ...", "calibrate"),
    "arguments": ("def on_epoch_start(self, model): ...", "on_epoch_start(model, epoch, epochs)"),
}


@pytest.mark.parametrize("case", HOOKS)
def test_a_misspelt_hook_is_an_error_when_the_file_is_loaded(tmp_path, case):
    source, words = HOOKS[case]
    file = tmp_path / "mine.py"
    file.write_text(
        "from snella.method import Method\n\n\nclass Mine(Method):\n"
        f"    def adapt(self, model): ...\n\n    {source}\n"
    )
    with pytest.raises(UserError, match=r"mine\.py, line 7") as error:
        load_method(file)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "source",
    ["def adapt(self, model)\n    pass\n", "x = 'gr\u00f6\u00dfe'\n", "x = 1\0\n"],
    ids=["syntax", "latin-1", "nul"],
)
def test_a_method_file_that_is_no_python_is_known_when_runs_are_planned(tmp_path, source):
    (tmp_path / "mine.py").write_bytes(source.encode("latin-1"))
    rows = {"mine": {"file": f"{tmp_path}/mine.py"}}
    path = write(tmp_path, {"methods": rows, **mine(methods=["mine"])})
    with pytest.raises(UserError, match=r"Method file .*mine\.py.*correct the file"):
        plan.plan(configuration.load(Path(path)))


HEAD = "from snella.method import Method\n\n\nclass Mine(Method):\n    rank: int"
OWN_FILES = {
    "two": (f"{HEAD} = 4\n\n\nclass Other(Method):\n    rank: int = 4\n", "found Mine, Other"),
    "none": ("x = 1\n", "found none"),
    "required": (f"{HEAD}\n", "hyper-parameter rank is missing"),
}


@pytest.mark.parametrize("case", OWN_FILES)
def test_what_a_method_file_lacks_is_known_when_runs_are_planned(tmp_path, case):
    source, words = OWN_FILES[case]
    (tmp_path / "mine.py").write_text(source)
    rows = {"mine": {"file": f"{tmp_path}/mine.py"}}
    path = write(tmp_path, {"methods": rows, **mine(methods=["mine"])})
    with pytest.raises(UserError, match=words):
        plan.plan(configuration.load(Path(path)))


def test_helpers_of_a_method_may_have_any_other_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from snella.method import Method\n\n\nclass Mine(Method):\n"
        "    def adapt(self, model): ...\n\n    def config(self, model): ...\n"
    )
    assert load_method(file).__name__ == "Mine"


def test_every_shipped_method_loads():
    for file in plan.method_files(configuration.load()).values():
        load_method(file)


def test_snakemake_blames_the_file_and_takes_dotted_keys(tmp_path):
    """What Snakemake merged of my.yaml and --config is told apart again."""
    from snella.jobs.workflow import WorkflowPlan

    mine = yaml.safe_load(
        Path(write(tmp_path, mine_with_typo := {"warm_worker": True})).read_text()
    )
    files = [str(ROOT / "config/config.yaml"), str(tmp_path / "my.yaml")]
    with pytest.raises(UserError, match=r"my\.yaml, line \d+: Unknown key.*'warm_worker'"):
        configuration.from_snakemake(mine, map(Path, files))
    del mine["warm_worker"]
    with pytest.raises(UserError, match=r"^--config: Unknown key.*'warm_worker'"):
        configuration.from_snakemake({**mine, **mine_with_typo}, [Path(files[0])])
    found = configuration.from_snakemake({**mine, "methods.full.label": "X"}, map(Path, files))
    assert found.methods["full"].label == "X"
    # inside mappings and lists Snakemake leaves numbers and null as text
    text = {"suites": {"smoke": {"seeds": ["0", "2"], "groups": {"fgvc": "null"}}}}
    text = configuration.typed({"suite": "smoke", **text}, [Path(files[0])])
    found = configuration.from_snakemake(text, [Path(files[0])])
    assert found.suites["smoke"].seeds == [0, 2] and "fgvc" not in found.suites["smoke"].groups
    with pytest.raises(SystemExit) as ended:
        WorkflowPlan.from_snakemake(
            {"suite": "quik"}, SimpleNamespace(configfiles=[], remote_exec=False)
        )
    assert ended.value.code == 2


SNAKEMAKE = {
    "no file": (["--configfile", "none.yaml", "--", "x"], ["none.yaml", "correct the path"]),
    "a target": (["--configfile", "config/config.yaml", "r/t.tex"], ["r/t.tex", "after ` -- `"]),
    "a folder": (["--configfile=tests"], ["it is a folder"]),
    "two": (["--configfiles", "config/config.yaml", "none.yaml", "-n"], ["none.yaml"]),
    "no value": (["--config", "suite", "--", "x"], ["KEY=VALUE", "'suite'"]),
    "dots": (["-C", "protocols.quick.epochs=3"], ["'protocols={quick: {epochs: 3}}'"]),
    "no key": (["--config", "a b=1"], ["'a b' is no key"]),
    "threads": (["--set-threads", "run=many"], ["--set-threads", "'many' is none"]),
    "no threads": (["--set-threads", "run"], ["takes RULE=NUMBER"]),
    "resources": (["--set-resources", "run:mem_mb=lots"], ["--set-resources", "'lots' is none"]),
    "no rule": (["--set-resources", "mem_mb=1"], ["takes RULE:NAME=VALUE"]),
    "defaults": (["--default-resources", "mem_mb=lots"], ["mem_mb is a number"]),
    "limit": (["--resources", "gpu=all"], ["gpu is a number"]),
}


@pytest.mark.parametrize("case", SNAKEMAKE)
def test_snakemakes_arguments_are_looked_at_before_it_stumbles(capsys, case):
    from snella.jobs.arguments import check_arguments

    arguments, words = SNAKEMAKE[case]
    with pytest.raises(SystemExit) as ended:
        check_arguments(arguments)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.count("\n") == 1
    assert [word for word in words if word not in message] == []


def test_ctrl_c_while_snakemake_plans_is_one_line(monkeypatch, capsys):
    from snella.jobs.arguments import check_arguments

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    check_arguments([])
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "snella: interrupted; the same command resumes.\n"
    sys.excepthook(ValueError, ValueError("other"), None)
    assert "ValueError: other" in capsys.readouterr().err


def test_a_compiled_file_that_a_full_disk_cut_short_is_one_line(tmp_path, monkeypatch):
    import importlib
    import py_compile

    from snella.errors import explain

    (tmp_path / "cut_short.py").write_text("value = [1, 2, 3]\n")
    compiled = Path(py_compile.compile(str(tmp_path / "cut_short.py")))
    compiled.write_bytes(compiled.read_bytes()[:-20])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EOFError) as raised:
        importlib.import_module("cut_short")
    outcome = explain(raised.value)
    assert outcome.status == 2 and "__pycache__" in outcome.line


@pytest.mark.parametrize("content", [b"# nothing\n", b"suite: [\n", b"gr\xf6\xdfe: 1\n"])
def test_configurations_that_snakemake_would_not_name(tmp_path, capsys, content):
    from snella.jobs.arguments import check_arguments

    check_arguments(["--configfile", "config/config.yaml", "-n", "--config", "suite=smoke"])
    (tmp_path / "my.yaml").write_bytes(content)
    with pytest.raises(SystemExit):
        check_arguments(["--configfile", f"{tmp_path}/my.yaml"])
    assert "my.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--configfile", "none.yaml", "--", "x"], "Cannot read the configuration none.yaml"),
        (["--config", "suite=smoke", "--", "results/tabel1.tex"], "Did you mean 'table1'"),
        (["--nocolor", "results/none.txt", "--config", "suite=smoke"], "No rule makes"),
        (["--set-threads", "trian=2", "--", "results/table1.tex"], "Did you mean 'train'"),
        (["--config", "suite=smoke", "--", "table1"], "Did you mean results/table1.tex"),
    ],
)
def test_a_users_mistake_under_snakemake_is_one_line_and_status_2(arguments, words):
    """No traceback, no name of a rule or wildcard; only what Snakemake says at its start."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "-q", "all", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("snella: ")]
    assert len(ours) == 1 and words in ours[0], done.stderr
    assert not any(word in done.stderr + done.stdout for word in ("Traceback", "Exception"))


def test_help_and_version(capsys):
    for arguments in (["--version"], ["--help"], *([verb, "--help"] for verb in verbs())):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert shown.strip()
        if arguments[0] != "--version":
            assert "snella" in shown


def verbs() -> list[str]:
    from snella.cli.parser import _verbs_of, build_parser

    return list(_verbs_of(build_parser()))


def test_every_option_has_help_and_every_verb_an_example():
    from snella.cli.parser import _verbs_of, build_parser

    for name, sub in _verbs_of(build_parser()).items():
        assert sub.description and f"snella {name}" in sub.epilog
        assert all(action.help for action in sub._actions), name


@pytest.mark.parametrize("verb", ["methods", "datasets", "plan", "status"])
def test_json_for_programs(tmp_path, capsys, verb):
    places = [f"results={tmp_path}/results", f"data={tmp_path}/data", "suite=smoke"]
    assert main([verb, "--json", "--config", *places]) == 0
    found = json.loads(capsys.readouterr().out)
    if isinstance(found, dict):
        assert (found["suite"], found["runs"], found["done"]) == ("smoke", 16, 0)
    else:
        assert {"full", "digits"} & {entry["name"] for entry in found if entry["in_suite"]}


def test_lists_never_cut_a_name(capsys):
    label = "A long label " * 7
    assert main(["methods", "--config", f"methods.full.label={label}"]) == 0
    assert label.strip() in capsys.readouterr().out


def test_doctor_finds_what_is_missing_and_names_no_place(tmp_path, capsys, monkeypatch):
    arguments = ["doctor", "--json", "--config", "suite=vtab1k", f"results={tmp_path}/results"]
    assert main(arguments) == 1
    text = capsys.readouterr().out
    found = {entry["what"]: entry for entry in json.loads(text)}
    assert found["Python"]["level"] == "ok"
    assert (
        found["data pets"]["level"] == "problem" and "docs/data.md" in found["data pets"]["remedy"]
    )
    assert str(Path.home()) not in text and str(ROOT) not in text
    assert "data sets: 19" in found["configuration"]["found"], found["configuration"]
    assert main(["doctor", "--json", "--config", "suite=quik"]) == 1
    found = {entry["what"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert "Did you mean 'quick'" in found["configuration"]["found"]


def test_a_table_that_is_not_utf8_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    (tmp_path / "t.tex").write_bytes(b"gr\xf6\xdfe")
    assert "t.tex is not UTF-8" in says(capsys, "pdf", f"{tmp_path}/t.tex")


def test_lines_stay_readable_whatever_a_user_wrote(tmp_path, capsys):
    assert len(says(capsys, "methods", "--configfile", "x" * 5000)) < 300
    (tmp_path / "my.yaml").write_text(f"suite: quick\n{'y' * 9000}: 1\n")
    assert len(says(capsys, "methods", "--configfile", f"{tmp_path}/my.yaml")) < 1600


def test_downloads_are_listed_and_a_misspelt_one_is_named(capsys):
    assert main(["data", "download"]) == 0
    assert "licence:" in capsys.readouterr().out
    assert "Did you mean 'cifar100'" in says(capsys, "data", "download", "cifar10")
    assert "Did you mean 'digits'" in says(capsys, "data", "check", "digit")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(capsys, shell):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    assert "--dataset" in capsys.readouterr().out


def test_schemas_are_current(tmp_path, capsys):
    """``snella schema`` writes workflow/schemas again."""
    assert main(["schema", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    made = {p.name: p.read_text() for p in tmp_path.iterdir()}
    kept = {p.name: p.read_text() for p in (ROOT / "workflow/schemas").glob("*.json")}
    assert made == kept, "run `snella schema`"


def test_a_reader_that_stops_early_is_no_error():
    """As in `snella methods | head -1`, of JSON and of what rich draws."""
    for command in ("methods --json | head -1", "methods | true"):
        done = subprocess.run(
            f"{sys.executable} -m snella.cli {command}",
            shell=True, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stderr == ""


def test_a_line_per_finished_cell(tmp_path, monkeypatch):
    from snella.jobs import cells

    monkeypatch.chdir(tmp_path)
    record = {
        "run": {"method": "full", "dataset": "digits", "seed": 0}, "status": "ok", "reason": None,
        "metric": "top1", "metric_info": [{"name": "top1", "unit": "%"}],
        "metrics": {"last": {"top1": 0.572}},
    }  # fmt: skip
    assert cells.finished_line(record) == "full on digits, seed 0: ok, top1 57.2 %"
    cells.begin(["a/record.json", "b/record.json"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a/record.json").write_text("{}")
    assert "(1 of 2, about" in cells.finished_line(record)
