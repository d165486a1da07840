"""A checkpoint is a folder for the hub: transformers opens it, and its card says what it is and how good."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TASK
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from test_algorithms import GUIDE
from transformers import AutoModelForCausalLM, AutoTokenizer

import agents
import textgym
from agents import GRPO, PPO, SL, CausalLMPolicy, PPOPlusPlus, algorithm, checkpoint, evaluate
from agents.environments import make_env
from textgym.guidance import Guidance
from textgym.guides.local import LocalGuide


def rows_of(card):
    """The table of a card."""
    lines = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_a_checkpoint_is_opened_by_transformers_and_described_by_its_card(make_env, make_policy, tmp_path):
    agent = PPO(make_policy(), make_env(8), episodes_per_iteration=8, eval_every=2, eval_prompts=8, seed=3)
    agent.learn(total_episodes=24)
    agent.save(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for name, weight in agent.policy.model.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == agent.policy.tokenizer.get_vocab()

    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["textgym", "reinforcement-learning", "ppo", "words"]
    rows = rows_of(card)
    assert rows["Task"] == "words (`test/Words-v0`)"
    assert rows["Training"] == f"24 episodes, {agent.num_timesteps} tokens of the policy, 0 of a guide, seed 3"
    assert agent.env.data.fingerprint in rows["Data"]
    assert rows["eval/reward"] == f"{agent.history[1]['eval/reward']:.4f}"
    assert rows["Reward"] == "letters"
    described = json.loads((tmp_path / "run" / "algorithm.json").read_text())
    assert described["algorithm"] == "ppo"


def test_a_guide_is_named_by_its_fingerprint_and_this_machine_is_not_named(make_env, make_policy, tmp_path):
    make_policy(seed=1).save_pretrained(tmp_path / "guide")
    make_policy().save_pretrained(tmp_path / "start")
    guide = LocalGuide(tmp_path / "guide")
    agent = PPOPlusPlus(str(tmp_path / "start"), make_env(8, guide=guide), episodes_per_iteration=8)
    agent.learn(total_episodes=8).save(tmp_path / "run")
    text = (tmp_path / "run" / "README.md").read_text()
    assert rows_of(ModelCard(text))["Guide"] == f"LocalGuide, fingerprint `{guide.fingerprint}`"
    assert str(tmp_path) not in text
    assert "base_model" not in text


def test_what_was_never_used_is_not_loaded_for_a_card(make_env, make_policy, tmp_path, monkeypatch):
    env = make_env(8, guide=GUIDE)
    monkeypatch.setattr("textgym.engine.load_reward", lambda *_: 1 / 0)
    agent = SL(make_policy(), env, episodes_per_iteration=60, n_epochs=1)
    agent.learn().save(tmp_path / "run")
    rows = rows_of(ModelCard.load(tmp_path / "run" / "README.md"))
    assert not {"Guide", "Reward"} & rows.keys()
    assert rows["validation_loss"] == f"{agent.history[-1]['validation_loss']:.4f}"


class Hub:
    """A hub that keeps a copy of what is uploaded, in a folder."""

    def __init__(self, folder):
        self.folder, self.made = folder, []

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.made.append((repo_id, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
        ignore = shutil.ignore_patterns("training") if ignore_patterns == "training/*" else None
        shutil.copytree(folder_path, self.folder / repo_id, ignore=ignore, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}: {commit_message}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(algorithm, "HfApi", hub)
    monkeypatch.setattr(textgym.hub, "snapshot_download", lambda repo_id: hub.folder / repo_id)
    return hub


def test_an_agent_goes_to_the_hub_and_comes_back(hub, make_env, make_policy, tmp_path):
    agent = PPO(make_policy(), make_env(8), episodes_per_iteration=8, output_dir=tmp_path / "secret")
    agent.learn(total_episodes=8)
    assert agent.push_to_hub("me/policy", private=True) == "https://hub/me/policy: ppo after 8 episodes"
    assert hub.made == [("me/policy", True, True)]
    assert not (hub.folder / "me/policy/training").exists()
    policy = CausalLMPolicy.from_pretrained(hub.folder / "me/policy")
    for name, weight in agent.policy.state_dict().items():
        np.testing.assert_array_equal(policy.state_dict()[name], weight)

    agent.push_to_hub("me/agent", training=True)
    assert "secret" not in "".join(path.read_text() for path in hub.folder.rglob("*.json"))
    assert agent.hyperparameters["output_dir"] == tmp_path / "secret"
    again = PPO.load("me/agent", make_env(8))
    again.learn(total_episodes=8)
    agent.learn(total_episodes=8)
    assert again.history[-1]["reward"] == agent.history[-1]["reward"]
    with pytest.raises(ValueError, match=r"or a repository of the hub with one, got .*me/nothing"):
        PPO.load("me/nothing", make_env(8))


def test_an_agent_opens_with_its_algorithm_and_its_environment(hub, make_env, make_policy, tmp_path):
    guidance = Guidance(restart_prob=1.0)
    env = make_env(8, guide="references", guidance=guidance, source="mini", max_new_tokens=4)
    agent = GRPO(make_policy(), env, group_size=4, episodes_per_iteration=8, output_dir=tmp_path / "secret")
    agent.learn(total_episodes=8)

    agent.push_to_hub("me/policy")
    opened = agents.load("me/policy")
    assert type(opened) is GRPO
    assert (opened.env.num_envs, opened.env.max_new_tokens, opened.env.guidance) == (8, 4, guidance)
    assert opened.history == []
    assert checkpoint._plain(opened.hyperparameters) == checkpoint._plain(agent.hyperparameters | {"output_dir": None})
    np.testing.assert_array_equal(evaluate(opened, num_prompts=8).rewards, evaluate(agent, num_prompts=8).rewards)
    with pytest.raises(ValueError, match=r"must have the state of the training to go on.*agents.load opens it"):
        GRPO.load("me/policy", env)

    agent.save(tmp_path / "run")
    again = agents.load(tmp_path / "run", seed=agent.seed)
    assert [a.learn(total_episodes=8).history[-1]["reward"] for a in (again, agent)] == [
        again.history[-1]["reward"]
    ] * 2
    assert again.hyperparameters["output_dir"] == str(tmp_path / "secret")
    agent.push_to_hub("me/agent", training=True)
    assert agents.load("me/agent").hyperparameters["output_dir"] is None


def test_what_cannot_be_opened_says_why(hub, make_env, make_policy, tmp_path):
    def changed(**changes):
        file = hub.folder / "me/policy/algorithm.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return "me/policy"

    make_policy(seed=1).save_pretrained(tmp_path / "guide")
    make_policy().save_pretrained(tmp_path / "start")
    agent = PPOPlusPlus(make_policy(), make_env(8, guide=LocalGuide(tmp_path / "guide")), episodes_per_iteration=8)
    agent.learn(total_episodes=8).save(tmp_path / "run")
    with pytest.raises(ValueError, match="env must have a guide that can start texts for ppo"):
        agents.load(tmp_path / "run")
    assert agents.load(tmp_path / "run", agent.env).iteration == 1

    PPO(make_policy(), make_env(8, source=str(tmp_path / "start"))).push_to_hub("me/policy")
    with pytest.raises(ValueError, match=r"env must be given: path does not say how it was made"):
        agents.load("me/policy")
    assert isinstance(agents.load("me/policy", make_env(8)), PPO)
    for env_id in ("os:Nothing-v0", "antigravity:Env-v0", "never/Registered-v0"):
        with pytest.raises(ValueError, match=rf"must be of an environment that is registered, got '{env_id}'"):
            agents.load(changed(environment={"env_id": env_id, "num_envs": 8}))
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match=r"must be of an algorithm that is registered, got 'os.system'"):
        agents.load(changed(algorithm="os.system"))
    with pytest.raises(ValueError, match=r"algorithm.json is damaged or was written by something else"):
        agents.load(changed(more=1))


def test_names_of_others_are_text_on_a_card(words_tokenizer, make_policy, tmp_path):
    attack = "x|y `z` <img src=x onerror=alert(1)> [link](javascript:alert(1)) ![](data:1) <b>"

    def reward(*, prompts, completions, references):
        return {attack + "\n# title \x1b[2J": [0.5] * len(completions), "other": [0.5] * len(completions)}

    reward.__name__ = reward.fingerprint = attack + "\n\n# title"
    textgym.register("test/Hostile-v0", replace(TASK, name=attack, reward=reward))
    kind = type("Hostile", (PPO,), {"name": attack + " https://x.y/z"})
    env = make_env("test/Hostile-v0", num_envs=8, tokenizer=words_tokenizer)
    agent = kind(make_policy(), env, episodes_per_iteration=8, n_epochs=1, eval_every=1, eval_prompts=8)
    agent.learn(total_episodes=8).save(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    page = MarkdownIt("commonmark").enable("table").render(text)
    assert not re.findall(r"<(?:a|img|b|script)\b", page)
    assert page.count("<h1>") == 1
    assert all(row.count("<td>") == 2 for row in page.split("<tr>")[2:])
    assert page.count("[link](javascript:alert(1))") >= 4
    assert "https://x" not in text
    assert "\x1b" not in text
