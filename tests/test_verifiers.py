"""A taskset of verifiers has the prompts and the rewards of its environment."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import textgym
from textgym import reasoning_gym
from textgym.trl import prompt_dataset

vf = pytest.importorskip("verifiers.v1", reason='needs verifiers: pip install "textgym[verifiers]"')
from textgym.verifiers import TextTask, TextTaskset, TextTasksetConfig, taskset  # noqa: E402

SUMS = "test/ChainSum-v0"
textgym.register(SUMS, reasoning_gym.task("chain_sum"))


def score(task, *replies):
    """Score a conversation with these answers, by verifiers itself."""
    trace = vf.Trace[type(task.data), vf.State, vf.AgentConfig](
        task=vf.TraceTask(type=type(task).__name__, data=task.data), agent=vf.AgentInfo(config=vf.AgentConfig())
    )
    trace.nodes = [vf.MessageNode(message=vf.AssistantMessage(content=reply), sampled=True) for reply in replies]
    asyncio.run(task.score(trace))
    return trace


def play(env, index, text):
    """Write a text into an environment; returns what it read, and pays, in parts and in all."""
    inside = env.unwrapped
    env.reset(seed=0, options={"index": index})
    info, paid, ids = {}, 0.0, inside.tokenizer(text, add_special_tokens=False)["input_ids"]
    for token in [*ids, inside.tokenizer.eos_token_id]:
        _, paid, over, _, info = env.step(token)
        if over:
            break
    return info["text"], info["reward_parts"], paid


@pytest.mark.parametrize("id", ["textgym/CommonGen-v0", "textgym/Countdown-v0", SUMS])
def test_rewards_are_those_of_the_environment(id):
    arguments = {"split": "validation", "stop": [";"] if "CommonGen" in id else []}
    env, tasks = gym.make(id, **arguments), list(taskset(id, **arguments))
    dataset = prompt_dataset(env)
    assert len(tasks) == len(dataset)
    rng, paid = np.random.default_rng(0), []
    for index in (0, 1, len(tasks) - 1):
        task, row = tasks[index], dataset[index]
        assert (task.data.idx, task.data.prompt, task.data.references) == (index, row["prompt"], row["references"])
        words = row["references"][0].split()
        some = " ".join(rng.choice(words, len(words) // 2 + 1, replace=False))
        for reply in (" ".join(words), some, f"{some}; {words[0]}" if arguments["stop"] else "", ""):
            text, parts, reward = play(env, index, reply)
            assert text.strip() == reply.partition(";")[0].strip()
            trace = score(task, "not this", reply)
            assert {name: given.score for name, given in trace.rewards.items()} == parts
            assert trace.reward == pytest.approx(reward, abs=1e-12)
            paid.append(reward)
    assert max(paid) > min(paid)


def test_a_task_travels_as_its_data():
    """As to the workers of a trainer: the environment is made where the task is scored."""
    template = "{prompt}\nAnswer with one sentence."
    tasks = taskset("textgym/CommonGen-v0", split="test", template=template)
    task = next(iter(tasks))
    assert task.data.prompt == template.format(prompt=task.data.task_prompt)
    arrived = TextTask(TextTask.data_type().model_validate_json(task.data.model_dump_json()))
    assert arrived.hash == task.hash
    answer = task.data.references[0]
    assert score(arrived, answer).reward == score(task, answer).reward > score(task, "").reward == score(task).reward
    assert score(task.defer_scoring(), answer).rewards == {}


def test_verifiers_finds_it_as_a_plugin(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text('from textgym.verifiers import TextTaskset\n\n__all__ = ["TextTaskset"]\n')
    monkeypatch.syspath_prepend(tmp_path)
    kind = vf.taskset_config_type("my-tasks")
    assert kind is TextTasksetConfig
    arguments = {"env": "textgym/Countdown-v0", "arguments": {"split": "test"}}
    found = vf.load_taskset(kind.model_validate({"id": "my-tasks", **arguments}))
    assert isinstance(found, TextTaskset)
    assert [task.data.idx for task in found.take(3)] == [0, 1, 2]
    assert next(iter(found.skip(2))).data.id == "test-2"
    sys.modules.pop("my_tasks")


def test_wrong_arguments_are_named_when_the_taskset_is_made():
    for id, arguments, message in (
        ("textgym/Nothing-v0", {}, "env must be the id of an environment, got 'textgym/Nothing-v0'"),
        ("CartPole-v1", {}, "env must be a text environment"),
        ("textgym/IMDB-v0", {"split": "training"}, "split must be one of"),
        ("textgym/IMDB-v0", {"reward": len}, "arguments must be what JSON can hold"),
    ):
        with pytest.raises(ValueError, match=message):
            taskset(id, **arguments)


def test_the_ecosystem_page_runs(capsys):
    page = (Path(__file__).parents[1] / "docs/ecosystem.md").read_text()
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "textgym.verifiers" in code]
    exec(snippet, {})
    assert capsys.readouterr().out.count("Answer with one sentence.") == 3
