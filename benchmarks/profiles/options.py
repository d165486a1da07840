"""PPO's options, one changed at a time, on the tasks of `quick`; PPO's defaults were chosen by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.profiles import Profile, Row, TaskProfile
from benchmarks.profiles.quick import COMMONGEN, IMDB


def options(task: TaskProfile) -> dict[str, Row]:
    """Make the rows: PPO with its defaults, and with one of them changed."""
    changes: dict[str, dict[str, Any]] = {
        "gae_lambda=1": {"gae_lambda": 1.0},
        "vf_coef=0.5": {"vf_coef": 0.5},
        "clip_range_vf=None": {"clip_range_vf": None},
        "critic=separate": {"critic": "separate"},
        "ent_coef=0.01": {"ent_coef": 0.01},
        "kl_penalty=loss": {"kl_penalty": "loss"},
        "kl_target=4": {"kl_target": 4.0},
        "target_coef=0.1": {"target_coef": 0.1},
        "target_kl=0.01": {"target_kl": 0.01},
        "lr_schedule=linear": {"lr_schedule": "linear", "schedule_episodes": task.episodes},
        "clip_schedule=linear": {"clip_schedule": "linear", "schedule_episodes": task.episodes},
    }
    return {"sl": Row("sl"), "ppo": Row("ppo")} | {name: Row("ppo", change) for name, change in changes.items()}


TASKS = {"imdb": IMDB, "commongen": COMMONGEN}
OPTIONS = Profile(
    name="options",
    source="mini",
    tasks={name: replace(task, rows=options(task)) for name, task in TASKS.items()},
    default=tuple(options(IMDB)),
)
