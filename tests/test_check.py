"""The contract suite: every row passes it, and it sees what is wrong with a method."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent, indent

import pytest
import torch

from snella.check import Subject, check_method, examine
from snella.check.contract import compare_restored
from snella.check.findings import Failure, Finding
from snella.check.fresh import restore_elsewhere
from snella.check.originality import fingerprint, original
from snella.check.suite import _claims
from snella.cli import main
from snella.errors import UserError
from snella.method import Unsupported
from snella.methods.base import build_method
from snella.models.tiny import FAMILIES, missing_extra, output, tiny_backbone
from snella.suite import config as configuration
from snella.suite import plan

ROOT = Path(__file__).resolve().parents[1]
ROWS = configuration.load(ROOT / "config/config.yaml").methods
HEADER = """\
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from snella.method import (Method, blocks, replace, slots)


class _Gain(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(torch.zeros_like(layer.weight[:, 0]))

    def forward(self, x):
        return self.layer(x) * (1 + self.gain)


class Mine(Method):
    supports: ClassVar[frozenset[str]] = frozenset({"vit"})

    def adapt(self, model):
        for slot in slots(model, ("fc2",)):
            replace(model, slot.path, _Gain(model.get_submodule(slot.path)))
"""
MERGE = """
def merge(self, model):
    for path, module in list(model.named_modules()):
        if isinstance(module, _Gain):
"""


def write(folder: Path, body: str = "", name: str = "mine", header: str = HEADER) -> Path:
    """A small working method, and ``body`` as further hooks of its class."""
    path = folder / f"{name}.py"
    path.write_text(header + "\n" + indent(dedent(body), "    "))
    return path


def findings(path: Path, kind: str = "vit") -> dict[str, Finding]:
    subject = Subject(build_method(path, {}), kind)
    return {f.check: f for f in examine(subject, without=["parameters, full"])}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_passes_on_the_families_it_claims(name: str, monkeypatch) -> None:
    """On all of them the first row of each file, on the ViT every row."""
    monkeypatch.chdir(ROOT)
    path, hyperparameters = plan.find_method(configuration.load(), name)
    method = build_method(path, hyperparameters)
    first = next(row for row, entry in ROWS.items() if entry.file == ROWS[name].file) == name
    supported, reasons = [], []
    for kind in sorted(method.supports if first else {"vit"}):
        if missing_extra(kind):
            continue
        try:
            subject = Subject(method, kind)
        except Unsupported as reason:
            assert str(reason)
            reasons.append(str(reason))
            continue
        supported.append(kind)
        found = examine(subject, without=["parameters, full"])
        assert [f for f in found if f.status == "failed"] == []
    # A row for a large model may need larger matrices or more blocks than the tiny ViT has; then it
    # says so.
    small = ("the product is 9216", "is beyond 3")
    assert "vit" in supported or any(words in r for r in reasons for words in small)


def test_a_sound_method_passes_every_check(tmp_path: Path) -> None:
    found = findings(write(tmp_path))
    assert {name: f.status for name, f in found.items() if f.status != "passed"} == {
        "merges": "noted"
    }
    assert found["parameters, tiny"].text == "288"
    assert found["all marked learns"].text == "5"


CHOSEN = """\
from typing import ClassVar

from snella.method import Method, batch_gradients, fold_entries, slots, train_entries


class Mine(Method):
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam", "sd3"})

    def adapt(self, model):
        pass

    def calibrate(self, model, batches, loss_fn):
        names = [f"{slot.path}.weight" for slot in slots(model, ("fc1",))]
        for gradients in batch_gradients(model, names, batches, loss_fn):
            chosen = {name: g.abs().flatten().topk(20).indices for name, g in gradients.items()}
        for name, indices in chosen.items():
            train_entries(model, name, indices)

    def merge(self, model):
        fold_entries(model)
"""


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_method_that_chooses_its_entries_from_data_needs_no_more_than_calibrate(
    tmp_path: Path, kind: str
) -> None:
    """Nothing is marked before; on SD3, which has no head, nothing at all."""
    if missing_extra(kind):
        pytest.skip(f"needs the extra {missing_extra(kind)}")
    found = findings(write(tmp_path, header=CHOSEN), kind)
    assert {name: f.detail for name, f in found.items() if f.status == "failed"} == {}
    assert found["saves and loads"].status == found["merges"].status == "passed"


def test_a_calibration_that_marks_nothing_is_seen(tmp_path: Path) -> None:
    header = CHOSEN.split("        names =")[0] + "        pass\n"
    found = findings(write(tmp_path, header=header))
    assert "Mine.calibrate marks nothing trainable" in found["trains"].detail


FAULTS = {
    "all marked learns": [
        (
            """
            def adapt(self, model):
                blocks(model)[0].unused = nn.Parameter(torch.ones(3))
            """,
            "blocks.0.unused got no gradient",
        ),
        (
            """
            def parameter_groups(self, model, lr, weight_decay):
                return [{"params": list(model.head.parameters()), "lr": lr}]
            """,
            "parameter_groups leaves out blocks.0.mlp.fc2.gain and 2 more",
        ),
    ],
    "frozen stays": [
        (
            """
            def on_step_end(self, model):
                model.cls_token.data.add_(1)
            """,
            "cls_token moved although frozen",
        ),
    ],
    "loss falls": [
        (
            """
            def parameter_groups(self, model, lr, weight_decay):
                return super().parameter_groups(model, 100, weight_decay)
            """,
            "the loss went",
        ),
    ],
    "deterministic": [
        (
            """
            def on_epoch_start(self, model, epoch, epochs):
                noise = torch.Generator()
                noise.seed()
                for block in blocks(model):
                    block.mlp.fc2.gain.data += torch.rand(96, generator=noise)
            """,
            "draw random numbers from torch's global generator only",
        ),
    ],
    "saves and loads": [
        (
            """
            def calibrate(self, model, batches, loss_fn):
                model.blocks[0].mlp.fc2.layer.weight.data.mul_(0.5)
            """,
            "`state` must hold all that changes the output",
        ),
        (
            """
            def load_state(self, model, state):
                super().load_state(model, state)
                model.cls_token.requires_grad_(True)
            """,
            "other tensors train than before (cls_token)",
        ),
    ],
    "bf16 autocast": [
        (
            """
            def calibrate(self, model, batches, loss_fn):
                model.head.register_forward_hook(
                    lambda module, args, y: y * (1e39 if y.dtype == torch.bfloat16 else 1.0)
                )
            """,
            "NaN or infinite",
        ),
    ],
    "merges": [
        (
            MERGE + "            replace(model, path, module.layer)",
            "merging moves the output",
        ),
        (
            MERGE + "            module.double = 1",
            "after merge the state dict is not the backbone's",
        ),
        (
            """
            def merge(self, model):
                for block in model.blocks:
                    fc2 = block.mlp.fc2
                    block.mlp.fc2 = nn.Sequential(fc2)
            """,
            "after merge the state dict is not the backbone's",
        ),
    ],
    "trains": [
        (
            """
            def on_epoch_start(self, model, epoch, epochs):
                model.stem.weight
            """,
            "AttributeError: 'VisionTransformer' object has no attribute 'stem' (mine.py, line",
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("check", "body", "words"),
    [(check, *fault) for check, faults in FAULTS.items() for fault in faults],
)
def test_each_fault_is_seen_and_named(tmp_path: Path, check: str, body: str, words: str) -> None:
    found = findings(write(tmp_path, body))
    assert found[check].status == "failed", found
    assert words in found[check].detail and "\n" not in found[check].detail


def test_a_new_process_knows_only_the_file(tmp_path: Path) -> None:
    """A module's variable survives in this process; the adapter must not live on it."""
    body = """
    def calibrate(self, model, batches, loss_fn):
        _CACHE["shift"] = 0.5
    """
    header = HEADER.replace("class _Gain", "_CACHE = {}\n\n\nclass _Gain").replace(
        "(1 + self.gain)", '(1 + self.gain + _CACHE.get("shift", 0))'
    )
    path = write(tmp_path, body, header=header)
    subject = Subject(build_method(path, {}), "vit")
    assert {f.check: f for f in examine(subject)}["saves and loads"].status == "passed"
    answers = restore_elsewhere(path, {}, {"vit": subject.state})
    with pytest.raises(Failure, match="the output differs"):
        compare_restored(subject, *answers("vit"))


def test_a_sound_method_answers_the_same_in_a_new_process(tmp_path: Path) -> None:
    path = write(tmp_path)
    subject = Subject(build_method(path, {}), "vit")
    answers = restore_elsewhere(path, {}, {"vit": subject.state, "swin": subject.state})
    assert compare_restored(subject, *answers("vit")) == ""
    with pytest.raises(
        Failure, match="in a new process failed: Unsupported: Mine does not support"
    ):
        answers("swin")


def test_a_copy_is_known_by_its_code(tmp_path: Path) -> None:
    ours = write(tmp_path)
    text = ours.read_text().replace("self.layer = layer", "self.layer = layer  # as it was")
    copy = tmp_path / "copy.py"
    copy.write_text(f'"""Another method."""\n\n{text}')
    assert fingerprint(copy) == fingerprint(ours)
    with pytest.raises(Failure, match=r"same code as .*mine\.py"):
        original(copy, {}, [], [copy, ours])


def test_a_copy_is_known_by_what_it_trains_to(tmp_path: Path) -> None:
    ours = write(tmp_path)
    renamed = ours.read_text().replace("gain", "scale").replace("Mine", "Yours")
    copy = write(tmp_path, name="copy", header=renamed)
    subject = Subject(build_method(copy, {}), "vit")
    with pytest.raises(Failure, match=r"trains to the same output as .*mine\.py"):
        original(copy, {}, [subject], [ours])


def test_another_method_is_no_copy(tmp_path: Path) -> None:
    ours = write(tmp_path)
    broken = write(tmp_path, name="broken", header="import nothing_like_it\n")
    other = write(tmp_path, name="other", header=HEADER.replace('"fc2"', '"fc1"'))
    subject = Subject(build_method(ours, {}), "vit")
    assert original(ours, {}, [subject], [ours, broken, other]) == "2 others"


def test_a_backbone_that_is_not_claimed_must_be_refused(tmp_path: Path) -> None:
    method = build_method(write(tmp_path), {})
    assert _claims(method, [Subject(method, "vit")]) == "refuses swin, convnext, unknown"
    careless = build_method(write(tmp_path, "def check_supported(self, model): pass"), {})
    with pytest.raises(Failure, match="adapts swin backbones without claiming them"):
        _claims(careless, [Subject(careless, "vit")])


def test_a_claimed_family_that_does_not_exist_fails(tmp_path: Path) -> None:
    path = write(tmp_path, header=HEADER.replace('{"vit"}', '{"vitt"}'))
    found = check_method(path, {})
    assert "Did you mean 'vit'" in found[0].detail and found[0].status == "failed"
    assert "no claimed backbone could be trained" in found[1].detail


@pytest.mark.parametrize("kind", FAMILIES)
def test_tiny_backbones_are_the_same_every_time(kind: str) -> None:
    if missing_extra(kind):
        pytest.skip(f"{kind} needs an extra")
    first, second = tiny_backbone(kind).eval(), tiny_backbone(kind).eval()
    assert torch.equal(output(first), output(second))


def test_the_report_is_readable_and_the_status_tells(tmp_path: Path, capsys) -> None:
    path = write(tmp_path, "def on_step_end(self, model): model.cls_token.data.add_(1)")
    assert main(["check", str(path)]) == 1
    shown = capsys.readouterr().out
    assert "FAILED: frozen stays (vit): cls_token moved although frozen" in shown
    assert "note: merges (vit): Mine does not fold into the backbone's weights" in shown
    assert "9,216" in shown and "2 of 11 checks failed" in shown
    assert max(len(line) for line in shown.splitlines() if "│" in line or "─" in line) <= 80


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora-9", "Did you mean 'lora-8'"),
        ("nowhere/mine.py", "nowhere/mine.py does not exist"),
    ],
)
def test_an_unknown_method_is_one_line(capsys, monkeypatch, name: str, words: str) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["check", name]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_a_file_that_does_not_import_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.py does not import: SyntaxError"):
        check_method(write(tmp_path, header="def oops(:\n"), {})
