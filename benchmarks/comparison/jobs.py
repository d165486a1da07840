"""What is run: a row of a profile on one of its tasks, with every choice made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from agents import SL
from benchmarks.profiles import Profile, Row, TaskProfile, accepted, algorithm_class


class Run(NamedTuple):
    """One row of a task's tables with one seed; `algo` is the row's name in the profile."""

    task: str
    algo: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.algo} seed {self.seed}"


@dataclass(frozen=True)
class Job:
    """A row on a task, which all seeds have in common.

    Attributes:
        task: The task.
        row: The row.
        base: Hub id or folder of the task's start model; None if one is trained from scratch.
        arguments: Arguments of the algorithm: those that all algorithms of the task share, and the row's own.
        settings: Everything that was chosen, as it stands in the records of the runs.
    """

    task: TaskProfile
    row: Row
    base: str | None
    arguments: dict[str, Any]
    settings: dict[str, Any]

    @classmethod
    def of(cls, task: TaskProfile, row: Row, base: str | None, settings: dict[str, Any]) -> Job:
        """The job of a row on a task, with the arguments that all algorithms of its kind share."""
        shared = task.supervised if row.algorithm == SL.name else task.rl
        if ":" in row.algorithm:  # an algorithm from outside need not have all the options of ours
            shared = accepted(algorithm_class(row.algorithm), shared)
        return cls(task, row, base, {**shared, **row.arguments}, settings)

    @property
    def before(self) -> Job | None:
        """The supervised learning that comes first, if the row has one."""
        if self.row.after is None:
            return None
        return Job.of(self.task, replace(self.row.after, start=self.row.start), self.base, self.settings)


def resolve(profile: Profile, base: str | None, settings: Mapping[str, Any]) -> dict[tuple[str, str], Job]:
    """Make the jobs of a profile, by task and row.

    Args:
        profile: The profile.
        base: Hub id or folder of a start model that replaces those of the profile.
        settings: Choices that all jobs share, for their records.

    Raises:
        ValueError: A row's algorithm does not exist, or it has arguments that a record cannot hold.
    """
    jobs = {}
    for name, task in profile.tasks.items():
        for algo, row in task.rows.items():
            algorithm_class(row.algorithm)  # which must exist
            job = Job.of(task, row, base or task.base, {})
            chosen = {**settings, "hyperparameters": _hyperparameters(job)}
            try:
                # As they will be read from the record: tuples become lists.
                job.settings.update(json.loads(json.dumps(chosen, default=describe)))
            except TypeError as error:
                raise ValueError(f"{name}, {algo}: what a profile gives must be JSON values, {error}") from error
            jobs[name, algo] = job
    return jobs


def _hyperparameters(job: Job) -> dict[str, Any]:
    task, row = job.task, job.row
    test_decoding = task.decoding if task.test_decoding is None else task.test_decoding
    chosen = {
        "algorithm": row.algorithm,
        "best_of": row.best_of,
        "env": {**task.env, **row.env},
        "decoding": task.decoding,
        "test_decoding": task.guide_decoding if row.as_guide else test_decoding,
        "guide_decoding": task.guide_decoding,
        "test_prompts": task.test_prompts,
        "start_model": job.base or (task.language_model and task.language_model.settings()),
        "supervised": task.supervised,
    }
    if row.guidance:
        chosen["test_guidance"] = row.guidance
    if task.samples(row) > 1:
        chosen["test_samples"] = task.test_samples
    if row.trains:
        budget = {"episodes": task.episodes} if task.tokens is None else {"tokens": task.tokens}
        chosen |= {"policy": row.policy, **budget, **job.arguments}
    if row.start != "supervised":
        chosen["start"] = row.start
    if (before := job.before) is not None:
        chosen["after"] = {
            "algorithm": before.row.algorithm,
            "env": before.row.env,
            "policy": before.row.policy,
            **before.arguments,
        }
    return chosen


def describe(value: Any) -> str:
    """How records name an object, such as a guide: its class and its fingerprint.

    Raises:
        TypeError: It has no fingerprint.
    """
    fingerprint = getattr(value, "fingerprint", None)
    if not isinstance(fingerprint, str):
        raise TypeError(f"or objects with a fingerprint, got {value!r}")
    return f"{type(value).__name__} {fingerprint}"
