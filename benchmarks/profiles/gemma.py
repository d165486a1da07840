"""CommonGen with a guide that is clearly better than its learner: Gemma 3 270M, whose texts are recorded.

For people with a small model and a strong black box. The policy of seven million parameters that ``--base`` names reads
all references once. Then all rows train on 1,024 concept sets, for each of which there are four texts of the guide;
reinforcement learning plays as many episodes everywhere. ``python examples/record_gemma.py`` made the
files, of the train and validation splits and of the test split, and a run needs neither the model nor a server.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.profiles import Profile, Row
from benchmarks.profiles.small import COMMONGEN
from benchmarks.profiles.suite import GROUP
from textgym.guides import RecordedGuide

GUIDES = Path(__file__).parents[1] / "guides"
PART = {"train_samples": 1024}
GUIDED = {**PART, "guide": RecordedGuide(GUIDES / "commongen-gemma-3-270m.jsonl")}
# The guide by itself: it writes all texts of the test.
ALONE = Row(
    "sl",
    env={"guide": RecordedGuide(GUIDES / "commongen-gemma-3-270m-test.jsonl")},
    guidance={"handoff_prob": 1.0, "no_body_prob": 1.0},
)
DISTILL = Row(
    "sl",
    {"targets": "guide", "samples_per_prompt": 4, "min_reward": 0.3, "n_epochs": 3, "episodes_per_iteration": 2048},
    env=GUIDED,
)


def small(name: str, env: Mapping[str, Any]) -> Row:
    """A row of profile "small" in another environment."""
    return replace(COMMONGEN.rows[name], env=env)


ROWS = {
    "sl": Row("sl"),
    "gemma": ALONE,
    "gemma-best-of-4": replace(ALONE, best_of=4),
    "ppo": small("ppo", PART),
    "grpo": small("grpo", PART),
    "ppo++": small("ppo++", PART),  # its guide is the supervised policy
    # The supervised policy, with its narrower decoding, completes texts from two or three states of each.
    "pav": Row("pav", {**GROUP, "rollouts_per_state": 2, "tokens_per_step": 5}, env=PART),
    "ppo++-gemma": small("ppo++", GUIDED),
    "guided-grpo-gemma": small("guided-grpo", GUIDED),
    "distill-all": Row("sl", {**DISTILL.arguments, "min_reward": None}, env=GUIDED),
    "distill": DISTILL,
    "luffy": Row("luffy", {}, env=GUIDED),
    "uft": small("uft", GUIDED),
    "hpt": Row("hpt", {**GROUP, "success": 0.3}, env=GUIDED),
    "distill-ppo": replace(small("ppo", PART), after=DISTILL),
    "distill-grpo": replace(small("grpo", PART), after=DISTILL),
}

TASK = replace(COMMONGEN, supervised={**COMMONGEN.supervised, "n_epochs": 1}, rows=ROWS)
GEMMA = Profile(name="gemma", source="hub", tasks={"commongen": TASK}, default=tuple(ROWS))
