"""Whether training goes well can be seen: lines, bars, history, pictures."""

from __future__ import annotations

import io
import re

import gymnasium as gym
import pandas
import pytest
from IPython.core.interactiveshell import InteractiveShell
from rich.console import Console

from agents import PPOPlusPlus, TabularPolicy
from agents import display as module
from agents.display import Display

LOCK_ID = "textgym/CombinationLock-v0"


@pytest.fixture
def agent(tmp_path):
    policy = TabularPolicy.for_lock(gym.make(LOCK_ID).unwrapped.lock)
    settings = {"episodes_per_iteration": 8, "minibatch_size": 8, "device": "cpu"}
    return PPOPlusPlus(policy, LOCK_ID, eval_every=2, eval_prompts=8, output_dir=tmp_path, **settings)


def test_a_line_for_each_iteration(agent, capsys):
    agent.learn(total_episodes=24, verbose=1)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3
    for number, (line, record) in enumerate(zip(lines, agent.history, strict=True), 1):
        assert line.startswith(f"ppo++    {number}  reward {record['reward']:.3f}")
        assert ("eval/reward" in line) == (number == 2)
        assert re.search(r"kl \S+  entropy \S+  length \S+  (guide_tokens \d+  )?tokens/s [\d,]+  left 0:00:0\d$", line)
    agent.learn(total_episodes=8)
    assert capsys.readouterr().out == ""


def test_the_history_is_a_table_on_request_and_on_disk(agent, tmp_path):
    agent.learn(total_episodes=24)
    table = agent.to_pandas()
    assert table["reward"].tolist() == [record["reward"] for record in agent.history]
    assert table["eval/reward"].isna().tolist() == [True, False, True]
    pandas.testing.assert_frame_equal(pandas.read_csv(tmp_path / "history.csv"), table, check_dtype=False)
    resumed = PPOPlusPlus.load(tmp_path / "last", LOCK_ID, policy_class=TabularPolicy,
                               policy_arguments={"states": agent.policy.states})  # fmt: skip
    assert resumed.to_pandas().equals(table)


def test_the_picture_has_what_the_history_has(agent):
    with pytest.raises(ValueError, match="nothing has been learned yet"):
        agent.plot()
    agent.learn(total_episodes=24)
    figure = agent.plot()
    assert [axes.get_title() for axes in figure.axes] == [
        "reward",
        "KL to the start, nats a text",
        "tokens of a text",
        "the guide's share of the tokens",
    ]
    rewards = next(line for line in figure.axes[0].lines if line.get_label() == "reward")
    assert rewards.get_ydata().tolist() == [record["reward"] for record in agent.history]
    shown, _ = InteractiveShell().display_formatter.format(figure)
    assert shown["image/png"].startswith(b"\x89PNG"), "a notebook shows it without `%matplotlib inline`"


def test_an_agent_says_what_it_is(agent):
    agent.learn(total_episodes=8)
    reward = agent.history[-1]["reward"]
    assert re.fullmatch(
        rf"PPOPlusPlus\(TabularPolicy of \S+ parameters in .*: 1 iterations, 8 episodes, reward {reward:.3f}\)",
        repr(agent),
    )


def test_without_a_terminal_a_bar_is_a_line_now_and_then(monkeypatch):
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(seconds)))
    console = Console(file=io.StringIO(), width=200)
    with Display("sl", lines=False, bar=True, console=console) as display:
        for iteration in range(1, 13):
            record = {"iteration": iteration, "loss": 1.0, "validation_loss": 2.0, "seconds": 1.0}
            display.update(record, iteration / 12, "status")
    lines = console.file.getvalue().strip().splitlines()
    assert 3 <= len(lines) <= 7
    assert lines[-1].startswith("sl   12  loss 1.000  validation_loss 2.000  tokens/s 0  left 0:00:00")
