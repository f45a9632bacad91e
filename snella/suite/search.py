"""Search: the same number of trials for every row, scored on validation examples.

A trial is an ordinary run of the suite with one point of a grid laid over its settings. It trains
on ``train`` and is scored on ``val``, which plays the test split; test examples cannot be reached.
What a search found is a file of ``config/search/``, which a protocol uses with
``hyperparameters: search``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from snella.validation import Strict, check_distinct

Point = dict[str, Any]
"""A value for each searched setting."""
Values = Annotated[list[Any], Field(min_length=1), AfterValidator(check_distinct)]
Grid = Annotated[dict[str, Values], Field(min_length=1)]
RATES: dict[str, list[Any]] = {"lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]}
NAME = "-trial-"
"""Between a suite's name and a trial's number, in the names of folders."""
FOLDER = "search"
"""Where trials lie below the results, apart from what tables show."""
MOST_TRIALS = 10_000
"""Of a row, per data set and seed: more is a slip, and would take minutes to list."""
EVERY = "*"
"""Stands for all data sets, where settings are chosen per row."""


class Search(Strict):
    """What is tried for each row of a suite.

    ``grid`` maps fields of the protocol to their values; a trial is one combination. A row may have
    a grid of its own in ``rows``, also over its hyper-parameters, with as many trials as all others
    have. ``choose`` says whether each data set has its own best settings or a row has one for all.
    Searched are all rows of the suite, or those of ``table``, on all data sets or on ``datasets``.
    """

    grid: Grid = RATES
    rows: dict[str, Grid] = {}
    choose: Literal["dataset", "row"] = "dataset"
    table: str | None = None
    datasets: Annotated[list[str], Field(min_length=1), AfterValidator(check_distinct)] | None = (
        None
    )
    seeds: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(check_distinct)
    ] = [0]

    @model_validator(mode="after")
    def _fair(self) -> Search:
        if self.trials < 2:
            raise ValueError("a search needs a grid of two trials or more")
        if self.trials > MOST_TRIALS:
            raise ValueError(
                f"the grid has {self.trials:,} trials, every value with every other; name fewer "
                f"values (at most {MOST_TRIALS:,} trials)"
            )
        for row, grid in self.rows.items():
            if (found := _size(grid)) != self.trials:
                raise ValueError(
                    f"row {row!r} has {found} trials and the others {self.trials}: "
                    "every row gets the same number"
                )
        return self

    @property
    def trials(self) -> int:
        """The number of trials of every row, per data set and seed."""
        return _size(self.grid)

    def grid_of(self, method: str) -> dict[str, list[Any]]:
        """The values that are tried for a row."""
        return self.rows.get(method, self.grid)

    def points(self, method: str) -> list[Point]:
        """The trials of a row in order; the last setting of its grid varies fastest."""
        grid = self.grid_of(method)
        return [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]

    def at_edge(self, method: str, point: Mapping[str, Any]) -> list[str]:
        """Settings of ``point`` with the lowest or highest value tried: others may be better."""
        return [
            name
            for name, values in self.grid_of(method).items()
            if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
            if len(values) > 1 and point[name] in (min(values), max(values))
        ]


def _size(grid: Mapping[str, list[Any]]) -> int:
    return math.prod(len(values) for values in grid.values())


@dataclass(frozen=True)
class Trial:
    """One trial of a suite's search, counted from 1."""

    number: int
    search: Search

    def point(self, method: str) -> Point:
        """The settings that the trial lays over a row's own."""
        return self.search.points(method)[self.number - 1]

    @staticmethod
    def protocol(selection: str) -> dict[str, Any]:
        """What any trial lays over a protocol: the validation examples play the test's part.

        The score is that of the last epoch or, where the protocol chooses an epoch, of the best.
        """
        if selection == "last":
            looks: dict[str, Any] = {"evaluate_every": 1_000_000, "evaluate_last": 1}
            return {"train_split": "train", "selection": "last", **looks}
        return {"train_split": "train", "selection": "best-test"}
