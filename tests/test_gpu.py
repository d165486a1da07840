"""The same numbers on a CUDA device; skipped without one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from agents import ALGORITHMS, evaluate
from agents.rollout import collect
from textgym.guides.local import LocalGuide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_cached_sampling_and_evaluation_equal_the_cpu(make_env, make_policy):
    cpu, gpu = make_policy(), copy.deepcopy(make_policy()).to("cuda")
    rollouts = [
        collect(make_env(16), policy, seeds=np.arange(16, dtype=np.uint64), reset_seed=0) for policy in (cpu, gpu)
    ]
    assert rollouts[1].input_ids.device.type == "cuda"
    assert torch.equal(rollouts[0].input_ids, rollouts[1].input_ids.cpu())
    torch.testing.assert_close(rollouts[0].log_probs, rollouts[1].log_probs.cpu(), atol=1e-4, rtol=0)
    judged = gpu.evaluate(rollouts[1].input_ids, rollouts[1].attention_mask, rollouts[1].columns(rollouts[1].body))
    torch.testing.assert_close(judged.log_probs, rollouts[1].log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sl", "ppo", "ppo++"])
def test_algorithms_train_on_the_device(name, make_env, make_policy):
    guide = LocalGuide(make_policy(1).model, device="cuda")
    env = make_env(4) if name == "sl" else make_env(16, guide=guide)
    agent = ALGORITHMS[name](make_policy(), env, episodes_per_iteration=16, device="cuda")
    agent.learn(total_episodes=32)
    assert {parameter.device.type for parameter in agent.policy.parameters()} == {"cuda"}
    assert np.isfinite(evaluate(agent, make_env(8)).reward)
