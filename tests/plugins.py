"""Algorithms and profiles from outside, as a user's module has them."""

from __future__ import annotations

import os
from dataclasses import replace

from agents import PPO
from agents.rollout import collect
from benchmarks.profiles import LanguageModel, Profile, Row, TaskProfile
from benchmarks.profiles.suite import suite


class Mine(PPO):
    """An algorithm with options of its own."""

    name = "mine"

    def __init__(self, policy, env, *, strength: float = 1.0, learning_rate: float = 1e-4, seed: int = 0, **others):
        super().__init__(policy, env, learning_rate=strength * learning_rate, seed=seed, **others)


class Dies(PPO):
    """An algorithm whose process ends without a word."""

    name = "dies"

    def iterate(self):
        os._exit(3)


class Unfinite(PPO):
    """An algorithm that tells a number which is none."""

    name = "unfinite"

    def iterate(self):
        return super().iterate() | {"strange": float("nan")}


class Plain:
    """An algorithm with nothing of ours but what the documentation asks for: it samples and learns nothing."""

    def __init__(self, policy, env, *, seed, output_dir):
        self.policy, self.env, self.seed = policy, env, seed
        self.history, self.num_episodes, self.num_timesteps, self.num_guide_tokens = [], 0, 0, 0

    def learn(self, *, total_episodes, callback):
        while self.num_episodes < total_episodes:
            rollout = collect(self.env, self.policy, seeds=range(self.env.num_envs), reset_seed=self.seed)
            self.num_episodes += len(rollout)
            self.num_timesteps += int(rollout.policy_tokens.sum())
            self.history.append(
                {
                    "iteration": len(self.history) + 1,
                    "reward": float(rollout.rewards.mean()),
                    "num_episodes": self.num_episodes,
                    "num_timesteps": self.num_timesteps,
                    "num_guide_tokens": self.num_guide_tokens,
                    "seconds": 1.0,
                }
            )
            callback(locals(), globals())


STRONGER = Row("plugins:Mine", {"strength": 2.0})
MICRO = Profile(
    name="micro",
    source="mini",
    tasks={
        "words": TaskProfile(
            env_id="conftest:test/Words-v0",
            language_model=LanguageModel(16, 1, 2, {"n_epochs": 2}),
            supervised={"n_epochs": 2},
            episodes=16,
            rl={"episodes_per_iteration": 8, "n_epochs": 1, "eval_every": 1, "eval_prompts": 8},
            rows=suite(iterations=2, beta=1.0, aggrevated_beta=0.5) | {"best-of-2": Row("sl", best_of=2)},
            test_prompts=12,
        )
    },
)
WORDS = MICRO.tasks["words"]
# Long enough to be interrupted.
LONG = replace(MICRO, tasks={"words": replace(WORDS, episodes=8 * 24, rl={**WORDS.rl, "eval_every": 2})})
TWO_TASKS = replace(MICRO, tasks={"words": WORDS, "again": WORDS})

# A hard task with a guide of its own, and a start model that has learned an easier one.
DISTILL = {"targets": "guide", "samples_per_prompt": 2, "min_reward": 1.0, "n_epochs": 2, "episodes_per_iteration": 64}
GROUPS = {"group_size": 4, "kl_coef": 0.01}
LOCKS = Profile(
    name="locks",
    source="mini",
    tasks={
        "lock": TaskProfile(
            env_id="textgym/CombinationLock-v0",
            env={"vocab_size": 6, "length": 4, "guide_accuracy": 0.8},
            language_model=LanguageModel(
                16, 1, 2, {"n_epochs": 1, "loss_on": "completion"}, family="llama", env={"length": 2}
            ),
            supervised={"n_epochs": 1, "learning_rate": 3e-3},
            tokens=5000,
            rl={"episodes_per_iteration": 64, "n_epochs": 1, "eval_every": 2, "eval_prompts": 8},
            rows={
                "sl": Row("sl"),
                "start": Row("sl", start="start_model"),
                "distill": Row("sl", DISTILL, start="start_model"),
                "grpo": Row("grpo", GROUPS, start="start_model"),
                "ppo++": Row("ppo++", {"beta": 0.8}, start="start_model"),
                "distill-grpo": Row("grpo", GROUPS, start="start_model", after=Row("sl", DISTILL)),
            },
            test_prompts=32,
            test_samples=6,
        )
    },
    default=("start", "distill-grpo"),
)
