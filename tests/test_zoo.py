"""The zoo: trained policies in the repository, and how one comes there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import agents
from agents import PPO
from benchmarks import zoo

ZOO = Path(__file__).parents[1] / "zoo"


@pytest.mark.parametrize("name", zoo.ZOO)
def test_each_policy_of_the_zoo_opens_and_is_what_the_table_says(name):
    agent = agents.load(ZOO / name)
    result = agents.evaluate(agent, num_prompts=64, metrics=())
    (told,) = re.findall(rf"^\| `{name}` \|.*\| ([\d.]+) \| [\d.]+ \| \d+ \|$", (ZOO / "README.md").read_text(), re.M)
    # Of 64 prompts, and of texts that hang on the last digits of a machine.
    assert abs(result.reward - float(told)) < 4 * result.rewards.std() / 8
    assert all(isinstance(text, str) for text in agent.generate(list(result.prompts[:1])))


def test_the_zoo_is_small_and_has_what_its_table_has():
    files = [file for file in ZOO.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 5e6
    assert {folder.name for folder in ZOO.iterdir() if folder.is_dir()} == set(zoo.ZOO)
    assert not [file for file in files if file.suffix in (".pt", ".bin", ".pkl")]


def test_what_is_published_is_the_policy_rounded_and_nothing_of_this_machine(make_env, make_policy, tmp_path):
    agent = PPO(make_policy(), make_env(8), episodes_per_iteration=8, output_dir=tmp_path / "secret")
    agent.learn(total_episodes=8)
    zoo.publish(tmp_path / "secret" / "last", tmp_path / "zoo" / "one")
    opened = agents.load(tmp_path / "zoo" / "one")
    for name, weight in agent.policy.state_dict().items():
        torch.testing.assert_close(opened.policy.state_dict()[name], weight.bfloat16().float(), rtol=0, atol=0)
    stored = load_file(tmp_path / "zoo" / "one" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert not (tmp_path / "zoo" / "one" / "training").exists()
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "zoo" / "one").glob("*.[jm][sd]*"))
    assert json.loads((tmp_path / "secret/last/algorithm.json").read_text())["hyperparameters"]["output_dir"]
