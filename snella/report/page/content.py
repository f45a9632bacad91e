"""What a page shows: tables, the runs behind their cells, examples, and the audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from snella.report.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from snella.tasks.base import Gallery

RunKey = tuple[str, str, str, int]
"""Suite, method, data set, seed."""


@dataclass(frozen=True)
class PageRun:
    """A planned run: its state, why, and what its folder holds, if anything.

    ``details`` are those of :func:`~snella.report.runs.details.describe`.
    """

    suite: str
    method: str
    dataset: str
    seed: int
    label: str
    dataset_label: str
    state: str
    why: str
    folder: str
    details: Mapping[str, Any] | None = None

    @property
    def key(self) -> RunKey:
        """What names the run."""
        return self.suite, self.method, self.dataset, self.seed


@dataclass(frozen=True)
class PageTable:
    """A table under a title, with the command that writes it."""

    title: str
    table: Table
    command: str


@dataclass(frozen=True)
class PageSuite:
    """A suite's tables; ``banner`` is what a demo says on its face."""

    title: str
    banner: str
    tables: Sequence[PageTable]
    galleries: Sequence[Gallery] = ()


@dataclass(frozen=True)
class Content:
    """All that a page shows.

    ``skipped`` says which tables could not be built, and why; ``audit`` is the frame of
    :func:`~snella.report.published.audit.audit`.
    """

    suites: Sequence[PageSuite] = ()
    runs: Mapping[RunKey, PageRun] = field(default_factory=dict)
    skipped: Sequence[str] = ()
    audit: pd.DataFrame | None = None
