"""The three tasks of the project, by name."""

from collections.abc import Mapping

from textgym.task import Task
from textgym.tasks import commongen, imdb, tldr

TASKS: Mapping[str, Task] = {task.name: task for task in (imdb.TASK, commongen.TASK, tldr.TASK)}

__all__ = ["TASKS"]
