"""What is wrong with a data set (one clear line) and what is only odd (a warning in its manifest).

Warnings are printed by `prepare` and stand in the notes of the tables that show the data set.
"""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Sized
from pathlib import Path

import numpy as np

from snella.data.official import differences
from snella.data.options import Options
from snella.data.readers.listing import MAX_CLASSES, ROLES, Line, Listing, few
from snella.data.readers.pixels import Seen
from snella.errors import UserError

COMMUNITY_JPEG = (75, "4:2:0")
"""Pillow's defaults, with which NOAH's script wrote every image of the community's copies."""


def check_counts(listing: Listing) -> None:
    """Every split has images, and as many as labels."""
    for role, lines in listing.lines.items():
        if not lines:
            raise UserError(f"{listing.root} has no {role} images; every split needs at least one.")
        held = len(lines) if listing.images is None else len(listing.images[role])
        if held != len(lines):
            raise UserError(
                f"{lines[0].where}: {held} images and {len(lines)} labels; fetch it anew."
            )


def check_labels(listing: Listing, given: int | None, options: Options, name: str) -> int:
    """Return the number of classes after checking every label against it."""
    names = listing.class_names
    if given is not None and names is not None and given != len(names):
        file = listing.root / "classes.txt"
        where = f"{file} names" if file.is_file() else f"{listing.root} has"
        raise UserError(f"{where} {len(names)} classes, the config says {given}.")
    known = given if given is not None else len(names) if names else None
    lines = [line for part in (*listing.lines.values(), listing.union or ()) for line in part]
    highest, lowest = max(line.label for line in lines), min(line.label for line in lines)
    classes = known if known is not None else 1 + highest
    for line in lines:
        if not 0 <= line.label < classes:
            allowed = f"0 to {classes - 1}" if known is not None else "0 and upwards"
            file = listing.root / "classes.txt"
            hint = f": {file} names that many classes" if file.is_file() and given is None else ""
            if given is not None:
                hint = f": `num_classes` of data set {name!r} is {given}; correct it or the list"
            if known is not None and lowest >= 1 and highest == classes:
                hint = (
                    f": labels start at 0 and the files' start at {lowest}; set "
                    f"`options: {{first_label: {lowest}}}` of data set {name!r}"
                )
            if line.label < 0 and listing.layout in ("original", "tfds"):
                hint = ": the release counts its classes from 1; fetch its own files"
            if options.first_label:
                hint = (
                    f": `options.first_label` of data set {name!r} is {options.first_label}, which "
                    "is taken off every label; correct it or the list"
                )
            label = line.label + options.first_label
            raise UserError(f"{line.where}: label {label} is out of range, {allowed}{hint}.")
    if known is not None and classes > MAX_CLASSES:
        raise UserError(f"Data set {name!r} has {classes:,} classes; at most {MAX_CLASSES:,} work.")
    if classes > MAX_CLASSES:
        line = next(line for line in lines if line.label == highest)
        raise UserError(
            f"{line.where}: label {line.label} would make {classes:,} classes; labels are class "
            "indices from 0."
        )
    return classes


def check_listing(listing: Listing) -> None:
    """No image twice in a list, none in two of the splits, none outside the folder."""
    if listing.images is None:
        for line in (line for lines in listing.lines.values() for line in lines):
            clean = posixpath.normpath(line.path)
            if posixpath.isabs(clean) or clean.split("/")[0] == "..":
                raise UserError(
                    f"{line.where}: path {line.path[:200]!r} leaves the folder "
                    f"{listing.files_root}; make it relative to that folder."
                )
    groups = [[line for role in ROLES for line in listing.lines.get(role, ())]]
    groups.append(listing.union or [])
    for group in groups:
        first: dict[str, Line] = {}
        for line in group:
            if line.path in first:
                raise UserError(
                    f"{line.where}: {line.path} is also in {first[line.path].where}; list it once."
                )
            first[line.path] = line


def check_union(listing: Listing, seen: dict[str, Seen]) -> None:
    """train800val200 must be train800 and val200 together, else two protocols hide in a folder.

    Copies made by NOAH's script keep the 1000 images a second time under other names; they are
    then compared by their pixels.
    """
    if not listing.union or "val" not in listing.lines:
        return
    parts = [*listing.lines["train"], *listing.lines["val"]]
    by_path = bool({line.path for line in parts} & {line.path for line in listing.union})

    def key(line: Line) -> tuple[str | bytes, int]:
        return (line.path if by_path else seen[line.path].pixels, line.label)

    file = Path(listing.union[0].where.rpartition(":")[0])
    for extra, others, state in (
        (listing.union, parts, "is not in train800.txt or val200.txt"),
        (parts, listing.union, f"is not in {file.name}"),
    ):
        left = Counter(key(line) for line in others)
        for line in extra:
            left[key(line)] -= 1
            if left[key(line)] < 0:
                raise UserError(
                    f"{line.where}: {line.path} with label {line.label} {state}; "
                    f"{file} must be the two lists together."
                )


def warnings_of(
    listing: Listing, seen: dict[str, Seen], num_classes: int, options: Options
) -> list[str]:
    """Everything odd but usable, one sentence each."""
    check_union(listing, seen)
    found = list(listing.notes)
    found += class_warnings(listing, num_classes)
    found += duplicate_warnings(listing, seen)
    found += pixel_warnings(listing, seen, options)
    if options.official:
        counts = {role: len(lines) for role, lines in listing.lines.items()}
        per_class = class_counts(listing, num_classes)
        found += differences(options.official, counts, num_classes, per_class)
    return found


def class_counts(listing: Listing, num_classes: int) -> dict[str, list[int]]:
    """Images per class of each split."""
    return {
        role: np.bincount([line.label for line in lines], minlength=num_classes).tolist()
        for role, lines in listing.lines.items()
    }


def class_warnings(listing: Listing, num_classes: int) -> list[str]:
    """Labels that start at 1, classes without an image, and classes without a training image."""
    counts = {role: np.asarray(n) for role, n in class_counts(listing, num_classes).items()}
    total = np.sum(list(counts.values()), axis=0)
    found = ["there is one class alone, so that any answer is right"] if num_classes == 1 else []
    empty = np.flatnonzero(total == 0).tolist()
    if empty and empty[0] == 0 and total[1:].all():
        found.append(
            f"class 0 never occurs, labels run from 1 to {num_classes - 1}: they seem to start at "
            "1, so the head has a class too many; set `options: {first_label: 1}`"
        )
    elif empty:
        found.append(f"{_classes(empty, listing)} never occur{_s(empty)}")
    training = counts["train"] + counts.get("val", 0)
    unseen = np.flatnonzero((training == 0) & (counts["test"] > 0)).tolist()
    if unseen:
        found.append(
            f"{_classes(unseen, listing)} occur{_s(unseen)} in test only and cannot be learned"
        )
    untested = np.flatnonzero((training > 0) & (counts["test"] == 0)).tolist()
    if untested:
        found.append(f"{_classes(untested, listing)} never occur{_s(untested)} in test")
    if "val" in counts:
        only_val = np.flatnonzero((counts["train"] == 0) & (counts["val"] > 0)).tolist()
        if only_val:
            found.append(
                f"{_classes(only_val, listing)} occur{_s(only_val)} in val but not in train"
            )
    return found


def _classes(indices: list[int], listing: Listing) -> str:
    names = listing.class_names
    shown = [f"{i} ({names[i]})" if names else str(i) for i in indices]
    return f"{'classes' if len(indices) > 1 else 'class'} {few(shown)}"


def duplicate_warnings(listing: Listing, seen: dict[str, Seen]) -> list[str]:
    """Images that occur twice by their pixels: across test and training, and with two labels."""
    places: dict[tuple[tuple[int, int], bytes], list[tuple[str, Line]]] = defaultdict(list)
    for role, lines in listing.lines.items():
        for line in lines:
            look = seen[line.path]
            places[look.shape, look.pixels].append((role, line))
    repeated = [group for group in places.values() if len(group) > 1]
    found = []
    leaked = [
        (line, next(x for r, x in group if r != "test"))
        for group in repeated
        if any(role != "test" for role, _ in group)
        for role, line in group
        if role == "test"
    ]
    if leaked:
        test, train = leaked[0]
        found.append(
            f"{_count(leaked, 'test image')} {_is(leaked)} also a training image "
            f"(e.g. {test.path} = {train.path})"
        )
    contradictory = [group for group in repeated if len({x.label for _, x in group}) > 1]
    if contradictory:
        group = contradictory[0]
        labels = sorted({x.label for _, x in group})
        occurs = "occurs" if len(contradictory) == 1 else "occur"
        found.append(
            f"{_count(contradictory, 'image')} {occurs} with different labels "
            f"(e.g. {group[0][1].path} and {group[1][1].path}: {few(labels)})"
        )
    within = sum(
        len(group) - 1 for group in repeated if len({role == "test" for role, _ in group}) == 1
    )
    if within:
        found.append(
            f"{within} images repeat others of the same split"
            if within > 1
            else "1 image repeats another of the same split"
        )
    return found


def pixel_warnings(listing: Listing, seen: dict[str, Seen], options: Options) -> list[str]:
    """What JPEG did to the pixels, against the variant that the entry expects."""
    looks = [seen[line.path] for lines in listing.lines.values() for line in lines]
    found = fingerprint(looks)
    if options.variant is None or found == options.variant:
        return []
    return [f"the pixels are the {found} variant, not {options.variant}: {describe(looks)}"]


def fingerprint(looks: list[Seen]) -> str:
    """``lossless``, ``community-jpeg`` (Pillow's default settings throughout) or ``original``."""
    settings = {look.jpeg for look in looks if look.encoding == "JPEG"}
    if not settings:
        return "lossless"
    return "community-jpeg" if settings == {COMMUNITY_JPEG} else "original"


def describe(looks: list[Seen]) -> str:
    """How the images are encoded, in words."""
    encodings = Counter(look.encoding for look in looks)
    parts = [f"{n} {encoding}" for encoding, n in encodings.most_common()]
    settings = Counter(look.jpeg for look in looks if look.jpeg)
    if settings:
        (quality, sampling), n = settings.most_common(1)[0]
        known = f"quality {quality}" if quality else "tables of no known quality"
        parts.append(f"JPEG {known}, {sampling} in {n / sum(settings.values()):.0%}")
    return ", ".join(parts)


def _count(items: Sized, noun: str) -> str:
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"


def _s(items: Sized) -> str:
    """The ending of a verb."""
    return "s" * (len(items) == 1)


def _is(items: Sized) -> str:
    return "is" if len(items) == 1 else "are each"
