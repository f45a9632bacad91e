"""Our numbers beside the published ones, with the cause of every difference that has one."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from snella.errors import UserError, some
from snella.report.columns import Column, Unit
from snella.report.frame import as_text
from snella.report.published.papers import (
    COST_UNITS,
    SCALES,
    Paper,
    Printed,
    RowFacts,
    Where,
    match_rows,
    names,
    other_mean,
    pixels_of,
    printed_row,
    printed_tasks,
    read_paper,
    read_table,
    rounding,
    slug,
    trained,
    where_ours,
    where_printed,
)
from snella.report.spec import PublishedTable, SuiteInfo
from snella.report.table import Cell, Table
from snella.report.text import Grid, Line, Section, comments, headings

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["reproduced", "explained", "refuted", "open"]
VERDICTS = get_args(Verdict)
Places = dict[Where, dict[int, list[Printed]]]
"""Printed numbers by what they are of and by row."""
UNSET = frozenset({"ema_decay"})  # without a value where it is off
MEANS = {
    "mean_of_tasks": "over groups, ours over tasks",
    "mean_of_groups": "over tasks, ours over groups",
}
LEVEL = 0.95


@dataclass(frozen=True)
class Pair:
    """One of our cells and the number printed for it; ``note`` says why there is none.

    ``value`` is the printed number in the ``unit`` of our column; ``causes`` are known reasons for
    a difference: doubts about the printed number, and fields in which the protocols differ.
    """

    method: str
    column: Column
    unit: Unit
    ours: Cell
    printed: Printed | None = None
    value: float | None = None
    note: str = ""
    causes: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """Ours minus printed, in the unit of the table."""
        if self.ours.mean is None or self.value is None:
            return None
        return self.ours.mean - self.value

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """What the difference says about the printed number, and why."""
        reach = rounding(self.printed) if self.printed else 0.0
        return judge(self.difference, reach, list(self.ours.values.values()), self.causes)


def judge(
    difference: float | None, rounding: float, values: Sequence[float], causes: Sequence[str]
) -> tuple[Verdict, str]:
    """Whether a published number of one seed is reproduced by our ``values``, one per seed.

    Within noise: a further seed would fall as far from our mean in 95 % of cases (prediction
    interval of the t distribution), and half of the last printed decimal. Beyond it, a known
    cause explains the difference; without one the number is refuted.
    """
    if difference is None:
        return "open", "not yet run"
    if abs(difference) <= rounding:
        return "reproduced", "equal as printed"
    n = len(values)
    if n >= 2:
        from scipy.stats import t

        std = statistics.stdev(values)
        reach = float(t.ppf((1 + LEVEL) / 2, n - 1)) * std * math.sqrt(1 + 1 / n) + rounding
        if abs(difference) <= reach:
            return "reproduced", f"within ±{reach:.2g} of seed noise"
    if causes:
        return "explained", "; ".join(causes)
    if n < 2:
        return "open", "one seed: noise is unknown"
    return "refuted", f"beyond ±{reach:.2g} of seed noise, no known difference in protocol"


@dataclass(frozen=True)
class Versus:
    """A table beside its published counterpart, for the columns and rows that both have."""

    table: Table
    source: PublishedTable
    paper: Paper
    columns: list[Column]
    pairs: Mapping[tuple[str, str], Pair]
    lines: Sequence[Printed]
    mismatches: Mapping[str, list[str]]

    @property
    def remarks(self) -> list[str]:
        """Summary, then every difference in the way the numbers were made."""
        trained = sorted({f"{x['backbone']}, {x['pretraining']}" for x in self.lines})
        result = [
            "Lines of a row: ours; printed; our difference from it.",
            self._summary(),
            f"Published: {self.paper.title}, Table {self.source.table} ({'; '.join(trained)}); "
            f"ours: {self.table.backbone}.",
        ]
        everybody = len({p.method for p in self.pairs.values() if p.printed is not None})
        for text, rows in self.mismatches.items():
            whose = "" if len(rows) == everybody else f" ({some(rows)})"
            result.append(f"Mismatch{whose}: {text}.")
        suites = {"", *(line["suite"] for p in self.pairs.values() if (line := p.printed))}
        return result + [r.text for r in self.paper.remarks if r.suite in suites]

    def _summary(self) -> str:
        differences = [
            (p.difference, p)
            for p in self.pairs.values()
            if p.difference is not None and p.column.ranked
        ]
        if not differences:
            return "No cell of ours has a printed counterpart yet."
        mean = math.fsum(d for d, _ in differences) / len(differences)
        most, far = max(differences, key=lambda pair: abs(pair[0]))
        verdicts = Counter(p.verdict[0] for _, p in differences)
        words = {v: v for v in VERDICTS} | {"open": "undecided"}
        return (
            f"{len(differences)} cells compared: mean difference {far.unit.signed(mean)}, largest "
            f"{far.unit.signed(most)} ({self.table.labels[far.method]}, "
            f"{self.table.full_label(far.column)}); "
            f"{', '.join(f'{verdicts[v]} {words[v]}' for v in VERDICTS if verdicts[v])}."
        )


def compare_published(table: Table) -> Versus | None:
    """Pair the table's cells with the printed ones.

    None for a demo suite, for a table without a published counterpart, and where no data set,
    group or row of the suite occurs in it.
    """
    source = table.spec.published
    if source is None or table.banner:
        return None
    paper = read_paper(source.source)
    lines = [
        line
        for line in read_table(source.source, source.table)
        if source.backbone in (None, line["backbone"])
        and source.pretraining in (None, line["pretraining"])
    ]
    rows = match_rows(lines, table.shown)
    made, seeds = table.results.made, len(table.results.seeds)
    ours = {m: protocol_of(made[made["method"] == m], table.results.selection) for m in rows}
    places = {suite.name: _places(lines, suite) for suite in table.suites}
    pairs: dict[tuple[str, str], Pair] = {}
    apart: dict[str, list[str]] = defaultdict(list)
    columns = []
    for column in table.columns:
        where, printed = where_ours(column), places[column.suite.name]
        if where is None or not printed.keys() & {where, other_mean(where)}:
            continue
        columns.append(column)
        for method in table.shown:
            pair = Pair(method, column, table.units[column.key], table.cells[method, column.key])
            pair = _find(pair, printed, rows.get(method), where)
            if pair.printed is not None:
                causes = paper.against(pair.printed)
                if column.ranked:
                    facts = paper.facts(pair.printed)
                    differing = mismatches(facts, ours[method] | pixels_of(column.datasets))
                    for text in [*differing, *_seeds(facts, seeds)]:
                        if table.labels[method] not in apart[text]:
                            apart[text].append(table.labels[method])
                    causes += differing
                pair = replace(pair, causes=tuple(causes))
            pairs[method, column.key] = pair
    columns = [c for c in columns if not _only_other_mean(c, columns, pairs)]
    if not any(c.ranked for c in columns) or not rows:
        return None
    kept = {c.key for c in columns}
    pairs = {key: pair for key, pair in pairs.items() if key[1] in kept}
    return Versus(table, source, paper, columns, pairs, lines, apart)


def _seeds(facts: RowFacts, ours: int) -> list[str]:
    if facts.seeds in (None, ours):
        return []
    number = f"{facts.seeds} seed" + ("s" if facts.seeds != 1 else "")
    return [f"published numbers are of {number}; ours: {ours}"]


def _only_other_mean(
    column: Column, columns: Sequence[Column], pairs: Mapping[tuple[str, str], Pair]
) -> bool:
    """Whether a mean is printed of the other kind alone, and that kind is a column too."""
    twins = [c for c in columns if (c.block, c.members) == (column.block, column.members)]
    printed = any(p.printed is not None for (_, key), p in pairs.items() if key == column.key)
    return not printed and len(twins) > 1 and column.kind.startswith("mean")


def protocol_of(runs: pd.DataFrame, selection: str) -> dict[str, set[str]]:
    """Protocol fields as text, with all values that the runs have."""
    found = {
        name.removeprefix("protocol."): {as_text(v) for v in runs[name].dropna().unique()}
        for name in runs.columns
        if name.startswith("protocol.")
    }
    return found | {"selection": {selection}, "backbone": set(map(str, runs["backbone"].unique()))}


def mismatches(facts: RowFacts, ours: Mapping[str, set[str]]) -> list[str]:
    """What differs between how a printed number was made and how ours were."""
    result = []
    for name, fact in facts.protocol.items():
        odd = sorted(ours.get(name, set()) - set(map(as_text, fact.values)))
        if odd or (name in UNSET and not ours.get(name)):
            result.append(f"published: {fact.says}; ours: {', '.join(odd) or 'none'}")
    return result


def _places(lines: Sequence[Printed], suite: SuiteInfo) -> Places:
    """The lines of a suite's backbone by what they are of; all where its name is not known."""
    known = names().backbones.get(suite.backbone)
    if known is not None:
        unnamed = [line for line in lines if line["backbone"].startswith("unspecified")]
        lines = [line for line in lines if trained(line) == known] or unnamed
    ours = [slug(dataset) for datasets in suite.groups.values() for dataset in datasets]
    tasks = printed_tasks(lines)
    found: Places = defaultdict(lambda: defaultdict(list))
    for line in lines:
        where = where_printed(line, ours, tasks[printed_row(line)])
        found[where][int(line["row"])].append(line)
    return found


def _find(pair: Pair, places: Places, row: int | None, where: Where) -> Pair:
    """The pair with the number printed for it, or with why there is none."""
    if row is None:
        return replace(pair, note="not in the published table")
    printed = _one(places, row, where)
    if printed is None:
        other = MEANS.get(pair.column.kind)
        if other and _one(places, row, other_mean(where)) is not None:
            return replace(pair, note=f"the published mean is {other}")
        return replace(pair, note="not in the published table")
    base = (SCALES if pair.column.ranked else COST_UNITS).get(printed["unit"])
    if base is None:
        return replace(pair, note=f"printed in another unit ({printed['unit']})")
    return replace(pair, printed=printed, value=float(printed["value"]) * base * pair.unit.scale)


def _one(places: Places, row: int, where: Where) -> Printed | None:
    """The number printed in a row; raises UserError if several are."""
    hits = places[where][row] if where in places else []
    if len(set(map(trained, hits))) > 1:
        raise UserError(
            f"Table {hits[0]['table']} of {hits[0]['source']} prints {hits[0]['label']} more than "
            "once; name `backbone` and `pretraining` under `published`."
        )
    return hits[0] if hits else None


def versus_grid(versus: Versus) -> Grid:
    """The comparison as printed: three lines for every method."""
    table, columns = versus.table, versus.columns
    shown = dict(zip((c.key for c in table.columns), headings(table), strict=True))
    sections = tuple(
        Section(rows.group, tuple(x for m in rows.methods for x in _lines(versus, m)), rows.own)
        for rows in table.rows
    )
    absent = [
        table.labels[method]
        for method in table.shown
        if all(versus.pairs[method, c.key].printed is None for c in columns)
    ]
    remarks = [f"Not in the published table: {', '.join(absent)}."] if absent else []
    return Grid(
        name=f"{table.name}_vs_published",
        caption=f"{table.caption} Beside the published numbers.",
        headings=tuple(shown[c.key] for c in columns),
        sections=sections,
        remarks=(table.remarks[0], *versus.remarks, *remarks),
        comments=comments(table),
        rotate=table.spec.rotate,
    )


def _lines(versus: Versus, method: str) -> list[Line]:
    """A row of ours, what is printed for it, and the difference."""
    pairs = [versus.pairs[method, column.key] for column in versus.columns]
    result = [Line(versus.table.labels[method], tuple(p.ours for p in pairs))]
    notes = {p.printed["note"] for p in pairs if p.printed is not None}
    if notes:
        shared = notes.pop() if len(notes) == 1 else ""
        theirs = tuple(_printed(versus.paper, pair, shared) for pair in pairs)
        result.append(Line("published", theirs, continued=True, note=shared))
    if any(p.difference is not None for p in pairs):
        apart = tuple(Cell(p.unit.signed(p.difference)) for p in pairs)
        result.append(Line("difference", apart, continued=True))
    return result


def _printed(paper: Paper, pair: Pair, shared: str) -> Cell:
    if pair.printed is None:
        return Cell(note=pair.note)
    spread = pair.unit.text(float(pair.printed["std"])) if pair.printed["std"] else ""
    note = "" if shared else pair.printed["note"]
    doubts = "; ".join(filter(None, (note, *paper.against(pair.printed))))
    return Cell(pair.unit.text(pair.value), spread, note=doubts)


def versus_frame(versus: Versus) -> pd.DataFrame:
    """One row per cell that could have a published counterpart, with verdict and cause."""
    import pandas as pd

    rows = []
    for pair in versus.pairs.values():
        verdict, why = pair.verdict
        printed = pair.printed or {}
        rows.append(
            {
                "suite": pair.column.suite.banner or pair.column.suite.title,
                "selection": versus.table.results.selection,
                "method": pair.method,
                "label": versus.table.labels[pair.method],
                "block": pair.column.block,
                "column": pair.column.key,
                "kind": pair.column.kind,
                "metric": pair.column.quantity.name,
                "unit": pair.unit.symbol,
                "ours": pair.ours.mean,
                "std": pair.ours.std,
                "n": len(pair.ours.values),
                "published": pair.value,
                "published_std": printed.get("std") or None,
                "difference": pair.difference,
                "published_label": printed.get("label"),
                "published_row": printed.get("row"),
                "verdict": verdict if pair.printed else "",
                "cause": why if pair.printed else "",
                "note": " | ".join(filter(None, (pair.ours.note, pair.note, printed.get("note")))),
            }
        )
    return pd.DataFrame(rows)
