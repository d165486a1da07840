"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import ENV_ID, HORIZON
from gymnasium.envs.registration import registry
from transformers import GPT2Config, GPT2LMHeadModel

from agents import CausalLMPolicy

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Load an example as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_cleanrl_script_runs_on_imdb(example, capsys):
    script = example("cleanrl_ppo")
    history = script.main(script.Args(total_timesteps=2 * 48 * 2, num_envs=2, num_minibatches=2, update_epochs=1))
    assert len(history) == 2
    assert all(0 <= reward <= 1 for reward in history)
    assert "2 episodes" in capsys.readouterr().out


def test_cleanrl_script_learns(example, make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path)
    script = example("cleanrl_ppo")
    updates, rows = 15, 32
    history = script.main(
        script.Args(
            ENV_ID,
            str(tmp_path),
            seed=0,
            total_timesteps=updates * rows * HORIZON,
            num_envs=rows,
            num_steps=HORIZON,
            learning_rate=3e-3,
        )
    )
    assert np.mean(history[-3:]) > np.mean(history[:3]) + 0.3


def test_torchrl_collects_from_imdb(example):
    pytest.importorskip("torchrl", reason="needs torchrl: pip install textgym[torchrl]")
    rewards = example("torchrl_collector").main(frames_per_batch=96, total_frames=192)
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)


def test_torchrl_accepts_every_environment():
    envs = pytest.importorskip("torchrl.envs", reason="needs torchrl: pip install textgym[torchrl]")
    for id in (id for id in registry if id.startswith("textgym/")):
        env = envs.GymEnv(id)
        envs.check_env_specs(env, seed=0)
        env.close()


@pytest.mark.parametrize("number", range(3))
def test_the_ecosystem_page_runs_as_it_stands(number, tmp_path, monkeypatch):
    """With a small model in the place of GPT-2, and less of everything."""
    code = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs/ecosystem.md").read_text(), re.DOTALL)[number]
    env = gym.make(re.search(r"textgym/\w+-v0", code)[0]).unwrapped
    config = GPT2Config(
        vocab_size=len(env.tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    CausalLMPolicy(GPT2LMHeadModel(config), env.tokenizer).save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    for usual, less in (
        ("num_envs=32", "num_envs=4"),
        ("batch_size=768", "batch_size=96"),
        ("batch_size=320", "batch_size=40"),
        ("100_000", "100"),
        ("episodes_per_iteration=64", "episodes_per_iteration=4, minibatch_size=2"),
        ("total_episodes=6400", "total_episodes=4"),
        ("num_prompts=256", "num_prompts=8"),
    ):
        code = code.replace(usual, less)
    namespace: dict = {}
    exec(code, namespace)
    assert namespace.get("model", namespace.get("algorithm")).num_timesteps >= 100
