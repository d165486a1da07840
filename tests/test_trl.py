"""Prompts and reward for TRL are the environment's, and its GRPO trains on them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from textgym.trl import prompt_dataset, reward_function


@pytest.mark.parametrize("id", ["textgym/CommonGen-v0", "textgym/IMDB-v0"])
def test_prompts_are_those_the_environment_shows(id):
    arguments = {"max_prompt_tokens": 12, "truncation_side": "left"} if "IMDB" in id else {}
    env = gym.make(id, split="validation", **arguments)
    data = env.unwrapped.data
    dataset = prompt_dataset(env)
    assert len(dataset) == len(data)
    assert data.fingerprint in dataset.info.description
    for index in (0, 3, len(data) - 1):
        observation, info = env.reset(seed=0, options={"index": index})
        row = dataset[index]
        assert row["prompt"] == row["task_prompt"] == info["prompt"]
        assert (tuple(row["references"]), row["sample_id"]) == (info["references"], info["sample_id"])
        shown = observation["input_ids"][observation["attention_mask"] == 1].tolist()
        if "IMDB" in id:  # read again, the rest of a cut text can be split otherwise
            assert env.unwrapped.tokenizer.decode(shown) == row["prompt"]
        else:
            assert env.unwrapped.tokenizer(row["prompt"])["input_ids"] == shown


def test_reward_is_what_the_environment_pays():
    env = gym.make_vec("textgym/CommonGen-v0", num_envs=8).unwrapped
    _, infos = env.reset(seed=0)
    tokenizer, horizon = env.tokenizer, env.max_new_tokens
    rng = np.random.default_rng(0)
    # Half of the texts end; what follows the end or the horizon counts for nothing.
    ids = rng.integers(2, 600, (8, horizon + 5))
    words = [tokenizer(f" {refs[0]}")["input_ids"][:horizon] for refs in infos["references"]]
    for row in range(0, 8, 2):
        ids[row, : len(words[row])] = words[row]
        ids[row, min(len(words[row]), horizon - 1)] = tokenizer.eos_token_id
    rewards, parts, running = np.zeros(8), {}, np.ones(8, bool)
    for actions in ids.T[:horizon]:
        _, paid, terminations, _, infos_now = env.step(actions)
        ended = terminations & running
        rewards[ended] = paid[ended]
        for name, values in infos_now.get("reward_parts", {}).items():
            if not name.startswith("_"):
                parts.setdefault(name, np.zeros(8))[ended] = values[ended]
        running &= ~terminations
    assert not running.any()
    assert len(set(rewards)) > 3

    logged = {}
    columns = {"prompts": infos["prompt"].tolist(), "references": infos["references"].tolist()}
    columns["task_prompt"] = columns["prompts"]
    completions = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
    reward = reward_function(env)
    arguments = {**columns, "completions": completions, "completion_ids": ids.tolist(), "sample_id": [0] * 8}
    assert reward(**arguments, log_metric=logged.__setitem__) == rewards.tolist()
    assert reward.__name__ == "commongen"
    assert logged == {f"rewards/commongen/{name}": pytest.approx(values.mean()) for name, values in parts.items()}
    with pytest.raises(ValueError, match="completion_ids must be tokens of the environment's tokenizer"):
        reward(**{**arguments, "completions": [text + "." for text in completions]})


def test_other_environments_are_refused():
    with pytest.raises(ValueError, match="env must be a text environment"):
        prompt_dataset(gym.make("CartPole-v1"))


def test_grpo_of_trl_trains_as_the_ecosystem_page_says(tmp_path):
    """With a small model in the place of GPT-2."""
    pytest.importorskip("trl", reason='needs trl: pip install "textgym[trl]"')
    page = (Path(__file__).parents[1] / "docs/ecosystem.md").read_text()
    code = re.search(r"```python\n(.*?)```", page[page.index("## TRL") :], re.DOTALL)[1]
    tokenizer = gym.make("textgym/CommonGen-v0").unwrapped.tokenizer
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, **ends)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = []

    def watched(reward):
        def watching(**arguments):
            asked.extend(zip(arguments["prompts"], arguments["references"], arguments["sample_id"], strict=True))
            return reward(**arguments)

        watching.__name__ = reward.__name__
        return watching

    less = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    for usual, here in (
        ('"gpt2"', f"{str(tmp_path)!r}"),
        ("reward_function(env)", "watched(reward_function(env))"),
        ("max_completion_length=20", "max_completion_length=20, **less"),
    ):
        code = code.replace(usual, here)
    namespace = {"watched": watched, "less": less}
    exec(code, namespace)
    logs = [log for log in namespace["trainer"].state.log_history if "reward" in log]
    assert len(logs) == 2
    for log in logs:
        assert math.isfinite(log["reward"])
        assert log["rewards/commongen/mean"] == pytest.approx(log["reward"])
        assert math.isfinite(log["rewards/commongen/coverage"])
    assert len(asked) == 8
    dataset = prompt_dataset(namespace["env"])
    for prompt, references, sample_id in asked:
        row = dataset[sample_id]
        assert (prompt, references) == (row["prompt"], row["references"])
