"""The checks of one method on one backbone family.

Each takes a :class:`Subject` and returns the few words of a report's cell, or raises
:class:`Failure` or :class:`Note`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from functools import partial

import torch
from safetensors.torch import load, save
from torch import Tensor

from snella.check.findings import Failure, Finding, Note, finding, some
from snella.check.subject import EPOCHS, STEPS, Subject
from snella.errors import CannotMerge, one_line
from snella.methods.base import method_file, prepare_model
from snella.models.parameters import count_parameters, trainable
from snella.models.tiny import BASE_SIZE, base_backbone

TOLERANCE = 1e-5
TRAINS = "trains"
RESTORED = "saves and loads"
_KEY_BIAS = re.compile(r"\.(qkv\.k|to_k|add_k_proj)\..*bias")
"""What is added to all keys alike the softmax ignores: its gradient is a rounding error."""


def examine(subject: Subject, without: Collection[str] = ()) -> list[Finding]:
    """Run all checks but ``without``; if the method does not even train, that is the finding."""
    file = method_file(subject.method)
    first = finding(TRAINS, subject.kind, file, partial(_trains, subject))
    if first.status == "failed":
        return [first]
    return [
        finding(name, subject.kind, file, partial(check, subject))
        for name, check in CHECKS.items()
        if name not in without
    ]


def _trains(subject: Subject) -> str:
    assert subject.fit and subject.answer is not None and subject.state is not None
    return ""


def tiny_count(subject: Subject) -> str:
    """Trainable parameters on the tiny backbone, without the head."""
    return f"{subject.method.count(subject.model)['trainable']:,}"


def base_count(subject: Subject) -> str:
    """Trainable parameters on the family's usual backbone in full size, without the head."""
    if subject.kind not in BASE_SIZE:
        return "–"
    title = BASE_SIZE[subject.kind][0]
    model = base_backbone(subject.kind)
    try:
        with torch.device("meta"):
            prepare_model(subject.method, model)
    except (RuntimeError, NotImplementedError) as error:
        reason = f"{title} cannot be counted without its weights: {one_line(error)}"
        raise Note(reason, "unknown") from error
    found = f"{subject.method.count(model)['trainable']:,}"
    if count_parameters(subject.model) != subject.counts:
        raise Note("counted before calibration, which chooses the rest", found)
    return found


def loss_falls(subject: Subject) -> str:
    """The toy task's loss is lower after a dozen steps."""
    before, after = subject.fit.before, subject.fit.after
    digits = 2 if abs(before - after) >= 0.01 else 4
    text = f"{before:.{digits}f}→{after:.{digits}f}"
    if not after < before:
        raise Failure(f"in {EPOCHS * STEPS} steps on one batch the loss went {text}")
    return text


def all_marked_learn(subject: Subject) -> str:
    """Every trainable tensor is optimised, and gets a gradient at some step."""
    fit = subject.fit
    if fit.left_out:
        raise Failure(f"parameter_groups leaves out {some(fit.left_out)}: it would never train")
    ignored = ignored_by_backbone(subject)
    dead = [n for n in fit.marked if n not in fit.live | ignored and not _KEY_BIAS.search(n)]
    if dead:
        raise Failure(
            f"{some(dead)} got no gradient: use it in the forward pass, or do not mark it"
        )
    return f"{len(fit.marked)}"


def ignored_by_backbone(subject: Subject) -> set[str]:
    """Weights that do not change the plain backbone's output, such as SD3's last context query."""
    plain = subject.plain()
    subject.toy.loss(plain, subject.batch).backward()
    return {n for n, p in plain.named_parameters() if p.grad is None or not bool(p.grad.any())}


def frozen_stay(subject: Subject) -> str:
    """Nothing moves in training that was not marked before it."""
    if moved := subject.fit.moved:
        raise Failure(f"{some(moved)} moved although frozen: mark it in adapt, or leave it alone")
    return ""


def deterministic(subject: Subject) -> str:
    """The same seed gives the bit-identical adapter."""
    ours, theirs = subject.state, subject.twin().state
    odd = [n for n in ours if n not in theirs or not torch.equal(ours[n], theirs[n])]
    if odd or ours.keys() != theirs.keys():
        raise Failure(
            f"two trainings with one seed differ in {some(odd) or 'the names of their tensors'}: "
            "draw random numbers from torch's global generator only"
        )
    return ""


def restored(subject: Subject) -> str:
    """``state``, loaded into a freshly adapted model, restores output and parameters."""
    return compare_restored(subject, *restore(subject, load(save(subject.state))))


def restore(subject: Subject, state: dict[str, Tensor]) -> tuple[Tensor, list[str]]:
    """Adapt afresh with another seed and load ``state``; the answer, and what trains."""
    model = subject.adapted(seed=99)
    subject.method.load_state(model, state)
    return subject.answer_of(model), list(trainable(model))


def compare_restored(subject: Subject, found: Tensor, names: list[str]) -> str:
    """Fail unless a restored model answers as the trained one and trains the same tensors."""
    difference = (found - subject.answer).abs().max().item()
    if not difference <= TOLERANCE / 10:
        raise Failure(
            f"after saving and loading the output differs by {difference:.0e}: `state` must hold "
            "all that changes the output, as parameters and buffers do"
        )
    if names != list(subject.fit.marked):
        odd = some(sorted(set(names) ^ set(subject.fit.marked))) or "their order"
        raise Failure(f"after load_state other tensors train than before ({odd})")
    return ""


def autocast(subject: Subject) -> str:
    """Forward and backward pass run under bfloat16 autocast and stay finite."""
    model = subject.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = subject.toy.loss(model, subject.batch)
    loss.backward()
    grads = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    bad = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
    model.zero_grad()
    if bad or not math.isfinite(loss.item()):
        raise Failure(f"under bf16 autocast {some(bad) or 'the loss'} is NaN or infinite")
    return ""


def merged(subject: Subject) -> str:
    """``merge`` gives back the plain backbone, with the same output. Comes last: it merges."""
    expected, model = subject.answer, subject.model
    # A large update can leave a model that multiplies any rounding; merging may round, too.
    limit = max(TOLERANCE * max(1.0, expected.abs().max().item()), 10 * subject.rounding)
    try:
        subject.method.merge(model)
    except CannotMerge as reason:
        if not str(reason):
            raise Failure("CannotMerge must say why") from None
        raise Note(str(reason), "cannot") from None
    difference = (subject.answer_of(model) - expected).abs().max().item()
    if not difference <= limit:
        raise Failure(f"merging moves the output by {difference:.0e}, over {limit:.0e}")
    plain = subject.plain()
    keys = plain.state_dict().keys()
    if list(model.state_dict()) != list(keys):
        odd = some(model.state_dict().keys() ^ keys) or "the order"
        raise Failure(f"after merge the state dict is not the backbone's: {odd}")
    if [type(m) for m in model.modules()] != [type(m) for m in plain.modules()]:
        raise Failure("merge leaves modules of the method: put plain layers back")
    return f"{difference:.0e}"


CHECKS: dict[str, Callable[[Subject], str]] = {
    "parameters, tiny": tiny_count,
    "parameters, full": base_count,
    "loss falls": loss_falls,
    "all marked learns": all_marked_learn,
    "frozen stays": frozen_stay,
    "deterministic": deterministic,
    RESTORED: restored,
    "bf16 autocast": autocast,
    "merges": merged,
}
