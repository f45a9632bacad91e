"""What papers print, which row of ours it belongs to, and the protocol it was made under."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from snella.errors import unknown
from snella.report.columns import Column
from snella.report.frame import as_text
from snella.validation import Strict

FOLDER = files("snella.report.published")
Printed = Mapping[str, str]
"""One line of a published table's CSV file: one printed number."""
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
SUBJECTS = 30
"""DreamBooth's, over all of which papers print the mean."""
SUITES: Mapping[str, frozenset[str]] = {
    "vtab1k": frozenset().union(*VTAB.values()),
    "fgvc": frozenset(("cub", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars")),
    "full_image": frozenset(("cifar100_full", "svhn_full", "food101_full")),
}
SCALES = {"percent": 0.01, "fraction": 1.0, "cosine": 1.0, "distance": 1.0, "score": 1.0}
"""What a printed score is in the unit of a record."""
COSTS = {
    "trainable": "params",
    "with_head": "params",
    "gflops": "gflops",
    "train_seconds_per_image": "train_time_per_image",
    "peak_memory_mb": "memory_train",
}
COST_UNITS = {"M": 1e6, "GFLOPs": 1.0, "s": 1.0, "MB": 1.0, "GB": 1024.0}
TFDS = "-tfds"
"""The end of the names of data sets that are read from TFDS's records."""
IGNORED = frozenset({"rerun"})  # who ran a row is no property of the method


class Lines(Strict):
    """Some of the printed numbers: those that have, in each of the fields, one of the values."""

    where: dict[str, str | float | list[str | float]]

    def cover(self, line: Printed) -> bool:
        """Whether a printed number is one of these."""
        return all(
            line[field] in map(as_text, values if isinstance(values, list) else [values])
            for field, values in self.where.items()
        )


class Fact(Strict):
    """A protocol field of published numbers: accepted values, and what to say if ours differs."""

    values: list[str | float]
    says: str


class RowFacts(Lines):
    """How some rows were made; with ``replace`` nothing of the paper's own rows holds for them."""

    origin: str = ""
    doubt: str = ""
    seeds: int | None = None
    replace: bool = False
    protocol: dict[str, Fact] = {}


class Doubt(Lines):
    """What speaks against some printed numbers."""

    text: str


class Remark(Strict):
    """Something to know about a suite's published numbers (all of them: no suite)."""

    text: str
    suite: str = ""


class Paper(Strict):
    """What is known of how a paper's numbers were made, and which of them are doubtful."""

    title: str
    seeds: int | None
    protocol: dict[str, Fact]
    rows: list[RowFacts]
    remarks: list[Remark]
    doubts: list[Doubt]

    def facts(self, line: Printed) -> RowFacts:
        """The facts of a printed number: the paper's own, changed by the first entry that fits."""
        entry = next((rows for rows in self.rows if rows.cover(line)), RowFacts(where={}))
        if entry.replace:
            return entry
        protocol = {**self.protocol, **entry.protocol}
        return entry.model_copy(update={"seeds": self.seeds, "protocol": protocol})

    def against(self, line: Printed) -> list[str]:
        """What speaks against a printed number."""
        found = [doubt.text for doubt in self.doubts if doubt.cover(line)]
        return found + list(filter(None, [self.facts(line).doubt]))


class Names(Strict):
    """What ours is called in the papers: see the comments of ``names.yaml``."""

    methods: dict[str, str]
    rows: dict[str, dict[int, str]]
    backbones: dict[str, str]
    datasets: dict[str, dict[str, str]]
    metrics: dict[str, str]
    suites: dict[str, str]

    def dataset(self, suite: str, printed: str) -> str:
        """The data set of a printed suite as our configuration calls it."""
        return self.datasets.get(suite, {}).get(printed, printed)

    def suite(self, line: Printed) -> str:
        """The suite of ours that has a printed number's tasks; empty where there is none yet."""
        return self.suites.get(f"{line['suite']} {trained(line)}", "")

    def metric(self, printed: str) -> str:
        """A metric as our records call it."""
        return self.metrics.get(printed, printed)

    def of_rows(self, line: Printed) -> dict[int, str]:
        """Rows of ours by the number of a row whose print does not say which of ours it is."""
        return self.rows.get(f"{line['source']} {line['table']}", {})


@cache
def names() -> Names:
    """All names."""
    return Names.model_validate(_yaml("names"))


@cache
def _files(kind: str) -> tuple[str, ...]:
    return tuple(sorted(f.name for f in FOLDER.iterdir() if f.name.endswith(kind)))


def sources() -> tuple[str, ...]:
    """The papers there are."""
    return tuple(n.removesuffix(".yaml") for n in _files(".yaml") if n != "names.yaml")


@cache
def read_paper(source: str) -> Paper:
    """The facts of a paper; raises UserError for an unknown one."""
    if source not in sources():
        raise unknown("published source", source, sources())
    return Paper.model_validate(_yaml(source))


def tables(source: str) -> list[int]:
    """The numbers of a paper's tables."""
    start = f"{source}_table"
    return [int(n[len(start) : -len(".csv")]) for n in _files(".csv") if n.startswith(start)]


@cache
def read_table(source: str, number: int) -> tuple[Printed, ...]:
    """All lines of a published table; raises UserError for one that is not in the package."""
    name = f"{source}_table{number:02d}.csv"
    if name not in _files(".csv"):
        raise unknown("published table", name, _files(".csv"))
    text = (FOLDER / name).read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def _yaml(name: str) -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def our_method(line: Printed) -> str | None:
    """The row of ours that a printed number belongs to; None where none or several fit."""
    named = names().of_rows(line).get(int(line["row"]))
    if named is not None:
        return named
    wanted = line["method"], _pairs(line["variant"])
    scores = {m: s for m, name in names().methods.items() if (s := _score(name, *wanted))}
    best: str | None = _best(scores)
    return best


def trained(line: Printed) -> str:
    """The backbone of a printed number with its pretraining."""
    return f"{line['backbone']} {line['pretraining']}"


def _pairs(text: str) -> dict[str, str]:
    parts = (part.partition("=") for part in text.split(";") if part)
    return {key: value for key, _, value in parts if key not in IGNORED}


def _score(ours: str, method: str, variant: Mapping[str, str]) -> tuple[int, int] | None:
    """How well a name of ours fits a printed row: (shared keys, minus those that only we say)."""
    name, _, rest = ours.partition(" ")
    if name != method:
        return None
    own = _pairs(rest)
    if not variant.items() <= own.items():  # an ablation of the method is not the method
        return None
    return len(variant), len(variant) - len(own)


def _best(scores: Mapping[Any, tuple[int, int]]) -> Any:
    """The name with the highest score; None without names, or if several have it."""
    best = [name for name, score in scores.items() if score == max(scores.values())]
    return best[0] if len(best) == 1 else None


def match_rows(lines: Sequence[Printed], methods: Sequence[str]) -> dict[str, int]:
    """Which printed row (by number) belongs to which method of ours.

    As the package knows it, else by what the method is, else by the letters of its name. A row
    that several methods fit equally well belongs to none of them.
    """
    rows = {int(line["row"]): line for line in lines}
    of_rows = names().of_rows(lines[0]) if lines else {}
    named = {m: row for row, m in of_rows.items() if row in rows}
    known = names().methods
    rest = [m for m in methods if m not in named]
    scores = {
        (m, number): score
        for m in rest
        for number, line in rows.items()
        if number not in named.values()
        if (score := _score(known.get(m, ""), line["method"], _pairs(line["variant"])))
    }
    found = {m: row for m, row in named.items() if m in methods}
    for method in rest:
        row = _best({n: score for (m, n), score in scores.items() if m == method})
        if row is not None:
            if _best({m: score for (m, n), score in scores.items() if n == row}) == method:
                found[method] = row
        elif method not in known:
            same = [n for n, line in rows.items() if _letters(line["label"]) == _letters(method)]
            if len(same) == 1:
                found[method] = same[0]
    return found


def _letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isascii() and c.isalnum())


Where = tuple[str, frozenset[frozenset[str]]]
"""A metric, and the groups of data sets whose means are averaged; no group for a cost."""


def where_ours(column: Column) -> Where | None:
    """What a column is of, as :func:`where_printed` says it; None where no paper prints such."""
    name = column.quantity.name
    if column.kind == "value":
        return (COSTS[name], frozenset()) if name in COSTS else None
    if column.subset:
        return None
    groups = [frozenset(map(slug, datasets)) for datasets in column.members.values()]
    if sum(map(len, groups)) != len(column.datasets):  # the same set in two forms
        return None
    if column.kind != "mean_of_groups":
        groups = [frozenset().union(*groups)]
    return name, frozenset(groups)


def where_printed(line: Printed, known: Iterable[str], tasks: Sequence[str] = ()) -> Where:
    """What a printed number is of; ``known`` are our data sets at hand, ``tasks`` the row's."""
    groups = frozenset(map(frozenset, members(line, known, tasks)))
    return names().metric(line["metric"]), groups


def printed_tasks(lines: Sequence[Printed]) -> dict[tuple[str, ...], list[str]]:
    """The data sets that a printed row has cells of, by :func:`printed_row`."""
    found: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        tasks = found.setdefault(printed_row(line), [])
        if line["dataset"] and line["dataset"] not in tasks:
            tasks.append(line["dataset"])
    return found


def printed_row(line: Printed) -> tuple[str, ...]:
    """The row of a printed number, in its suite and on its backbone."""
    return line["row"], line["suite"], line["backbone"], line["pretraining"]


def other_mean(where: Where) -> Where:
    """The mean over the same data sets averaged in the other way: over groups, or over tasks."""
    metric, groups = where
    union = frozenset[str]().union(*groups)
    of_groups = frozenset(VTAB.values())
    if groups != of_groups and union == frozenset().union(*of_groups):
        return metric, of_groups
    return metric, frozenset([union]) if groups else groups


def members(line: Printed, known: Iterable[str], tasks: Sequence[str] = ()) -> list[list[str]]:
    """The data sets of ours behind a printed number, as groups whose means are averaged.

    ``tasks`` are those with numbers of their own in the printed row, by default all of the suite.
    DreamBooth's one printed number is the mean over all subjects, which are data sets of ours.
    """
    if line["dataset"] == "dreambooth30":
        subjects = [name for name in known if name.startswith("dreambooth_")]
        return [subjects] if len(subjects) == SUBJECTS else []
    if line["dataset"]:
        return [[slug(names().dataset(line["suite"], line["dataset"]))]]
    if line["group"] in VTAB:
        return [sorted(VTAB[line["group"]])]
    named = [slug(names().dataset(line["suite"], task)) for task in tasks]
    named = named or sorted(SUITES.get(line["suite"], ()))
    if line["group"] != "mean" or not named:
        return []
    if line["aggregation"] == "mean_of_groups":
        return [[name for name in named if name in group] for group in VTAB.values()]
    return [named]


def decimals(line: Printed) -> int:
    """How many decimals a number is printed with."""
    return len(line["value"].partition(".")[2])


def rounding(line: Printed) -> float:
    """Half of the last printed decimal."""
    return 0.5 * 10.0 ** -decimals(line)


def slug(dataset: str) -> str:
    """A data set's name as the published tables spell it."""
    name = dataset.rpartition("/")[2].replace("-", "_")
    for prefix in ("vtab1k_", "vtab_", "fgvc_"):
        name = name.removeprefix(prefix)
    return name.removesuffix("_released").removesuffix("_tfds")


def pixels_of(datasets: Iterable[str]) -> dict[str, set[str]]:
    """Whether any of our data sets has the pixels of TFDS, as if it were a protocol field."""
    return {"stored": {"as TFDS has them"}} if any(d.endswith(TFDS) for d in datasets) else {}
