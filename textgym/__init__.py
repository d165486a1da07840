"""Gymnasium environments for token-level text generation with a guide language model.

Importing this package registers ``textgym/IMDB-v0``, ``textgym/CommonGen-v0``, ``textgym/TLDR-v0``,
``textgym/CombinationLock-v0``, a test task with closed forms, and three puzzles whose answers are exactly right or
wrong: ``textgym/ChainOfParities-v0``, ``textgym/Countdown-v0`` and ``textgym/StarGraph-v0``.
"""

import warnings

import gymnasium as gym

from textgym.guidance import Guidance
from textgym.packages import foreign_package, other_owners
from textgym.task import Split, Task

__all__ = ["Guidance", "Split", "Task", "register"]
__version__ = "0.1.0"


if (_message := foreign_package("agents")) and other_owners("agents"):
    warnings.warn(_message, stacklevel=2)


def register(id: str, task: Task) -> None:
    """Register an environment for a task of your own.

    Args:
        id: The environment's id, such as "my/Questions-v0".
        task: The task.

    Raises:
        ValueError: `task` is no `Task`.
    """
    if not isinstance(task, Task):
        raise ValueError(f"task must be a textgym.Task, got {type(task).__name__}: {task!r}")
    gym.register(
        id,
        entry_point="textgym.env:TextEnv",
        vector_entry_point="textgym.engine:TextVectorEnv",
        kwargs={"task": task},
    )


for _name, _module in (
    ("IMDB", "imdb"),
    ("CommonGen", "commongen"),
    ("TLDR", "tldr"),
    ("CombinationLock", "lock"),
    ("ChainOfParities", "parities"),
    ("Countdown", "countdown"),
    ("StarGraph", "star_graph"),
):
    gym.register(
        f"textgym/{_name}-v0",
        entry_point=f"textgym.tasks.{_module}:{_name}Env",
        vector_entry_point=f"textgym.tasks.{_module}:{_name}VectorEnv",
    )
