"""Problems on which plain reinforcement learning sees next to no reward, and every way to use a guide on them.

The learner is a Llama of 0.8 million parameters that knows the format and a little: it is trained on shorter problems
with a perfect guide, then imitates a poor one on the problems of the task. That policy is the start of all rows; a good
guide then helps some of them. All rows that play episodes have the same budget of tokens, which are those that policy
and guide write, in attempts that were replaced too. Supervised rows follow their own schedules.

Step sizes, scales and prefixes are those that `SEARCH` tried, for plain rows as for guided ones; docs/frontier.md says
what it found. The other arguments were not searched for.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.profiles import LanguageModel, Profile, Row, TaskProfile

GUIDE = {"guide_accuracy": 1.0}
GROUP = {"group_size": 8, "kl_coef": 0.0, "scale": "batch"}
RESCUE = {"dead_groups": "rescue", "rescue_fractions": (0.25, 0.5, 0.84)}
CRITIC = {"kl_coef": 0.0}
CURRICULA = {
    "uniform": "uniform",
    # Prefixes go within the tokens, and leave some iterations without.
    "cosine": {"name": "cosine", "iterations": 80},
    "stages": {"name": "stages", "stages": (0.75, 0.5, 0.25, 0.0), "iterations": 25},
    "adaback": "adaback",
    "trend": "trend",
    "pope": "pope",
}
FADING = {"name": "mixed", "high": 0.95, "low": 0.05, "iterations": 80}


def distillation(guide: Mapping[str, Any], samples: int = 4) -> Row:
    """Supervised learning on the texts of a guide that earn the whole reward."""
    return Row("sl", {"targets": "guide", "samples_per_prompt": samples, "min_reward": 1.0, "n_epochs": 4}, env=guide)


def rows(guide: Mapping[str, Any], distill: Row) -> dict[str, Row]:
    """Every way to use a guide, and none.

    Args:
        guide: Arguments of the environment that say which guide.
        distill: How its texts are learned.
    """
    return {
        "start": Row("sl"),
        "sl": Row("sl", {"targets": "references", "samples_per_prompt": 1, "n_epochs": 8}),
        "distill": distill,
        "ppo": Row("ppo", CRITIC),
        "grpo": Row("grpo", GROUP),
        "rloo": Row("rloo", {"group_size": 8, "kl_coef": 0.0}),
        "grpo-resample": Row("grpo", {**GROUP, "dead_groups": "resample"}),
        "vine-ppo": Row("vine-ppo", {**CRITIC, "tokens_per_step": 6, "rollouts_per_state": 4}),
        "grpo-prefix-rl": Row("grpo", {**GROUP, "curriculum": "prefix-rl"}),
        "ppo++": Row("ppo++", CRITIC, env=guide),
        "d2lols": Row("d2lols", CRITIC, env=guide),
        **{f"grpo-{name}": Row("grpo", {**GROUP, "curriculum": rule}, env=guide) for name, rule in CURRICULA.items()},
        "grpo-rescue": Row("grpo", {**GROUP, **RESCUE}, env=guide),
        "uft": Row("uft", {**GROUP, "curriculum": CURRICULA["cosine"]}, env=guide),
        "luffy": Row("luffy", {"group_size": 8}, env=guide),
        "prefix-rft": Row("prefix-rft", {"group_size": 8, "curriculum": FADING}, env=guide),
        "hpt": Row("hpt", GROUP, env=guide),
        "mentor": Row("mentor", {"group_size": 8, "iterations": 80}, env=guide),
        "relift": Row("relift", {"min_reward": 1.0}, env=guide),
        "pav": Row("pav", {"group_size": 8, "kl_coef": 0.0, "tokens_per_step": 12}, env=guide),
        # A policy that succeeds loses what it knows in longer steps; this one was searched for GRPO alone.
        "distill-grpo": Row("grpo", {**GROUP, "learning_rate": 1e-5}, after=distill),
        "distill-ppo": Row("ppo", {**CRITIC, "learning_rate": 1e-5}, after=distill),
    }


ROWS = rows(GUIDE, distillation(GUIDE))

PARITIES = TaskProfile(
    env_id="textgym/ChainOfParities-v0",
    language_model=LanguageModel(
        n_embd=128,
        n_layer=3,
        n_head=4,
        family="llama",
        env={"train_length": tuple(range(1, 13)), "train_problems": 12_000, "guide_accuracy": 1.0},
        training={
            "loss_on": "completion",
            "targets": "guide",
            "samples_per_prompt": 6,
            "n_epochs": 2,
            "episodes_per_iteration": 8000,
            "minibatch_size": 64,
            "learning_rate": 1e-3,
            "patience": 100,
        },
    ),
    # A guide that is hardly better than chance: what the start policy knows is hidden, not lost.
    supervised={
        "targets": "guide",
        "samples_per_prompt": 8,
        "n_epochs": 1,
        "episodes_per_iteration": 2048,
        "minibatch_size": 64,
        "learning_rate": 5e-4,
    },
    tokens=1_000_000,
    rl={
        "episodes_per_iteration": 256,
        "minibatch_size": 64,
        "n_epochs": 2,
        "learning_rate": 1e-4,
        "eval_every": 10,
        "eval_prompts": 256,
    },
    rows=ROWS,
    env={"length": 12, "copies_input": True, "guide_accuracy": 0.55},
    test_prompts=256,
    test_samples=16,
)


def like_parities(
    env_id: str, *, tokens: int, start: Mapping[str, Any], training: Mapping[str, Any], env: Mapping[str, Any]
) -> TaskProfile:
    """Another task with the learner, the training and the rows of the parities.

    Args:
        env_id: The environment.
        tokens: The budget.
        start: Arguments of the environment of the start model, in which the guide makes no error.
        training: How the start model is trained there, where it differs.
        env: Arguments of the task's environment, in which the guide is the poor one that the start policy imitates.
    """
    model = PARITIES.language_model
    assert model is not None
    return replace(
        PARITIES,
        env_id=env_id,
        language_model=replace(
            model,
            env={"train_problems": 12_000, "guide_accuracy": 1.0, **start},
            training={**model.training, **training},
        ),
        tokens=tokens,
        env=env,
    )


# The guide takes the easy answer, worth half, four times in five. The references, of which the start model learns
# chains, never do.
FORK = like_parities(
    "textgym/ChainOfParities-v0",
    tokens=400_000,
    start={"train_length": tuple(range(1, 13)), "train_problems": 36_000},
    training={"targets": "references", "samples_per_prompt": 1, "n_epochs": 4},
    env={"length": 12, "copies_input": True, "fork": True, "guide_accuracy": 0.55, "train_problems": 2048},
)
COUNTDOWN = like_parities(
    "textgym/Countdown-v0",
    tokens=400_000,
    start={"train_numbers": (2, 3)},
    training={"n_epochs": 5, "learning_rate": 2e-3},
    env={"max_number": 20, "max_value": 50, "search": True, "guide_accuracy": 0.1, "train_problems": 2048},
)
# The control: the hard token is the first one, which any prefix gives away.
STAR_GRAPH = like_parities(
    "textgym/StarGraph-v0",
    tokens=150_000,
    start={"train_path_length": (2, 3)},
    training={"samples_per_prompt": 1, "n_epochs": 6},
    env={"degree": 5, "path_length": 3, "nodes": 20, "guide_accuracy": 0.1, "train_problems": 4096},
)

# A guide that begins well and then loses its way: right in the first half of a chain, by chance in the rest. One of 64
# of its texts is right. The start policy has imitated a guide with an accuracy of 0.75.
HALF = {"guide_accuracy": 1.0, "guide_links": 6}
HALF_DISTILL = distillation(HALF, samples=8)
HALF_WAY = replace(
    PARITIES,
    env={**PARITIES.env, "guide_accuracy": 0.75},
    tokens=1_500_000,
    # The longer step: what distillation leaves is no skill to lose (`HALF_WAY_SEARCH`).
    rows=rows(HALF, HALF_DISTILL) | {"distill-grpo": Row("grpo", GROUP, after=HALF_DISTILL)},
)


def falling(rows: Mapping[str, Row], episodes: Mapping[str, int]) -> dict[str, Row]:
    """The rows, some of them with steps that fall linearly to zero.

    Args:
        rows: All rows of a task.
        episodes: How many of them a row plays with the task's budget of tokens, which is the length of its schedule.
    """
    steps = {name: {"lr_schedule": "linear", "schedule_episodes": number} for name, number in episodes.items()}
    return {name: replace(row, arguments={**row.arguments, **steps.get(name, {})}) for name, row in rows.items()}


# Constant steps let the reward go up and down by a tenth from one evaluation to the next (`HALF_WAY_CONSTANT`).
# PPO plays 81,000 episodes: its schedule was planned too long, and its published run has it.
HALF_WAY_LONG = replace(
    HALF_WAY,
    tokens=3_000_000,
    rows=falling(HALF_WAY.rows, {"ppo": 122_000, "grpo-rescue": 97_000, "distill-grpo": 71_000}),
)
# The start policy has imitated a guide that is right less often, and hardly ever succeeds.
HALF_WAY_WEAK = replace(
    HALF_WAY,
    env={**HALF_WAY.env, "guide_accuracy": 0.65},
    tokens=4_000_000,
    rows=falling(
        # With the scale "batch" plain GRPO loses on half-way what little success the start has. After distillation the
        # longer step destroyed the policy in most runs, with either scale. Of three steps rescue has the best
        # (`HALF_WAY_WEAK_SEARCH`).
        {
            **HALF_WAY.rows,
            "grpo": Row("grpo", {**GROUP, "scale": "group"}),
            "distill-grpo": Row("grpo", {**GROUP, "learning_rate": 3e-5}, after=HALF_DISTILL),
        },
        {"ppo": 108_000, "grpo": 108_000, "rloo": 108_000, "grpo-rescue": 120_000, "distill-grpo": 98_000},
    ),
)

FRONTIER = Profile(
    name="frontier",
    source="mini",
    tasks={
        "parities": PARITIES,
        "half-way": HALF_WAY,
        "half-way-long": HALF_WAY_LONG,
        "half-way-weak": HALF_WAY_WEAK,
        "fork": FORK,
        "countdown": COUNTDOWN,
        "star-graph": STAR_GRAPH,
    },
    default=tuple(ROWS),
)

# What was searched, on validation prompts with one seed: the same steps for rows that play alone as for guided ones.
STEPS: dict[str, dict[str, Any]] = {
    "lr=5e-5": {"learning_rate": 5e-5},
    "lr=1e-4": {},
    "lr=2e-4": {"learning_rate": 2e-4},
    "minibatch=256": {"minibatch_size": 256},
}
SCALES = {
    "scale=group": {"scale": "group"},
    "scale=none": {"scale": "none"},
}
SMALLER_STEPS: dict[str, dict[str, Any]] = {
    "lr=1e-5": {"learning_rate": 1e-5},
    "lr=3e-5": {"learning_rate": 3e-5},
    "lr=1e-4 minibatch=256": {"minibatch_size": 256},
    "lr=1e-4": {},
}
PREFIXES = {"rescue-2": (0.5, 0.84), "rescue-5": (0.17, 0.33, 0.5, 0.67, 0.84)}
TRIED: dict[str, Row] = {
    f"{name} {step}": replace(ROWS[name], arguments={**ROWS[name].arguments, **change})
    for name in ("ppo", "grpo", "grpo-adaback", "grpo-rescue")
    for step, change in STEPS.items()
}
TRIED |= {
    f"{name} {scale}": replace(ROWS[name], arguments={**ROWS[name].arguments, **change})
    for name in ("grpo", "grpo-rescue")
    for scale, change in SCALES.items()
}
TRIED |= {
    f"distill-grpo {name}": replace(ROWS["distill-grpo"], arguments={**GROUP, **change})
    for name, change in SMALLER_STEPS.items()
}
TRIED |= {
    name: Row("grpo", {**GROUP, **RESCUE, "rescue_fractions": fractions}, env=GUIDE)
    for name, fractions in PREFIXES.items()
}
SEARCH = Profile(
    name="frontier-search",
    source="mini",
    tasks={"parities": replace(PARITIES, rows=TRIED, tokens=500_000)},
    default=tuple(TRIED),
)

HALF_WAY_TRIED = {
    "distill-grpo lr=1e-5": rows(HALF, HALF_DISTILL)["distill-grpo"],
    "distill-grpo lr=1e-4": HALF_WAY.rows["distill-grpo"],
    "distill-rescue": Row("grpo", {**GROUP, **RESCUE}, env=HALF, after=HALF_DISTILL),
}
HALF_WAY_SEARCH = Profile(
    name="frontier-half-way-search",
    source="mini",
    tasks={"half-way": replace(HALF_WAY, rows=HALF_WAY_TRIED)},
    default=tuple(HALF_WAY_TRIED),
)
HALF_WAY_WEAK_TRIED = {
    f"rescue {step}": replace(
        HALF_WAY_WEAK.rows["grpo-rescue"],
        arguments={**HALF_WAY_WEAK.rows["grpo-rescue"].arguments, "learning_rate": float(step)},
    )
    for step in ("3e-5", "2e-4")
}
HALF_WAY_WEAK_SEARCH = Profile(
    name="frontier-half-way-weak-search",
    source="mini",
    tasks={"half-way-weak": replace(HALF_WAY_WEAK, rows=HALF_WAY_WEAK_TRIED)},
    default=tuple(HALF_WAY_WEAK_TRIED),
)
HALF_WAY_CONSTANT = Profile(
    name="frontier-half-way-constant",
    source="mini",
    tasks={"half-way-long": replace(HALF_WAY_LONG, rows=HALF_WAY.rows)},
    default=("grpo-rescue", "distill-grpo"),
)

# The map (`benchmarks.report.map`): what pays, by the start policy's chance of success and by the guide. A start has
# imitated a guide with this accuracy; the guide "half" is right in the first half of a chain, and guesses the rest.
STARTS = (0.55, 0.7, 0.85)
GUIDES: dict[str, dict[str, Any]] = {
    "0.8": {"guide_accuracy": 0.8},
    "half": HALF,
    "1": {"guide_accuracy": 1.0},
}


def guided(guide: Mapping[str, Any]) -> dict[str, Row]:
    """Ways to use a guide."""
    every = rows(guide, distillation(guide, samples=8))
    return {name: every[name] for name in ("distill", "distill-grpo", "grpo-rescue")}


MAP_ROWS = {
    "start": ROWS["start"],
    "grpo": ROWS["grpo"],
    **{f"{name}@{guide}": row for guide, settings in GUIDES.items() for name, row in guided(settings).items()},
}
MAP = Profile(
    name="frontier-map",
    source="mini",
    tasks={
        f"start-{accuracy}": replace(
            PARITIES, env={**PARITIES.env, "guide_accuracy": accuracy}, rows=MAP_ROWS, tokens=500_000
        )
        for accuracy in STARTS
    },
    default=tuple(MAP_ROWS),
)
