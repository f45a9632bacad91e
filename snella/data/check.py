"""``snella data check NAME``: everything about a copy of a data set that can move a number.

Counts per split and class against the published ones, labels and classes, images that occur
twice, how the pixels are encoded, and image files that no list names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from snella.data.official import OFFICIAL
from snella.data.options import Options, options_of
from snella.data.readers import list_images, look
from snella.data.readers.classes import SUFFIXES
from snella.data.readers.findings import (
    check_labels,
    check_listing,
    class_counts,
    describe,
    fingerprint,
    warnings_of,
)
from snella.data.readers.listing import Listing, few
from snella.data.readers.pixels import Seen
from snella.errors import UserError

Level = Literal["ok", "note", "warning", "error"]
SIGNS = {"ok": "✓", "note": "·", "warning": "!", "error": "✗"}


@dataclass(frozen=True)
class Finding:
    """One thing found about a data set."""

    level: Level
    text: str


class Entry(Protocol):
    """What a data set's entry in the configuration has."""

    path: str | None
    num_classes: int | None
    options: dict[str, Any]


def check(name: str, entry: Entry) -> list[Finding]:
    """Look at a data set's folder completely.

    The first error ends the look, since what follows would rest on it; it is a finding and not
    raised, so that a printer can show what was found before.
    """
    findings: list[Finding] = []
    try:
        for finding in _look(name, entry):
            findings.append(finding)
    except UserError as error:
        findings.append(Finding("error", str(error)))
    return findings


def lines(findings: Iterable[Finding]) -> list[str]:
    """Findings as printable lines, and a last one that counts them."""
    found = list(findings)
    text = [f"{SIGNS[finding.level]} {finding.text}" for finding in found]
    errors = sum(finding.level == "error" for finding in found)
    warnings = sum(finding.level == "warning" for finding in found)
    if errors:
        return [*text, "cannot be used as it is"]
    return [*text, f"usable, {warnings} warning{'s' * (warnings != 1)}" if warnings else "good"]


def _look(name: str, entry: Entry) -> Iterable[Finding]:
    options = options_of(name, dict(getattr(entry, "options", None) or {}))
    if not entry.path:
        raise UserError(f"Data set {name!r} has no `path:`, so there is no folder to check.")
    root = Path(entry.path)
    listing = list_images(root, name, options)
    counts = {role: len(split) for role, split in listing.lines.items()}
    shown = ", ".join(f"{n:,} {role}" for role, n in counts.items())
    yield Finding("ok", f"{listing.layout} layout in {listing.root}: {shown} images")
    num_classes = check_labels(listing, entry.num_classes, options, name)
    check_listing(listing)
    yield from _classes(listing, num_classes)
    seen = look(listing, name)
    yield from _pixels(listing, seen, options)
    for warning in warnings_of(listing, seen, num_classes, options):
        yield Finding("warning", warning)
    if options.official is None:
        yield Finding("note", "counts were not compared: the entry has no `options: {official: …}`")
    unlisted = unlisted_images(listing)
    if unlisted:
        yield Finding(
            "note", f"{len(unlisted):,} image files are in no list (e.g. {few(unlisted, 2)})"
        )


def _classes(listing: Listing, num_classes: int) -> Iterable[Finding]:
    for role, counts in class_counts(listing, num_classes).items():
        present = [n for n in counts if n]
        yield Finding(
            "ok",
            f"{role}: {len(present)} of {num_classes} classes, "
            f"{min(present):,} to {max(present):,} images each",
        )


def _pixels(listing: Listing, seen: dict[str, Seen], options: Options) -> Iterable[Finding]:
    looks = [seen[line.path] for split in listing.lines.values() for line in split]
    variant = fingerprint(looks)
    sizes = {look.shape for look in looks}
    size = "x".join(map(str, next(iter(sizes)))) if len(sizes) == 1 else f"{len(sizes)} sizes"
    yield Finding("ok", f"pixels: {describe(looks)}; {size}; variant {variant}")
    official = OFFICIAL.get(options.official or "")
    if official and official.lossless and variant != "lossless":
        yield Finding(
            "note",
            f"{official.title} is published without loss; these pixels went through JPEG, so "
            "numbers compare with other extracted copies only",
        )
    elif official and variant == "community-jpeg":
        yield Finding(
            "note",
            f"{official.title} is published as JPEG; these pixels were compressed a second time",
        )


def unlisted_images(listing: Listing) -> list[str]:
    """Image files below the folder that no list names."""
    if listing.images is not None:
        return []
    named = {line.path for split in listing.lines.values() for line in split}
    named |= {line.path for line in listing.union or ()}
    root = listing.files_root
    found = []
    for folder, _, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        for file in files:
            path = (relative / file).as_posix()
            if Path(file).suffix.lower() in SUFFIXES and path not in named:
                found.append(path)
    return sorted(found)
