"""The contracts of a task family: what training needs of it, and how its predictions are scored.

A family is one folder. Its ``__init__.py`` describes it without torch (:class:`TaskInfo`), so that
planning is quick; :class:`Task` is one data set under one protocol as training sees it, without
test targets; :class:`Scorer` alone opens those, and never sees a model.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from snella.errors import UserError, unknown
from snella.files import user_path
from snella.validation import Strict

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from snella.data.prepared import Prepared

    Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Metric:
    """One metric; with unit "%" the value is a fraction, printed times 100.

    A recorded value outside ``lower`` to ``upper`` is refused.
    """

    name: str
    title: str
    unit: str = "%"
    higher_is_better: bool = True
    lower: float = 0.0
    upper: float = 1.0


@dataclass(frozen=True)
class Score:
    """A metric's value, by group where there are groups, and per example (N,) for statistics.

    ``warnings`` are what a reader of the value should know; they go into the record.
    """

    value: float
    per_group: dict[str, float] = field(default_factory=dict)
    per_example: np.ndarray | None = None
    warnings: tuple[str, ...] = ()


class TaskSettings(Strict):
    """A task's own part of the protocol: plain values beside the common ones.

    Fields named in ``scoring`` concern scores alone: changing one costs no training.
    """

    scoring: ClassVar[frozenset[str]] = frozenset()

    def scoring_files(self) -> dict[str, str | None]:
        """Files and folders that scoring reads, by the setting that names each (None: not set).

        They have to be there before a run trains, and their contents belong to its identity.
        """
        return {}


def _place(path: str) -> str:
    """A path with ``~`` expanded; nothing would stand for the working directory."""
    if not path.strip():
        raise ValueError("a path is not empty; write it, or leave `path:` out")
    return user_path(path).as_posix()


class DatasetSpec(Strict):
    """A data set as configured; ``options`` belong to the task family, which checks them."""

    kind: str = "folder"
    path: Annotated[str, AfterValidator(_place)] | None = None
    num_classes: int | None = Field(None, ge=1, le=100_000)
    label: str = ""
    task: str = "classification"
    options: dict[str, Any] = {}


class Backbone(Strict):
    """A pre-trained model: architecture, its keyword arguments, and the weights' file.

    ``load`` says how the file is read and recognised (key, ignore, fresh, holds, lacks, md5).
    """

    name: str
    arch: str
    kwargs: dict[str, Any] = {}
    file: str | None = None
    load: dict[str, Any] = {}

    @property
    def entry(self) -> dict[str, Any]:
        """All of it in one mapping, as :func:`~snella.models.backbones.build_backbone` takes it."""
        flat = self.model_dump()
        return {**flat, **flat.pop("load")}


@dataclass(frozen=True)
class TaskInfo:
    """What planning needs to know of a task family, without importing torch.

    ``prepare`` writes a data set's prepared folder from its raw form, ``check`` raises
    :class:`~snella.errors.UserError` for what is wrong with its entry, without looking at files;
    ``sources`` names the files that make it stale; data sets of a kind in ``made`` are rendered and
    need no ``path``. ``implementation`` and ``scorer`` are "module:class": strings, so that an edit
    of one makes only its own stage stale. ``toy`` is "module:function", from the name of a family
    of backbones to the :class:`Toy` on which ``snella check`` trains methods for it; only a task
    that brings ``families`` of its own needs one.
    ``figures`` are the kinds of figures that the configuration may ask for, the usual one first:
    "module:function" from (runs as :class:`Shown`, a note on their origin, file.pdf) to that file
    with a .png and a .csv beside it. ``gallery``, "module:function" from runs as :class:`Shown` to
    a list of :class:`Gallery`, gives the examples of the page of all results. With
    ``expensive_scoring`` the workflow scores in a job of its own, with its own resources.
    """

    name: str
    title: str
    metrics: tuple[Metric, ...]
    settings: type[TaskSettings]
    prepare: Callable[[str, DatasetSpec, Path], Any]
    sources: Callable[[DatasetSpec], list[Path]]
    implementation: str
    scorer: str
    toy: str = ""
    families: tuple[str, ...] = ()
    made: frozenset[str] = frozenset({"quick"})
    expensive_scoring: bool = False
    figures: Mapping[str, str] = field(default_factory=dict)
    gallery: str = ""
    check: Callable[[str, DatasetSpec], None] = lambda name, spec: None

    @property
    def primary(self) -> Metric:
        """The metric that selects epochs and that a table shows first."""
        return self.metrics[0]

    def task_class(self) -> type[Task]:
        """The class of :class:`Task`; imports torch."""
        found: type[Task] = _resolve(self.implementation)
        return found

    def scorer_class(self) -> type[Scorer]:
        """The class of :class:`Scorer`."""
        found: type[Scorer] = _resolve(self.scorer)
        return found

    def draw_figure(self, kind: str | None, shown: Sequence[Shown], note: str, file: Path) -> None:
        """Draw the figure ``kind`` (None: the usual one).

        Raises :class:`~snella.errors.UserError` for a kind that the task does not have.
        """
        _resolve(self.figures[self.figure_kind(kind)])(shown, note, file)

    def figure_kind(self, kind: str | None) -> str:
        """The name of a kind of figure; raises ``UserError`` for one that the task lacks."""
        chosen = kind or next(iter(self.figures), "")
        if chosen not in self.figures:
            raise unknown(f"kind of figure of {self.name}", chosen, self.figures)
        return chosen

    def examples(self, shown: Sequence[Shown]) -> list[Gallery]:
        """Examples of finished runs; none where the task has no gallery."""
        found: list[Gallery] = _resolve(self.gallery)(shown) if self.gallery else []
        return found

    def make_toy(self, family: str) -> Toy:
        """A tiny model of ``family`` with a batch to learn by heart; imports torch."""
        found: Toy = _resolve(self.toy)(family)
        return found


def _resolve(name: str) -> Any:
    """What "module:attribute" names; raises ``UserError`` where a task's own folder lacks it."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != module:
            raise
        raise UserError(f"There is no {name!r}, which a TASK names: {error}.") from error


@dataclass(frozen=True)
class Shown:
    """A finished run as a figure shows it.

    ``method`` and ``dataset`` are printed names, ``predictions`` the folder of the test split at
    the epoch that the protocol selects, and ``metrics`` that epoch's numbers.
    """

    method: str
    dataset: str
    data: Prepared
    settings: Any
    predictions: Path
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class GalleryLine:
    """One example: what it shows, and an image per head with its caption.

    Images are uint8 (H, W, 3); one that is not there is None.
    """

    label: str
    images: Sequence[np.ndarray | None]
    captions: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    """Examples of runs, chosen by a rule that ``text`` states, one column per head.

    ``title`` tells several galleries of one suite apart. What cannot be shown, ``text`` says.
    """

    title: str
    text: str
    heads: Sequence[str]
    lines: Sequence[GalleryLine]


@dataclass(frozen=True)
class Toy:
    """A tiny model with one batch, its loss and its output: what ``snella check`` trains."""

    model: nn.Module
    batch: Batch
    loss: Callable[[nn.Module, Batch], Tensor]
    forward: Callable[[nn.Module, Batch], Tensor]


class Task(ABC):
    """One data set under one protocol, seen through what training needs.

    The trainer moves batches to the device, sets the precision, accumulates gradients and writes
    checkpoints; a task does none of this.
    """

    def __init__(self, data: Prepared, settings: Any, batch_size: int) -> None:
        self.data, self.settings, self.batch_size = data, settings, batch_size

    @abstractmethod
    def build_model(self, backbone: Backbone) -> nn.Module:
        """The pre-trained model that a method adapts, with a fresh head where there is one."""

    @abstractmethod
    def batches(self, split: str, seed: int | None) -> Iterator[Batch]:
        """One epoch of ``split`` in batches on the CPU; in file order when the seed is None."""

    def steps(self, split: str) -> int:
        """The number of batches of one epoch."""
        return -(-self.data.size(split) // self.batch_size)

    def size(self, batch: Batch) -> int:
        """The number of examples in a batch."""
        return len(next(iter(batch.values())))

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The output of the model for a batch: what merging must keep and FLOPs are counted of."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""

    @abstractmethod
    def predict(self, model: nn.Module, split: str, folder: Path) -> int:
        """Predict every example of ``split`` into files of ``folder``; return their number.

        ``folder`` exists. Runs in evaluation mode under the trainer's precision. What ``folder``
        holds already of an interrupted call is not predicted again.
        """


class Scorer(ABC):
    """Scores predictions on disk; never sees a model."""

    def __init__(self, data: Prepared, settings: Any) -> None:
        self.data, self.settings = data, settings

    @abstractmethod
    def score(self, predictions: Path, split: str) -> dict[str, Score]:
        """All metrics of the predictions in a folder, among them the primary one.

        Raises :class:`~snella.errors.UserError` for predictions that do not fit the targets.
        """

    def chance(self) -> dict[str, float]:
        """What a guess that ignores the input reaches on the test split, where that is known."""
        return {}
