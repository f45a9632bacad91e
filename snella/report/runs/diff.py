"""What differs between two runs, or two trees of results cell by cell, and by how much.

The outcome is what came out (status, numbers, trained weights, predictions), the settings what was
run, the origin with what and where (code, versions, hardware, commit). Seconds and memory are no
part of it: they never repeat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
NOTHING = "–"
SAME = ("started", "ended", "command")
"""What differs between any two runs, and says nothing."""


@dataclass(frozen=True)
class Change:
    """One thing that two records say differently; ``by`` is B minus A of two numbers."""

    name: str
    a: Any
    b: Any

    @property
    def by(self) -> float | None:
        """How much more B is than A, where both are numbers."""
        numbers = all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in (self.a, self.b)
        )
        return float(self.b) - float(self.a) if numbers else None


@dataclass(frozen=True)
class CellChanges:
    """How two records of one cell differ.

    ``metric`` is the name of the change of the number that tables show, ``units`` the units of all
    numbers by the names of their changes.
    """

    cell: str
    outcome: list[Change]
    settings: list[Change]
    origin: list[Change]
    metric: str = ""
    units: Mapping[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether the same was run and the same came out, whatever it was made with."""
        return not self.outcome and not self.settings


@dataclass(frozen=True)
class Comparison:
    """Two trees side by side."""

    cells: list[CellChanges]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)

    @property
    def different(self) -> list[CellChanges]:
        """The cells whose outcome or settings differ."""
        return [cell for cell in self.cells if not cell.equal]

    @property
    def equal(self) -> bool:
        """Whether both have the same cells, run and ended alike."""
        return not (self.different or self.only_a or self.only_b)

    def tally(self, part: str) -> list[tuple[Change, int]]:
        """The changes of all cells in ``part`` (settings, origin), and in how many cells."""
        first: dict[tuple[str, str, str], Change] = {}
        counts: Counter[tuple[str, str, str]] = Counter()
        for cell in self.cells:
            for change in getattr(cell, part):
                key = (change.name, repr(change.a), repr(change.b))
                first.setdefault(key, change)
                counts[key] += 1
        return [(first[key], count) for key, count in counts.most_common()]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""

        def part(cell: CellChanges, name: str) -> list[dict[str, Any]]:
            return [vars(c) | {"difference": c.by} for c in getattr(cell, name)]

        return {
            "equal": self.equal,
            "cells": len(self.cells),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "different": [
                {"cell": c.cell, **{n: part(c, n) for n in ("outcome", "settings", "origin")}}
                for c in self.different
            ],
            "origin": [vars(c) | {"cells": n} for c, n in self.tally("origin")],
        }


def compare(a: Mapping[str, Record], b: Mapping[str, Record]) -> Comparison:
    """Compare two trees, given as records by cell."""
    shared = [cell for cell in a if cell in b]
    return Comparison(
        [compare_records(cell, a[cell], b[cell]) for cell in shared],
        [cell for cell in a if cell not in b],
        [cell for cell in b if cell not in a],
    )


def compare_records(cell: str, a: Record, b: Record) -> CellChanges:
    """Compare two records of one cell."""
    infos = [*(a.get("metric_info") or ()), *(b.get("metric_info") or ())]
    selection = (a.get("protocol") or {}).get("selection", "last")
    rules = [*(a.get("metrics") or ()), *(b.get("metrics") or ())]
    return CellChanges(
        cell,
        _changes(_outcome(a), _outcome(b)),
        _changes(_settings(a), _settings(b)),
        _changes(_origin(a), _origin(b)),
        f"metrics.{selection}.{a.get('metric')}",
        {f"metrics.{rule}.{i['name']}": i.get("unit", "") for rule in rules for i in infos},
    )


def _outcome(record: Record) -> dict[str, Any]:
    parts = {name: record.get(name) for name in ("metrics", "parameters", "files")}
    return _flat({"status": record.get("status"), "reason": record.get("reason"), **parts})


def _settings(record: Record) -> dict[str, Any]:
    identity = record.get("identity") or {}
    return _flat({
        "run": record.get("run"),
        "protocol": record.get("protocol"),
        "method": record.get("method"),
        "data": identity.get("data"),
        "backbone weights": identity.get("backbone"),
    })  # fmt: skip


def _origin(record: Record) -> dict[str, Any]:
    identity, made = record.get("identity") or {}, record.get("provenance") or {}
    parts = ("code", "evaluation", "merge", "libraries")
    known = {k: v for k, v in made.items() if k not in SAME}
    return _flat({**{f"identity {k}": identity.get(k) for k in parts}, **known})


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if not isinstance(content, Mapping):
        return {prefix: content}
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    found = [Change(name, a.get(name), b.get(name)) for name in {**a, **b}]
    return [c for c in found if c.a != c.b and not (c.a != c.a and c.b != c.b)]  # two NaN are equal


def shown(value: Any) -> str:
    """A value in a line of text; digests are cut."""
    if value is None:
        return NOTHING
    text = str(value)
    digest = len(text) >= 40 and set(text) <= set("0123456789abcdef")
    return text[:10] if digest else text
