"""Every published number of the papers: reproduced, explained, refuted, or not yet run.

The data of the audit page is one frame with a row per printed number; ours are taken from the
frame of records. A mean is recomputed from our data sets by the printed kind of mean, and only
where all of them have run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from snella.report.frame import Seeds, seeds_of
from snella.report.published.papers import (
    COST_UNITS,
    COSTS,
    SCALES,
    Paper,
    Printed,
    decimals,
    members,
    names,
    our_method,
    pixels_of,
    printed_row,
    printed_tasks,
    read_paper,
    read_table,
    rounding,
    slug,
    sources,
    tables,
    trained,
)
from snella.report.published.versus import VERDICTS, judge, mismatches, protocol_of

if TYPE_CHECKING:
    import pandas as pd

TITLES = {
    "reproduced": "reproduced within seed noise",
    "explained": "explained by a known difference",
    "refuted": "refuted",
    "open": "not yet run",
}
TIMES = frozenset(("train_time_per_image", "train_time_per_epoch", "inference_time_per_epoch"))
MEMORY = frozenset(("memory_train", "memory_inference", "memory_increment_ratio"))
OF_HARDWARE = TIMES | MEMORY | {"transform_time"}
COUNTED = 0.01  # relative difference of parameter and operation counts that is a convention


class Ours:
    """The finished runs on one of a paper's backbones, data sets named as papers name them.

    ``stored`` are our own names by suite and name there: of two forms of a data set in a suite the
    one without -tfds counts, which sorts first.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        rows = rows.assign(own=rows["dataset"], dataset=rows["dataset"].map(slug))
        forms = rows.groupby(["suite", "dataset"])["own"]
        self.rows = rows[rows["own"] == forms.transform("min")]
        self.stored: dict[tuple[str, str], str] = forms.min().to_dict()
        self.datasets = self.rows.groupby("suite")["dataset"].unique()
        runs = self.rows.drop_duplicates("run")
        self.costs = runs.groupby(["method", "suite"])[[*COSTS]].mean()
        self.full: float = runs.loc[runs["method"] == "full", "trainable"].max()
        self._numbers: dict[str, Seeds] = {}

    def metric(self, name: str) -> Seeds:
        """The numbers of a metric."""
        if name not in self._numbers:
            self._numbers[name] = seeds_of(self.rows[self.rows["metric"] == name])
        return self._numbers[name]

    def protocol(self, suite: str, method: str) -> dict[str, set[str]]:
        """The protocol fields of a method's runs in a suite, with all their values."""
        runs = self.rows[(self.rows["suite"] == suite) & (self.rows["method"] == method)]
        return protocol_of(runs, ", ".join(sorted(set(runs["selection"]))))


def audit(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per published number with our number, verdict, reason and command."""
    import pandas as pd

    rows = frame[(frame["status"] == "ok") & frame["selected"].eq(True) & (frame["subset"] == "")]
    ours = {str(b): Ours(part) for b, part in rows.groupby(rows["backbone"].map(names().backbones))}
    entries = []
    for source in sources():
        paper = read_paper(source)
        for number in tables(source):
            lines = read_table(source, number)
            tasks = printed_tasks(lines)
            entries += [
                _entry(paper, line, tasks[printed_row(line)], ours.get(trained(line)))
                for line in lines
            ]
    return pd.DataFrame(entries).astype(dict.fromkeys(("ours", "std", "difference"), float))


def totals(found: pd.DataFrame) -> pd.DataFrame:
    """How many numbers of each table (source, number) have which verdict, and all of them."""
    import pandas as pd

    counts = pd.crosstab([found["source"], found["table"]], found["verdict"])
    counts = counts.reindex(columns=list(VERDICTS), fill_value=0)
    return counts.assign(numbers=counts.sum(axis=1))


def _entry(paper: Paper, line: Printed, tasks: Sequence[str], ours: Ours | None) -> dict[str, Any]:
    method, suite = our_method(line), names().suite(line)
    entry: dict[str, Any] = {
        **{k: line[k] for k in ("source", "table", "row", "label", "suite", "backbone")},
        **{k: line[k] for k in ("pretraining", "dataset", "group", "aggregation", "metric")},
        "printed": float(line["value"]),
        "decimals": decimals(line),
        "unit": line["unit"],
        "method": method or "",
        **dict.fromkeys(("ours", "std", "difference")),
        "seeds": 0,
        "doubt": "; ".join(paper.against(line)),
        "our_suite": suite,
        "command": _command(line, method, suite) if method and suite else "",
    }
    entry["table"], entry["row"] = int(line["table"]), int(line["row"])
    if method is None:
        return entry | {"verdict": "open", "why": "no row of ours is this method and variant"}
    if line["metric"] in OF_HARDWARE | {"params", "gflops"}:
        found = _cost(paper, line, method, ours)
    else:
        found = _score(paper, line, method, tasks, ours) if ours else None
    return entry | (found or {"verdict": "open", "why": "not yet run"})


def _score(
    paper: Paper, line: Printed, method: str, tasks: Sequence[str], ours: Ours
) -> dict[str, Any] | None:
    choices = []
    scale = 1 / SCALES.get(line["unit"], 1.0)
    found = ours.metric(names().metric(line["metric"]))
    for suite, datasets in ours.datasets.items():
        groups = members(line, datasets, tasks)
        cells = [[found.get((suite, method, name), {}) for name in group] for group in groups]
        values = [scale * v for v in _mean(cells)]
        if values:
            stored = pixels_of(ours.stored[suite, name] for group in groups for name in group)
            causes = mismatches(paper.facts(line), ours.protocol(suite, method) | stored)
            choices.append((len(causes), suite, values, causes))
    if not choices:
        return None
    _, suite, values, causes = min(choices)  # the protocol closest to the published one
    mean = math.fsum(values) / len(values)
    difference = mean - float(line["value"])
    verdict, why = judge(difference, rounding(line), values, [*paper.against(line), *causes])
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


def _cost(paper: Paper, line: Printed, method: str, ours: Ours | None) -> dict[str, Any] | None:
    """Counts agree, with the head or without, or they do not; times and memory are of hardware."""
    printed, base = float(line["value"]), COST_UNITS.get(line["unit"])
    share = line["unit"] == "percent" and line["metric"] == "params"
    if share and ours and ours.full > 0:
        base = ours.full / 100
    if base is None:
        why = "a share of full fine-tuning's, which has not run" if share else "printed as a share"
        return {"verdict": "open", "why": why}
    columns = [column for column, name in COSTS.items() if name == line["metric"]]
    if ours is None or method not in ours.costs.index:
        return None
    known = ours.costs.loc[method, columns].to_numpy().ravel().tolist()
    found = [number / base for number in known if math.isfinite(number)]
    if not found:
        return None
    mean = min(found, key=lambda number: abs(number - printed))
    result = {"ours": mean, "seeds": 1, "difference": mean - printed}
    reach = max(rounding(line), COUNTED * abs(printed))
    if abs(mean - printed) <= reach * (1 + 1e-9):
        return result | {"verdict": "reproduced", "why": "the same count"}
    if line["metric"] in OF_HARDWARE:
        return result | {"verdict": "explained", "why": "measured on other hardware"}
    if doubts := paper.against(line):
        return result | {"verdict": "explained", "why": "; ".join(doubts)}
    return result | {"verdict": "refuted", "why": f"the counts differ by more than {COUNTED:.0%}"}


def _command(line: Printed, method: str, suite: str) -> str:
    """What to type for the number."""
    if line["dataset"] and line["suite"] != "dreambooth":  # whose subjects are data sets of ours
        dataset = names().dataset(line["suite"], line["dataset"])
        return f"snella run --method {method} --dataset {dataset} --config suite={suite}"
    table = f"table{line['table']}"
    table = table if line["source"] == "snella" else f"{line['source']}_{table}"
    return f"snakemake --cores all --config suite={suite} -- results/{table}_vs_published.tex"


def summary(found: pd.DataFrame) -> str:
    """The totals in one sentence."""
    counts = found["verdict"].value_counts()
    parts = [f"{int(counts.get(v, 0))} {TITLES[v]}" for v in VERDICTS]
    return f"{len(found)} published numbers: {', '.join(parts)}."


def decided(found: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """The numbers that are not open, in printed order."""
    rows: list[dict[Hashable, Any]] = found[found["verdict"] != "open"].to_dict("records")
    return rows
