"""Task families: what a batch is, what the loss is, what is predicted and how it is scored."""

from snella.tasks.base import Task
from snella.tasks.classification import Classification

TASKS: dict[str, type[Task]] = {"classification": Classification}

__all__ = ["TASKS", "Classification", "Task"]
