"""Stable-Baselines3 and sb3-contrib run on every environment as it is, and on the native batch."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch

import textgym  # noqa: F401
from agents.sb3 import TextVecEnv

IDS = ["textgym/IMDB-v0", "textgym/CommonGen-v0", "textgym/TLDR-v0", "textgym/CombinationLock-v0"]
ON_POLICY = {"n_steps": 16}
MINIBATCHES = {**ON_POLICY, "batch_size": 16}
CLASSES = {
    "PPO": (stable_baselines3.PPO, {**MINIBATCHES, "n_epochs": 1}),
    "A2C": (stable_baselines3.A2C, ON_POLICY),
    "DQN": (stable_baselines3.DQN, {"buffer_size": 200, "learning_starts": 8, "batch_size": 8}),
    "QRDQN": (sb3_contrib.QRDQN, {"buffer_size": 200, "learning_starts": 8, "batch_size": 8}),
    "TRPO": (sb3_contrib.TRPO, {**MINIBATCHES, "cg_max_steps": 2}),
    "MaskablePPO": (sb3_contrib.MaskablePPO, {**MINIBATCHES, "n_epochs": 1}),
}
TINY = {"seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [8]}}


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("name", CLASSES)
def test_algorithms_run_out_of_the_box(name, id, tmp_path):
    algorithm, arguments = CLASSES[name]
    masked = {}
    if name == "MaskablePPO":
        plain = gym.make(id).unwrapped
        end = plain.tokenizer.eos_token_id
        masked = {"min_new_tokens": 4, "banned_tokens": [*{*range(plain.action_space.n)} - {end, 5, 7}]}
    envs = TextVecEnv(gym.make_vec(id, num_envs=2, **masked))
    model = algorithm("MultiInputPolicy", gym.make(id, **masked), **arguments, **TINY)
    for env in (model.get_env(), envs):
        model = algorithm("MultiInputPolicy", env, **arguments, **TINY)
        before = torch.cat([parameter.flatten() for parameter in model.policy.parameters()])
        model.learn(80)
        after = torch.cat([parameter.flatten() for parameter in model.policy.parameters()])
        assert torch.isfinite(after).all()
        assert (before != after).any()
    obs = envs.reset()
    actions, _ = model.predict(obs, deterministic=True)
    assert envs.action_space.contains(np.int64(actions[0]))
    model.save(tmp_path / "model")
    again, _ = algorithm.load(tmp_path / "model").predict(obs, deterministic=True)
    np.testing.assert_array_equal(actions, again)
    if masked:
        buffer, columns = model.rollout_buffer, envs.env.max_prompt_tokens
        written = buffer.observations["attention_mask"][..., columns:].sum(-1).flatten()
        assert {*np.unique(buffer.actions)} == {end, 5, 7}
        assert written[buffer.actions.flatten() == end].min() == 4
