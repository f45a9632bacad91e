"""A run, typed from the plan to its record: one cell of the grid with all that moves its number."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from snella.runs.protocol import Protocol
from snella.tasks import TaskInfo, TaskSettings, find_task
from snella.tasks.base import Backbone
from snella.validation import Strict, validate

_path = cache(Path)  # plans ask for tens of thousands, again and again


class Dataset(Strict):
    """A prepared data set: its name, task family and folder, and the split that plays the test."""

    name: str
    task: str
    prepared: str
    scored: Literal["test", "val"] = "test"


class MethodChoice(Strict):
    """A row: its name, the method's file and its hyper-parameters."""

    name: str
    file: str
    hyperparameters: dict[str, Any] = {}


class Run(Strict):
    """One run: (suite, backbone, data set, method, protocol, seed), all settings resolved.

    ``settings`` are the task family's own, as plain values; ``notes`` go into the record.
    """

    suite: str
    backbone: Backbone
    dataset: Dataset
    method: MethodChoice
    protocol_name: str
    protocol: Protocol
    settings: dict[str, Any] = {}
    base_seed: int = 0
    seed: int = 0
    results: str = "results"
    tasks: str = "tasks"
    notes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read what :meth:`to_json` wrote; raises :class:`~snella.errors.UserError`."""
        return validate(cls, json.loads(text), "--settings")

    def to_json(self) -> str:
        """All settings as canonical JSON, for the job that does the run."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    @property
    def key(self) -> str:
        """The run's path below ``runs/``."""
        names = (self.suite, self.backbone.name, self.dataset.name, self.method.name)
        return "/".join((*names, f"seed{self.seed}"))

    @property
    def place(self) -> str:
        """Where the run's files lie, as text: of ten thousand runs no path is needed."""
        return f"{self.results}/runs/{self.key}"

    @property
    def folder(self) -> Path:
        """Where the run's files lie."""
        return _path(self.place)

    @property
    def record(self) -> Path:
        """Where the run's record lies once it is done."""
        return self.folder / "record.json"

    @property
    def task(self) -> TaskInfo:
        """The task family."""
        return find_task(self.dataset.task, self.tasks)

    @property
    def task_settings(self) -> TaskSettings:
        """The task family's settings, typed."""
        return validate(self.task.settings, self.settings, f"protocol {self.protocol_name!r}")

    def shared(self) -> dict[str, Any]:
        """What training depends on that a row has on most data sets and with every seed.

        Without names that only label it and without local paths.
        """
        skip = {"selection", "hyperparameters", "checkpoint_every"}
        settings = self.task_settings
        return {
            "backbone": self.backbone.model_dump(exclude={"name", "file"}, exclude_defaults=True),
            "hyperparameters": self.method.hyperparameters,
            "protocol": self.protocol.model_dump(mode="json", exclude=skip),
            "settings": settings.model_dump(mode="json", exclude=set(settings.scoring)),
        }
