"""A bad method file costs one line that names file, field and remedy, and no other row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snella.cli import main
from snella.errors import UserError
from snella.method import load_method
from snella.methods.base import build_method, prepare_model
from snella.models.tiny import tiny_backbone
from snella.runs import identity

IMPORTS = """\
from typing import ClassVar

from pydantic import Field
from torch import nn

from snella.method import (Method, slots)
"""
FULL = """
class Mine(Method):
    rank: int = Field(8, gt=0)

    def adapt(self, model):
        model.requires_grad_(True)
"""
NOTHING = """
class Mine(Method):
    def adapt(self, model):
        for name, parameter in model.named_parameters():
            if name.endswith("attn.qqkv.weight"):
                parameter.requires_grad_(True)
"""
BAD = {
    "syntax": (
        "class Mine(Method:\n    pass\n",
        {},
        ["mine.py does not import: SyntaxError", "line", "correct the file"],
    ),
    "import": (
        "import torhc\n",
        {},
        ["mine.py does not import: ModuleNotFoundError: No module named 'torhc'", "line 8"],
    ),
    "exit": ("raise SystemExit\n", {}, ["mine.py does not import: SystemExit"]),
    "untyped": (
        "class Mine(Method):\n    rank = 8\n",
        {},
        ["mine.py does not import: PydanticUserError", "rank", "line 8"],
    ),
    "none": ("", {}, ["mine.py must define exactly one Method class, found none"]),
    "generator": (
        FULL + "\n    def on_step_end(self, model):\n        yield\n",
        {},
        ["mine.py, line", "Mine.on_step_end yields or is async, so it would never run"],
    ),
    "two": (
        FULL + FULL.replace("Mine", "Yours"),
        {},
        ["found Mine, Yours", "start the names of helper classes with an underscore"],
    ),
    "no adapt": ("class Mine(Method):\n    pass\n", {}, ["Mine has no adapt", "write one"]),
    "nothing": (
        NOTHING,
        {},
        ["mine.py: Mine.adapt marks nothing trainable", "set requires_grad"],
    ),
    "nothing calibrated": (
        NOTHING + "\n    def calibrate(self, model, batches, loss_fn):\n        pass\n",
        {},
        ["mine.py: Mine.calibrate marks nothing trainable", "set requires_grad"],
    ),
    "moves": (
        NOTHING.replace("qqkv", "qkv")
        + "\n    def on_step_end(self, model):\n        model.cls_token.data.add_(1)\n",
        {},
        ["mine.py: Mine moves cls_token", "set requires_grad in adapt"],
    ),
    "other head": (
        "from snella.method import head\n\nclass Mine(Method):\n    def adapt(self, model):\n"
        "        model.requires_grad_(True)\n        model.head = nn.Linear(24, 4)\n",
        {},
        ["mine.py: Mine.adapt replaces or removes the head", "replaces_head = True"],
    ),
    "no head": (
        "class Mine(Method):\n    replaces_head: ClassVar[bool] = True\n\n"
        "    def adapt(self, model):\n"
        "        model.requires_grad_(True)\n        model.head = nn.Identity()\n",
        {},
        ["mine.py: Mine.adapt replaces or removes the head"],
    ),
    "late": (
        NOTHING.replace("qqkv", "qkv")
        + "\n    def on_epoch_start(self, model, epoch, epochs):\n"
        "        model.requires_grad_(True)\n",
        {},
        ["mine.py: a hook of Mine makes", "set requires_grad in adapt"],
    ),
    "module": (
        "class Mine(Method):\n    def adapt(self, model):\n"
        "        model.get_submodule('blocks.0.attn.qqkv').requires_grad_(True)\n",
        {},
        ["mine.py", "Mine.adapt does not fit VisionTransformer", "qqkv", "mine.py, line 10",
         "Did you mean 'blocks.0.attn.qkv'"],
    ),
    "place": (
        "class Mine(Method):\n    def adapt(self, model):\n        model.proj\n",
        {},
        ["mine.py", "no attribute 'proj'", "Did you mean 'patch_embed.proj'"],
    ),
    "attribute": (
        "class Mine(Method):\n    def adapt(self, model):\n        model.blokcs\n",
        {},
        ["mine.py", "no attribute 'blokcs'", "Did you mean 'blocks'"],
    ),
    "parameter": (
        "class Mine(Method):\n    def adapt(self, model):\n"
        "        dict(model.named_parameters())['cls_tokn'].requires_grad_(True)\n",
        {},
        ["mine.py", "KeyError: 'cls_tokn'", "line 10"],
    ),
    "role": (
        "class Mine(Method):\n    def adapt(self, model):\n        slots(model, ('qq',))\n",
        {},
        ["mine.py", "Unknown role 'qq'", "Did you mean 'q'"],
    ),
    "gradients": (
        "import torch\nclass Mine(Method):\n    def adapt(self, model):\n"
        "        torch.set_grad_enabled(False)\n",
        {},
        ["mine.py, line", "adapt: leaves gradients switched off", "torch.no_grad()"],
    ),
    "double": (
        "class Mine(Method):\n    def adapt(self, model):\n        model.double()\n",
        {},
        ["mine.py, line", "adapt: makes parameters float64"],
    ),
    "type": (
        FULL,
        {"rank": "eight"},
        ["mine.py: hyper-parameter rank", "valid integer", "(got 'eight')", "`hyperparameters:`"],
    ),
    "range": (FULL, {"rank": -1}, ["hyper-parameter rank", "greater than 0 (got -1)"]),
    "name": (
        FULL,
        {"ranc": 4},
        ["Unknown hyper-parameter of", "mine.py", "'ranc'", "Did you mean 'rank'"],
    ),
}  # fmt: skip


@pytest.fixture
def run(make_run, capsys):
    """Do the run of a method file as a job of the workflow does; its status and its output."""

    def execute(file: Path, hyperparameters: dict | None = None) -> tuple[int, str]:
        chosen = make_run("mine", hyperparameters, epochs=1, warmup_epochs=0)
        method = chosen.method.model_copy(update={"file": str(file)})
        chosen = chosen.model_copy(update={"method": method})
        identity._stage.cache_clear()  # as a new process would begin
        return main(["execute", "--settings", chosen.to_json()]), capsys.readouterr().err

    return execute


def _failure(tmp_path: Path) -> Path:
    return tmp_path / "results/runs/test/tiny/tiny/mine/seed0/failure.json"


@pytest.mark.parametrize("case", BAD)
def test_one_line_names_file_field_and_remedy(tmp_path: Path, run, case: str) -> None:
    source, hyperparameters, words = BAD[case]
    file = tmp_path / "mine.py"
    file.write_text(IMPORTS + "\n" + source)
    status, message = run(file, hyperparameters)
    assert status == 2
    assert message.startswith("snella: ") and message.count("\n") == 1
    assert [word for word in words if word not in message] == [], message
    failure = json.loads(_failure(tmp_path).read_text())
    assert failure["status"] == "failed" and failure["reason"] in message

    file.write_text(IMPORTS + FULL)  # corrected: the same run succeeds, nothing is left behind
    assert run(file) == (0, "")
    assert not _failure(tmp_path).exists()


HOOKS = {
    "parameter_groups(self, model, lr, weight_decay)": (
        ("pass", 2, "parameter_groups: TypeError: 'NoneType'"),
        ("return iter([])", 2, "parameter_groups: must return a list, no generator"),
        ("return []", 2, "parameter_groups: ValueError: optimizer got an empty parameter list"),
        ("return 2 * [{'params': [model.cls_token]}]", 2, "in more than one parameter group"),
    ),
    "auxiliary_loss(self, model, batch, loss_fn)": (
        ("return 'much'", 2, "auxiliary_loss: it must return a scalar tensor or None"),
        ("return model.cls_token", 2, "auxiliary_loss: it must return a scalar tensor or None"),
    ),
    "state(self, model)": (
        ("return {'rank': 1}", 2, "state: it must return tensors by name"),
        ("return {1: model.cls_token}", 2, "state: it must return tensors by name"),
        ("return {'a': model.cls_token.to('meta')}", 2, "state: it must return tensors by name"),
    ),
    "training_state(self, model)": (
        ("return [model.cls_token]", 2, "training_state: it must return tensors by name"),
    ),
    "count(self, model)": (
        ("return {'trainable': 1.5}", 2, "count: must return whole numbers named trainable, head"),
        ("return model.counts", 1, "no attribute 'counts'"),
    ),
    "on_step_end(self, model)": (
        ("import os; os._exit(0)", 1, "SystemExit: os._exit(0)"),
        ("import os; os.chdir('/')", 1, "os.chdir('/') while a run is at work"),
        ("raise SystemExit", 1, "SystemExit:"),
        ("raise GeneratorExit", 1, "GeneratorExit:"),
        ("self.on_step_end(model)", 1, "RecursionError:"),
        ("raise type('E', (Exception,), {'__str__': None})", 1, "E: without a message"),
    ),
}


@pytest.mark.parametrize(
    "hook,body,status,words", [(hook, *case) for hook, cases in HOOKS.items() for case in cases]
)
def test_what_a_hook_returns_or_raises_is_one_line_with_its_place(
    tmp_path: Path, run, hook: str, body: str, status: int, words: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{IMPORTS}{FULL}\n    def {hook}:\n        {body}\n")
    found, _ = run(file)
    failure = json.loads(_failure(tmp_path).read_text())
    assert (found, failure["status"]) == (status, "failed")
    if hook.startswith("count"):
        assert not list(_failure(tmp_path).parent.glob("predictions/*"))  # before any training
    assert words in failure["reason"] and "mine.py, line 1" in failure["reason"]
    assert "\n" not in failure["reason"]


def test_a_merge_that_ends_the_process_costs_no_training(tmp_path: Path, run) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{IMPORTS}{FULL}\n    def merge(self, model):\n        raise SystemExit(0)\n")
    assert run(file) == (0, "")
    record = json.loads(_failure(tmp_path).with_name("record.json").read_text())
    assert record["merge"]["failed"] and "SystemExit: 0 (mine.py, line 1" in str(record["merge"])


def test_an_error_that_shows_in_other_code_names_the_method_file(tmp_path: Path, run) -> None:
    file = tmp_path / "mine.py"
    hook = "def on_step_end(self, model):\n        model.double()\n"
    file.write_text(f"{IMPORTS}{FULL}\n    {hook}")
    assert run(file)[0] == 1
    assert "mine.py" in json.loads(_failure(tmp_path).read_text())["reason"]


def test_a_file_without_a_class_that_imports_what_is_not_there(tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torhc\n")
    rows = f"methods.mine={{file: {file}}}"
    assert main(["run", "--method", "mine", "--dataset", "digits", "--config", rows]) == 2
    assert "mine.py does not import: there is no package 'torhc'" in capsys.readouterr().err


def test_a_missing_method_file_is_one_line(capsys) -> None:
    rows = "methods.mine={file: nowhere/mine.py}"
    assert main(["run", "--method", "mine", "--dataset", "digits", "--config", rows]) == 2
    message = capsys.readouterr().err
    assert "nowhere/mine.py does not exist" in message and "`file:`" in message


def test_files_of_one_name_in_two_folders_do_not_mix(tmp_path: Path) -> None:
    for folder, rank in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(IMPORTS + FULL.replace("8", str(rank)))
    a, b = (build_method(tmp_path / folder / "mine.py", {}) for folder in "ab")
    assert (a.rank, b.rank) == (1, 2) and type(a).__module__ != type(b).__module__


def test_annotations_may_be_postponed(tmp_path: Path) -> None:
    """``from __future__ import annotations`` needs the module's names when fields are built."""
    file = tmp_path / "mine.py"
    later = FULL.replace("rank: int", "rank: Size").replace("\nclass", "\nSize = int\n\n\nclass")
    file.write_text("from __future__ import annotations\n" + IMPORTS + later)
    assert build_method(file, {"rank": 3}).rank == 3


def test_the_head_alone_may_train_by_intention(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(IMPORTS + NOTHING)
    with pytest.raises(UserError, match="head_only = True"):
        prepare_model(build_method(file, {}), tiny_backbone())
    file.write_text(
        "from typing import ClassVar\n" + IMPORTS + NOTHING.replace(
            "    def adapt", "    head_only: ClassVar[bool] = True\n\n    def adapt"
        )
    )  # fmt: skip
    assert load_method(file).head_only
    prepare_model(build_method(file, {}), tiny_backbone())
