"""What every method must do, on tiny backbones: used by the tests of the single methods."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from snella.check import Subject, examine
from snella.check.contract import ignored_by_backbone
from snella.method import Method, count_parameters, trainable
from snella.methods.base import build_method, prepare_model
from snella.models.tiny import tiny_backbone, toy_batch

BASELINES = Path(__file__).parents[1] / "baselines"
Batch = dict[str, Tensor]


def functions(method: Method) -> SimpleNamespace:
    """The module-level names of the file that ``method`` comes from."""
    return SimpleNamespace(**type(method).adapt.__globals__)


def make(name: str, **settings: object) -> Method:
    return build_method(BASELINES / f"{name}.py", settings)


def backbone(family: str = "vit", **sizes: object) -> nn.Module:
    """A tiny untrained backbone with fixed weights and five classes; plain ones 48 wide."""
    narrow = {"embed_dim": 48, "num_heads": 3} if family in ("vit", "sam") else {}
    if family == "sam":
        pytest.importorskip("segment_anything")
    return tiny_backbone(family, **narrow | sizes)


def batch(size: int = 8) -> Batch:
    return toy_batch(size=size)


def logits(model: nn.Module, images: Tensor | None = None) -> Tensor:
    return model(batch()["image"] if images is None else images)


def loss_fn(model: nn.Module, data: Batch) -> Tensor:
    return F.cross_entropy(logits(model, data["image"]), data["label"])


def prepared(method: Method, family: str = "vit", seed: int = 1) -> nn.Module:
    model = backbone(family).eval()
    torch.manual_seed(seed)
    prepare_model(method, model)
    return model


def train(
    method: Method, model: nn.Module, steps: int = 12, lr: float = 5e-3, decay: float = 1e-4
) -> tuple[list[float], set[str]]:
    """AdamW on one batch; returns the losses and what got a non-zero gradient at some step."""
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr, decay))
    losses, live = [], set()
    for _ in range(steps):
        loss = loss_fn(model, batch())
        optimizer.zero_grad()
        loss.backward()
        live |= {n for n, p in trainable(model).items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        losses.append(loss.item())
    return losses, live


def check_contract(
    method: Method, family: str = "vit", dead: tuple[str, ...] = (), lr: float = 5e-3
) -> None:
    """Pass ``snella check`` on one family, and load a state twice without harm.

    Tensors whose name contains one of ``dead`` cannot change the output and are excused.
    """
    subject = Subject(method, family, lr)
    without = ["parameters, full"] + ["all marked learns"] * bool(dead)
    assert [found for found in examine(subject, without) if found.status == "failed"] == []
    ignored = ignored_by_backbone(subject)
    silent = [name for name in subject.fit.marked if name not in subject.fit.live | ignored]
    assert not dead or [n for n in silent if not any(d in n for d in dead)] == []
    again = subject.adapted(seed=2)
    for _ in range(2):
        method.load_state(again, load(save(subject.state)))
    assert method.state(again).keys() == subject.state.keys()


def parameters_on(name: str, method: Method, classes: int = 10) -> int:
    """Trainable parameters without head of a full-size timm model, without its memory."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    prepare_model(method, model)
    return count_parameters(model)["trainable"]
