"""The numbers that papers print, and the protocol they were made under."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from snella.errors import UserError, unknown
from snella.report.layout import Column, SuiteInfo

VTAB: Mapping[str, frozenset[str]] = {
    "natural": frozenset(("cifar100", "caltech101", "dtd", "flowers102", "pets", "svhn", "sun397")),
    "specialized": frozenset(("patch_camelyon", "eurosat", "resisc45", "retinopathy")),
    "structured": frozenset(
        (
            *("clevr_count", "clevr_dist", "dmlab", "kitti_dist"),
            *("dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele"),
        )
    ),
}
FGVC = frozenset(("cub", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars"))
UNITS = {"percent": "%", "fraction": "", "cosine": "", "distance": "", "score": ""}


@dataclass(frozen=True)
class Place:
    """Where a number stands in a published table."""

    suite: str
    dataset: str = ""
    group: str = ""
    aggregation: str = ""


@dataclass(frozen=True)
class Printed:
    """One printed number, in the unit of the table, with what was inferred about it."""

    value: float
    std: float | None
    label: str
    unit: str
    note: str


@dataclass(frozen=True)
class Facts:
    """How a paper's own numbers were made, as far as paper and released code say it.

    ``fields`` maps a protocol field to (the published value, what to say if ours differs);
    ``remarks`` are (published suite or empty for all, text).
    """

    fields: Mapping[str, tuple[str, str]]
    seeds: int
    remarks: tuple[tuple[str, str], ...] = ()


FACTS: Mapping[str, Facts] = {
    # released code at e9d51857: lib/datasets.py (pixels, normalisation, splits), train_alloc.py
    # and train_alloc_ema.py (selection, schedule, EMA), scripts (epochs, seed)
    "snella": Facts(
        fields={
            "selection": (
                "best-test",
                "published: the highest of 19 to 100 looks at the test set (best-test)",
            ),
            "normalisation": (
                "imagenet",
                "published: ImageNet mean and deviation, although the supervised ViT checkpoint "
                "was trained under Inception's 0.5",
            ),
            "schedule": (
                "released",
                "published: learning rate constant within an epoch and one epoch late",
            ),
            "epochs": ("100", "published: 100 epochs"),
        },
        seeds=1,
        remarks=(
            ("", "Several printed rows are copied from earlier papers, whose protocols differ."),
            (
                "vtab1k",
                "Published VTAB-1k numbers are from copies re-saved as JPEG (it matters for small "
                "images) and train on train and val.",
            ),
            (
                "fgvc",
                "SNELLA's published FGVC numbers train on train alone and are the better of the "
                "raw and the averaged (EMA) weights.",
            ),
        ),
    ),
}


@cache
def read_table(source: str, number: int) -> tuple[Mapping[str, str], ...]:
    """All lines of a published table; raises UserError for one that is not in the package."""
    folder = files("snella.report") / "published"
    name = f"{source}_table{number:02d}.csv"
    known = sorted(f.name for f in folder.iterdir() if f.name.endswith(".csv"))
    if name not in known:
        raise unknown("published table", name, known)
    text = (folder / name).read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def place(column: Column, suite: SuiteInfo) -> Place | None:
    """Where a paper prints this column, or None where its tasks are not a published selection.

    A mean has a place only if it covers exactly the tasks that the papers average.
    """
    groups = {g: frozenset(map(slug, ds)) for g, ds in column.members.items()}
    if column.kind == "dataset":
        group, (dataset,) = next((g, tuple(ds)) for g, ds in groups.items())
        return Place("vtab1k" if group in VTAB else group, dataset=dataset)
    if column.kind == "mean_of_groups":
        same = dict(groups) == dict(VTAB)
        return Place("vtab1k", group="mean", aggregation=column.kind) if same else None
    if column.kind == "mean_of_tasks":
        if groups == {"fgvc": FGVC}:
            return Place("fgvc", group="mean", aggregation=column.kind)
        if dict(groups) == dict(VTAB):
            return Place("vtab1k", group="mean", aggregation=column.kind)
        for group, tasks in VTAB.items():
            if groups == {group: tasks}:
                return Place("vtab1k", group=group, aggregation=column.kind)
    return None


def slug(dataset: str) -> str:
    """A data set's name as the published tables spell it."""
    name = dataset.rpartition("/")[2].replace("-", "_")
    for prefix in ("vtab1k_", "vtab_", "fgvc_"):
        name = name.removeprefix(prefix)
    return name


def row_labels(
    lines: Sequence[Mapping[str, str]], methods: Sequence[str], given: Mapping[str, str]
) -> dict[str, str]:
    """Which printed row belongs to which method: as ``given``, else by letters and digits.

    Raises UserError if a given label is not printed in the table.
    """
    labels = {line["label"] for line in lines}
    for method, label in given.items():
        if label not in labels:
            raise unknown(f"printed row (for {method})", label, labels)
    by_letters = {_letters(label): label for label in labels}
    found = {m: given.get(m, by_letters.get(_letters(m), "")) for m in methods}
    return {method: label for method, label in found.items() if label}


def _letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isascii() and c.isalnum())


def find(
    lines: Sequence[Mapping[str, str]], label: str, where: Place, metric: str
) -> Printed | None:
    """The number printed for a row at a place; raises UserError if several are."""
    hits = [
        line
        for line in lines
        if line["label"] == label
        and (line["suite"], line["dataset"], line["group"], line["aggregation"], line["metric"])
        == (where.suite, where.dataset, where.group, where.aggregation, metric)
    ]
    if len(hits) > 1:
        raise UserError(
            f"Table {hits[0]['table']} of {hits[0]['source']} prints {label} more than once; "
            "name `backbone` and `pretraining` under `published`."
        )
    if not hits:
        return None
    line = hits[0]
    std = float(line["std"]) if line["std"] else None
    return Printed(float(line["value"]), std, label, UNITS.get(line["unit"], "?"), line["note"])
