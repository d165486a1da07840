"""PPO++ whose guide and reward run on machines of their own, each a model behind a vLLM server.

vllm serve Qwen/Qwen2.5-7B --port 8000
vllm serve my-reward-model --runner pooling --port 8001
accelerate launch --config_file examples/accelerate/fsdp.yaml --num_processes 8 examples/served.py \
        --guide Qwen/Qwen2.5-7B --guide-url http://first-machine:8000/v1 \
        --reward my-reward-model --reward-url http://second-machine:8001
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import tyro
from openai import OpenAI

from agents import LanguageModelPolicy, PPOPlusPlus
from agents.environments import make_env
from textgym.guides.http import HTTPGuide


class ServedReward:
    """The probability of the last class that a classifier behind a server gives to a prompt and its completion.

    Args:
        model: The classifier's name there.
        url: The server; it has vLLM's ``/classify``.
    """

    def __init__(self, model: str, url: str) -> None:
        self.fingerprint = model
        self._client = OpenAI(base_url=url, api_key="none", timeout=60, max_retries=5)

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """Score texts in one call."""
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        answer = self._client.post("/classify", body={"model": self.fingerprint, "input": texts}, cast_to=object)
        judged = sorted(answer["data"], key=lambda one: one["index"])  # type: ignore[index]
        return [one["probs"][-1] for one in judged]


def main(
    guide: str,
    guide_url: str,
    reward: str,
    reward_url: str,
    policy: str = "gpt2",
    env: str = "textgym/IMDB-v0",
    episodes_per_iteration: int = 128,
    total_episodes: int = 12_800,
    output_dir: Path = Path("runs/served"),
) -> PPOPlusPlus:
    """Train.

    Args:
        guide: The guide's name at its server.
        guide_url: That server, with ``/v1``.
        reward: The reward model's name at its server.
        reward_url: That server.
        policy: Hub id or folder of the policy.
        env: Id of the environment.
        episodes_per_iteration: Episodes an iteration, of all processes.
        total_episodes: Episodes, of all processes.
        output_dir: Where checkpoints go.
    """
    learner = LanguageModelPolicy.from_pretrained(policy)
    envs = make_env(
        env,
        num_envs=episodes_per_iteration // int(os.environ.get("WORLD_SIZE", 1)),
        tokenizer=learner.tokenizer,
        guide=HTTPGuide(guide, base_url=guide_url, cache=output_dir / "completions", api_key_env=None),
        reward=ServedReward(reward, reward_url),
    )
    agent = PPOPlusPlus(learner, envs, episodes_per_iteration=episodes_per_iteration, output_dir=output_dir)
    return agent.learn(total_episodes=total_episodes, progress_bar=True)


if __name__ == "__main__":
    tyro.cli(main)
