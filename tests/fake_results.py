"""Invented results that look like a benchmark's: as many rows, tasks and seeds as the real one has.

``python tests/fake_results.py FOLDER`` writes them all with their report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

# How far a row gets from supervised learning (0) to best-of-4 (1), and how its texts' perplexity changes.
ROWS = {
    "sl": (0.0, 1.0),
    "best-of-4": (1.0, 0.97),
    "ppo": (0.8, 1.12),
    "ppo++": (0.95, 1.08),
    "dr-po": (0.85, 1.1),
    "aggrevated": (0.15, 1.3),
    "lols": (0.7, 1.15),
    "d2lols": (1.1, 1.1),
    "gail": (0.1, 1.02),
    "reinforce": (0.75, 1.1),
    "rloo": (0.9, 1.1),
    "guided-rloo": (0.92, 1.12),
    "grpo": (1.3, 1.4),
    "guided-grpo": (1.25, 1.5),
    "handoff-0": (0.6, 1.05),
    "handoff-0.002": (0.5, 1.05),
    "handoff-0.01": (0.2, 1.15),
}
# Supervised reward, best-of-4's distance from it, iterations, evaluations every so many, tokens of a text.
TASKS = {"imdb": (0.75, 0.15, 32, 8, 48), "commongen": (0.36, 0.12, 200, 20, 12), "tldr": (0.42, 0.13, 60, 12, 32)}
GUIDED = {"ppo++", "aggrevated", "lols", "d2lols", "guided-rloo", "guided-grpo"}
WORDS = (
    "the",
    "film",
    "a",
    "slow",
    "quiet",
    "story",
    "of",
    "two",
    "people",
    "who",
    "meet",
    "by",
    "sea",
    "and",
    "never",
)


def record(
    algo: str, seed: int, task: str = "imdb", *, name: str | None = None, prompts: int = 200, text: str | None = None
) -> dict[str, Any]:
    """A finished run as `Benchmark.run` returns it and JSON reads it.

    Args:
        algo: One of `ROWS`.
        seed: Its seed.
        task: Where the numbers come from.
        name: The task's name, if another.
        prompts: Number of test prompts.
        text: What is written everywhere, instead of words.
    """
    base, distance, iterations, eval_every, tokens = TASKS[task]
    gain, perplexity = ROWS[algo]
    place, number = [*ROWS].index(algo), [*TASKS].index(task)
    rng = np.random.default_rng([place, seed, number])
    level = base + distance * gain + rng.normal(0, 0.006)
    difficulty = np.random.default_rng(number).normal(0, 0.1, prompts)
    suited = np.random.default_rng([place, number]).normal(0, 0.04, prompts)  # what a prompt is to this row
    rewards = level + difficulty - difficulty.mean() + suited - suited.mean() + rng.normal(0, 0.1, prompts)
    trains, hands_off = algo not in ("sl", "best-of-4"), algo.startswith("handoff")

    def written(words: int, rng: np.random.Generator = rng) -> str:
        return text if text is not None else " " + " ".join(rng.choice(WORDS, words))

    length = 120 if task == "tldr" else 30
    asked = [f"Prompt {i}:{written(length, np.random.default_rng([i, number]))}" for i in range(4)]

    history = [
        {
            "iteration": i + 1,
            "num_episodes": 112 * (i + 1),
            "num_timesteps": int(112 * tokens * (i + 1) * (0.7 if algo in GUIDED else 1.0)),
            "num_guide_tokens": int(112 * tokens * (i + 1) * 0.3) if algo in GUIDED or hands_off else 0,
            "seconds": float(rng.uniform(2, 2.4)),
            "reward": base + (level - base) * (1 - np.exp(-4 * i / iterations)) + rng.normal(0, 0.01),
            "kl": 5 * (1 - np.exp(-3 * i / iterations)) + rng.normal(0, 0.1),
            "entropy": 2.5 - i / iterations + rng.normal(0, 0.02),
        }
        for i in range(iterations if trains else 0)
    ]
    for entry in history[eval_every - 1 :: eval_every]:
        entry["eval/reward"] = entry["reward"] + rng.normal(0, 0.004)
    if not trains:
        history = [{"iteration": 1, "num_episodes": 2048, "num_timesteps": 0, "num_guide_tokens": 0, "seconds": 40.0}]
        history[0] |= {"loss": 2.1}
    authors = [["policy", written(12)], ["guide", written(8)]] if hands_off else [["policy", written(20)]]
    opening = "reference" if algo == "dr-po" else "guide"
    return {
        "task": name or task,
        "about": f"Write {name or task}. Reward: from 0 to 1.",
        "algo": algo,
        "seed": seed,
        "place": place,
        "profile": "small",
        "source": "../shared/data",
        "base": "../shared/models/base-7m",
        "dtype": "float32",
        "compile": False,
        "hyperparameters": {
            "algorithm": "sl" if not trains else algo.split("-0")[0],
            "best_of": 4 if algo == "best-of-4" else 1,
            "env": {"handoff": True, "handoff_cost": 0.002} if hands_off else {},
            "decoding": {"top_k": 50},
            "learning_rate": 1e-4,
            "note": text or "",
            **({"policy": {}} if trains else {}),
        },
        "final_reward": float(rewards.mean()),
        "best_reward": float(rewards.mean()) + 0.002,
        "reward_parts": {"reward": float(rewards.mean())},
        "metrics_left_out": {"bert_score": "encoder was not given"} if task == "tldr" else {},
        "metrics": {
            "distinct_1": 0.1,
            "distinct_2": float(0.4 + rng.normal(0, 0.01)),
            "rouge_l": 0.3,
            "perplexity": float(20 * perplexity * np.exp(rng.normal(0, 0.01))),
        },
        "episodes": history[-1]["num_episodes"],
        "policy_tokens": history[-1]["num_timesteps"],
        "guide_tokens": history[-1]["num_guide_tokens"],
        "guide_usage": None,
        "seconds": sum(entry["seconds"] for entry in history),
        "history": history,
        "evaluation": {
            "split": "test",
            "seed": seed,
            "prompts": prompts,
            "policy_tokens": tokens * prompts * (4 if algo == "best-of-4" else 1),
            "guide_tokens": 9 * prompts if hands_off else 0,
            "handoff_fraction": 0.4 if hands_off else 0.0,
            "seconds": 12.0,
            "reward_accuracy": None,
            "sample_ids": list(range(prompts)),
            "rewards": rewards.tolist(),
        },
        "fingerprints": {"data": "0123456789abcdef", "test": "fedcba9876543210", "reward": None},
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "threads": 2,
        "device": "cpu",
        "training_seed": 17 * seed,
        "samples": [
            {
                "sample_id": 50 * i,
                "prompt": asked[i],
                "reward": float(rewards[i]),
                "segments": authors,
            }
            for i in range(4)
        ],
        **({"validation_reward": base} if algo == "sl" else {}),
        "rollouts": [
            {
                "prompt": asked[i],
                "prefix_length": 0 if hands_off else 7,
                "reward": float(rewards[i]),
                "segments": authors if hands_off else [[opening, written(8)], ["policy", written(12)]],
            }
            for i in range(4 if algo in {*GUIDED, "dr-po"} or hands_off else 0)
        ],
        "finished": f"2026-01-0{1 + seed}T00:00:00+00:00",
    }


def write(folder: Path, *, algos: tuple[str, ...] = tuple(ROWS), seeds: int = 5, prompts: int = 200) -> None:
    """Write the results of every task, row and seed to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = (record(algo, seed, task, prompts=prompts) for task in TASKS for seed in range(seeds) for algo in algos)
    (folder / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")


if __name__ == "__main__":
    from benchmarks.report.write import write_report

    write(Path(sys.argv[1]), prompts=1000)
    print(write_report(sys.argv[1]).page)
