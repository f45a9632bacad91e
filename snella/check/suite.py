"""The whole suite: every claimed family, a new process, refusals, and no copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from snella.check.contract import RESTORED, TRAINS, compare_restored, examine
from snella.check.findings import ALL, Failure, Finding, finding
from snella.check.fresh import restore_elsewhere
from snella.check.originality import original
from snella.check.subject import Subject
from snella.errors import Unsupported, unknown
from snella.methods.base import Method, build_method, prepare_model
from snella.models.tiny import FAMILIES, TIMM_FAMILIES, missing_extra, tiny_backbone


def check_method(
    path: Path,
    hyperparameters: dict[str, Any],
    others: Iterable[Path] = (),
    announce: Callable[[str], None] = lambda what: None,
) -> list[Finding]:
    """All findings on the method of ``path``; ``others`` are files that it must not copy.

    Raises :class:`~snella.errors.UserError` if the file or the hyper-parameters are wrong.
    """
    method = build_method(path, hyperparameters)
    findings: list[Finding] = []
    trained: list[Subject] = []
    for kind in sorted(method.supports, key=lambda k: (*FAMILIES, k).index(k)):
        announce(f"training on a tiny {kind}")
        subject, found = _subject(method, kind, path)
        findings += found if subject is None else examine(subject, without=[RESTORED])
        if subject is not None and "state" in vars(subject):
            trained.append(subject)
    announce("restoring in a new process")
    findings += _restored_elsewhere(path, hyperparameters, trained)
    announce("comparing with other methods")
    claims = partial(_claims, method, trained)
    findings.append(finding("supports what it claims, refuses the rest", ALL, path, claims))
    compare = partial(original, path, hyperparameters, trained, list(others))
    findings.append(finding("no copy of another method", ALL, path, compare))
    return findings


def _subject(method: Method, kind: str, path: Path) -> tuple[Subject | None, list[Finding]]:
    """The adapted tiny backbone, or the finding that says why there is none."""
    if kind not in FAMILIES:
        reason = str(unknown("family in `supports`", kind, FAMILIES))
        return None, [Finding(TRAINS, kind, "failed", "FAILED", reason)]
    if extra := missing_extra(kind):
        reason = f"not checked: pip install 'snella[{extra}]'"
        return None, [Finding(TRAINS, kind, "noted", "skipped", reason)]
    subjects: list[Subject] = []

    def adapt() -> str:
        subjects.append(Subject(method, kind))
        return ""

    found = finding(TRAINS, kind, path, adapt)
    return (subjects[0], []) if subjects else (None, [found])


def _restored_elsewhere(
    path: Path, hyperparameters: dict[str, Any], trained: list[Subject]
) -> list[Finding]:
    if not trained:
        return []
    states = {subject.kind: subject.state for subject in trained}
    answers = restore_elsewhere(path, hyperparameters, states)

    def compare(subject: Subject) -> str:
        return compare_restored(subject, *answers(subject.kind))

    return [finding(RESTORED, s.kind, path, partial(compare, s)) for s in trained]


def _claims(method: Method, trained: list[Subject]) -> str:
    """A method supports what it claims and refuses all else with a reason."""
    if not trained:
        raise Failure("no claimed backbone could be trained")
    others = {kind: tiny_backbone(kind) for kind in TIMM_FAMILIES if kind not in method.supports}
    others["unknown"] = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.LazyLinear(5))
    for kind, model in others.items():
        try:
            prepare_model(method, model)
        except Unsupported as reason:
            if not str(reason):
                raise Failure(f"refuses {kind} backbones without a reason") from None
        else:
            raise Failure(f"adapts {kind} backbones without claiming them in `supports`")
    return f"refuses {', '.join(others)}"
