"""Every published number of the papers: reproduced, explained, refuted, or not yet run.

The data of the audit page is one frame with a row per printed number; ours are taken from the
frame of records. A mean is recomputed from our data sets by the printed kind of mean, and only
where all of them have run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from snella.report.frame import Seeds, seeds_of
from snella.report.published.papers import (
    COST_UNITS,
    COSTS,
    SCALES,
    Paper,
    Printed,
    backbone_of,
    decimals,
    members,
    our_dataset,
    our_method,
    our_metric,
    our_suite,
    our_table,
    pixels_of,
    printed_row,
    printed_tasks,
    read_paper,
    read_table,
    rounding,
    slug,
    sources,
    tables,
)
from snella.report.published.versus import judge, mismatches, protocol_of

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = ("reproduced", "explained", "refuted", "open")
TITLES = {
    "reproduced": "reproduced within seed noise",
    "explained": "explained by a known difference",
    "refuted": "refuted",
    "open": "not yet run",
}
COLUMNS: dict[str, tuple[str, ...]] = {name: (column,) for column, name in COSTS.items()} | {
    "params": ("with_head", "trainable")
}
COST_COLUMNS = frozenset(column for names in COLUMNS.values() for column in names)
Place = tuple[str, str]
TIMES = frozenset(("train_time_per_image", "train_time_per_epoch", "inference_time_per_epoch"))
MEMORY = frozenset(("memory_train", "memory_inference", "memory_increment_ratio"))
OF_HARDWARE = TIMES | MEMORY | {"transform_time"}
COUNTED = 0.01  # relative difference of parameter and operation counts that is a convention


class Ours:
    """The finished runs of the frame whose backbone a paper knows, data sets named as there.

    A place is what papers call a backbone: (backbone, pretraining). ``names`` are our own names by
    suite and name there: of two data sets of one name there the first counts.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        rows = frame[
            (frame["status"] == "ok") & frame["selected"].eq(True) & (frame["subset"] == "")
        ]
        known = {b: place for b in rows["backbone"].unique() if (place := backbone_of(b))}
        rows = rows[rows["backbone"].isin(list(known))]
        rows = rows.assign(stored=rows["dataset"], dataset=rows["dataset"].map(slug))
        # Of two forms of a data set in a suite the one without -tfds, which sorts first.
        forms = rows.groupby(["suite", "dataset"])["stored"]
        self.frame = rows[rows["stored"] == forms.transform("min")]
        self.names: dict[tuple[str, str], str] = forms.min().to_dict()
        self._at = self.frame["backbone"].map(known)
        self.suites: dict[Place, list[str]] = {
            place: sorted(self.frame.loc[self._at == place, "suite"].unique())
            for place in set(known.values())
        }
        datasets = self.frame.groupby("suite")["dataset"].unique()
        self.datasets: dict[str, list[str]] = {str(s): list(ds) for s, ds in datasets.items()}
        self._numbers: dict[tuple[Place, str], Seeds] = {}
        self._protocols: dict[tuple[str, str], dict[str, set[str]]] = {}

    def numbers(self, place: Place, name: str) -> Seeds:
        """The numbers of a metric, or of a cost, which is a column of the frame."""
        if (place, name) not in self._numbers:
            rows, cost = self.frame[self._at == place], name in COST_COLUMNS
            rows = rows if cost else rows[rows["metric"] == name]
            self._numbers[place, name] = seeds_of(rows, name if cost else "value")
        return self._numbers[place, name]

    def protocol(self, suite: str, method: str) -> dict[str, set[str]]:
        """The protocol fields of a method's runs in a suite, with all their values."""
        if (suite, method) not in self._protocols:
            runs = self.frame[(self.frame["suite"] == suite) & (self.frame["method"] == method)]
            selections = ", ".join(sorted(set(runs["selection"])))
            self._protocols[suite, method] = protocol_of(runs, selections)
        return self._protocols[suite, method]


def audit(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per published number with our number, verdict, reason and command."""
    import pandas as pd

    ours = Ours(frame)
    rows = []
    for source in sources():
        paper = read_paper(source)
        for number in tables(source):
            lines = read_table(source, number)
            tasks = printed_tasks(lines)
            rows += [_entry(paper, line, tasks, ours) for line in lines]
    return pd.DataFrame(rows)


def totals(found: pd.DataFrame) -> pd.DataFrame:
    """How many numbers of each table have which verdict, and all of them."""
    import pandas as pd

    counts = pd.crosstab([found["source"], found["table"]], found["verdict"])
    counts = counts.reindex(columns=list(VERDICTS), fill_value=0)
    counts["numbers"] = counts.sum(axis=1)
    return counts.reset_index()


def _entry(
    paper: Paper, line: Printed, tasks: Mapping[tuple[str, ...], list[str]], ours: Ours
) -> dict[str, Any]:
    method = our_method(line)
    entry: dict[str, Any] = {
        **{k: line[k] for k in ("source", "table", "row", "label", "suite", "backbone")},
        **{k: line[k] for k in ("pretraining", "dataset", "group", "aggregation", "metric")},
        "printed": float(line["value"]),
        "decimals": decimals(line),
        "unit": line["unit"],
        "method": method or "",
        **dict.fromkeys(("ours", "std", "difference")),
        "seeds": 0,
        "doubt": "; ".join(paper.doubts(line)),
        "our_suite": our_suite(line) or "",
        "command": _command(line, method),
    }
    entry["table"], entry["row"] = int(line["table"]), int(line["row"])
    if method is None:
        return entry | {"verdict": "open", "why": "no row of ours is this method and variant"}
    if line["metric"] in OF_HARDWARE | {"params", "gflops"}:
        return entry | _cost(paper, line, method, ours)
    return entry | _score(paper, line, method, tasks[printed_row(line)], ours)


def _score(
    paper: Paper, line: Printed, method: str, tasks: Sequence[str], ours: Ours
) -> dict[str, Any]:
    choices = []
    scale = 1 / SCALES.get(line["unit"], 1.0)
    place = line["backbone"], line["pretraining"]
    for suite in ours.suites.get(place, ()):
        found = ours.numbers(place, our_metric(line["metric"]))
        groups = members(line, ours.datasets[suite], tasks)
        cells = [[found.get((suite, method, name), {}) for name in group] for group in groups]
        values = [scale * v for v in _mean(cells)]
        if values:
            stored = pixels_of(ours.names[suite, name] for group in groups for name in group)
            causes = mismatches(paper.facts(line), ours.protocol(suite, method) | stored)
            choices.append((len(causes), suite, values, causes))
    if not choices:
        return {"verdict": "open", "why": "not yet run"}
    _, suite, values, causes = min(choices)  # the protocol closest to the published one
    mean = math.fsum(values) / len(values)
    difference = mean - float(line["value"])
    verdict, why = judge(difference, rounding(line), values, [*paper.doubts(line), *causes])
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"ours": mean, "std": std, "seeds": len(values), "difference": difference,
            "our_suite": suite, "verdict": verdict, "why": why}  # fmt: skip


def _mean(groups: Sequence[Sequence[Mapping[int, float]]]) -> list[float]:
    """The mean over the groups' means per seed that all data sets have; empty without one."""
    cells = [seeds for group in groups for seeds in group]
    shared = set.intersection(*(set(seeds) for seeds in cells)) if cells else set()
    return [
        math.fsum(math.fsum(seeds[s] for seeds in group) / len(group) for group in groups)
        / len(groups)
        for s in sorted(shared)
    ]


def _cost(paper: Paper, line: Printed, method: str, ours: Ours) -> dict[str, Any]:
    """Counts agree, with the head or without, or they do not; times and memory are of hardware."""
    place, printed = (line["backbone"], line["pretraining"]), float(line["value"])
    base = _unit(line, place, ours)
    if base is None:
        share = line["metric"] == "params"
        why = "a share of full fine-tuning's, which has not run" if share else "printed as a share"
        return {"verdict": "open", "why": why}
    found: list[float] = []
    for column in COLUMNS.get(line["metric"], ()):
        for suite in ours.suites.get(place, ()):
            cells = ours.numbers(place, column).items()
            spent = [v for (s, m, _), seeds in cells if (s, m) == (suite, method)
                     for v in seeds.values()]  # fmt: skip
            found += [math.fsum(spent) / len(spent) / base] if spent else []
    if not found:
        return {"verdict": "open", "why": "not yet run"}
    mean = min(found, key=lambda number: abs(number - printed))
    result = {"ours": mean, "seeds": 1, "difference": mean - printed}
    reach = max(rounding(line), COUNTED * abs(printed))
    if abs(mean - printed) <= reach * (1 + 1e-9):
        return result | {"verdict": "reproduced", "why": "the same count"}
    if line["metric"] in OF_HARDWARE:
        return result | {"verdict": "explained", "why": "measured on other hardware"}
    if doubts := paper.doubts(line):
        return result | {"verdict": "explained", "why": "; ".join(doubts)}
    return result | {"verdict": "refuted", "why": f"the counts differ by more than {COUNTED:.0%}"}


def _unit(line: Printed, place: Place, ours: Ours) -> float | None:
    """One of the printed unit; parameters in percent are those of full fine-tuning's."""
    if (line["unit"], line["metric"]) != ("percent", "params"):
        return COST_UNITS.get(line["unit"])
    cells = ours.numbers(place, "trainable").items() if place in ours.suites else ()
    counts = {v for (_, m, _), seeds in cells if m == "full" for v in seeds.values()}
    return max(counts) / 100 if counts else None


def _command(line: Printed, method: str | None) -> str:
    """What to type for the number; empty where nothing of ours would give it."""
    suite = our_suite(line)
    if method is None or suite is None:
        return ""
    if line["dataset"] and line["suite"] != "dreambooth":  # whose subjects are data sets of ours
        return f"snella run --method {method} --dataset {our_dataset(line)} --config suite={suite}"
    table = our_table(line["source"], int(line["table"]))
    target = f" -- results/{table}_vs_published.tex" if table else ""
    return f"snakemake --cores all --config suite={suite}{target}" if target else ""


def summary(found: pd.DataFrame) -> str:
    """The totals in one sentence."""
    counts = found["verdict"].value_counts()
    parts = [f"{int(counts.get(v, 0))} {TITLES[v]}" for v in VERDICTS]
    return f"{len(found)} published numbers: {', '.join(parts)}."


def decided(found: pd.DataFrame) -> Iterable[dict[str, Any]]:
    """The numbers that are not open, in printed order."""
    for row in found[found["verdict"] != "open"].to_dict("records"):
        yield {str(key): value for key, value in row.items()}
