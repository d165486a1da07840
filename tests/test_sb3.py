"""Stable-Baselines3's PPO and ours, with one network, one batch and one set of hyperparameters, take the same step."""

from __future__ import annotations

import copy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from conftest import ENV_ID, HORIZON, PROMPT_TOKENS
from stable_baselines3.common.logger import configure

from agents import PPO
from agents.sb3 import CausalLMActorCriticPolicy, TextVecEnv
from textgym.decoding import Decoding


@pytest.mark.parametrize(("gamma", "gae_lambda", "clip_range"), [(1.0, 0.95, 0.2), (0.9, 0.5, 0.02)])
def test_one_update_of_stable_baselines3_is_one_of_ours(gamma, gae_lambda, clip_range, make_env, make_policy):
    rows, policy = 8, make_policy()
    torch.nn.init.normal_(policy.heads["value"].weight, std=0.1)
    hyperparameters = {
        "gamma": gamma,
        "gae_lambda": gae_lambda,
        "clip_range": clip_range,
        "clip_range_vf": None,
        "ent_coef": 0.03,
        "n_epochs": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.5,
        "device": "cpu",
    }
    ours = PPO(
        policy,
        make_env(rows),
        episodes_per_iteration=rows,
        minibatch_size=rows,
        kl_coef=0.0,
        vf_coef=0.4,
        normalize_advantage=False,
        decoding=Decoding(min_new_tokens=HORIZON),
        **hyperparameters,
    )
    rollout = ours.play()
    assert rollout.body.all()
    credit = ours.credit(rollout, ours.reference_log_probs(rollout))
    noise = 0.1 * torch.randn(rows, HORIZON, generator=torch.Generator().manual_seed(0))
    credit = replace(credit, log_probs=credit.log_probs + noise)

    network = copy.deepcopy(policy)
    theirs = stable_baselines3.PPO(
        CausalLMActorCriticPolicy,
        TextVecEnv(gym.make_vec(ENV_ID, num_envs=rows, tokenizer=policy.tokenizer)),
        policy_kwargs={"model": network},
        n_steps=HORIZON,
        batch_size=rows * HORIZON,
        normalize_advantage=False,
        vf_coef=0.2,  # of a loss without our half
        **hyperparameters,
    )
    theirs.set_logger(configure(None, []))
    buffer, rewards = theirs.rollout_buffer, rollout.rewards.numpy()
    written = np.arange(PROMPT_TOKENS + HORIZON)
    for step in range(HORIZON):
        before = written < PROMPT_TOKENS + step
        buffer.add(
            {
                "input_ids": np.where(before, rollout.input_ids, 0),
                "attention_mask": np.where(before, rollout.attention_mask, 0),
            },
            rollout.input_ids[:, PROMPT_TOKENS + step].numpy(),
            rewards * (step == HORIZON - 1),
            np.full(rows, step == 0),
            credit.values[:, step],
            credit.log_probs[:, step],
        )
    buffer.compute_returns_and_advantage(torch.full((rows,), 77.0), np.ones(rows))
    np.testing.assert_allclose(buffer.advantages.T, credit.advantages, atol=1e-5)
    np.testing.assert_allclose(buffer.returns.T, credit.returns, atol=1e-5)

    theirs.train()
    said = theirs.logger.name_to_value
    losses = ours.update(rollout, credit)
    assert losses["policy_loss"] == pytest.approx(said["train/policy_gradient_loss"], abs=1e-5)
    assert losses["entropy"] == pytest.approx(-said["train/entropy_loss"], abs=1e-5)
    assert 2 * losses["value_loss"] == pytest.approx(said["train/value_loss"], abs=1e-5)
    assert losses["loss"] == pytest.approx(said["train/loss"], abs=1e-5)
    assert losses["approx_kl"] == pytest.approx(said["train/approx_kl"], abs=1e-5)
    assert losses["clip_fraction"] == pytest.approx(said["train/clip_fraction"], abs=1e-5)
    assert 0 < losses["clip_fraction"] < 1
    assert losses["value_loss"] > 1e-3
    moved = 0.0
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter, network.get_parameter(name), rtol=0, atol=1e-5, msg=name)
        moved = max(moved, (parameter - ours.reference.get_parameter(name)).abs().max().item())
    assert moved > 5e-4, "the step is much larger than the tolerance"
