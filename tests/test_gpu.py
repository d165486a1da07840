"""The same numbers on a CUDA device; skipped without one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_models import CAUSAL, FAMILIES, PRECISIONS, differences, iterate, policy_in, policy_of

from agents import ALGORITHMS, CausalLMPolicy, evaluate
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
    judged = gpu.evaluate_actions(
        rollouts[1].input_ids, rollouts[1].attention_mask, rollouts[1].columns(rollouts[1].body)
    )
    torch.testing.assert_close(judged.log_probs, rollouts[1].log_probs, atol=1e-4, rtol=0)


def test_half_precision_and_compiled_code_are_near_the_cpu(make_env, make_policy):
    exact = make_policy()
    fast = CausalLMPolicy(copy.deepcopy(exact.model), exact.tokenizer, autocast="auto", compile=True).to("cuda")
    rollout = collect(make_env(16), fast, seeds=np.arange(16, dtype=np.uint64), reset_seed=0)
    batch = rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.body)
    expected = exact.evaluate_actions(*(tensor.cpu() for tensor in batch))
    for log_probs in (rollout.log_probs, fast.evaluate_actions(*batch).log_probs):
        torch.testing.assert_close(log_probs.cpu(), expected.log_probs, atol=0.05, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_as_near_to_transformers_as_rounding_allows(name, precision):
    policy = policy_in(precision, name)
    assert all(differences(policy.to("cuda"), policy_of(name)).near())
    for before, after in iterate(name, precision, device="cuda"):
        assert after.isfinite().all()
        assert not torch.equal(before, after)


@pytest.mark.parametrize("name", CAUSAL)
def test_compiled_code_of_every_family_is_near_too(name):
    policy = policy_in("bfloat16 autocast", name, compile=True)
    assert all(differences(policy.to("cuda"), policy_of(name)).near())


@pytest.mark.parametrize("name", [*sorted(ALGORITHMS), "ppo with a hand-off"])
def test_algorithms_train_on_the_device_and_resume_exactly(name, make_env, make_policy, tmp_path):
    guide = "references" if name == "dr-po" else LocalGuide(make_policy(1).model, device="cuda")
    handoff = name.endswith("hand-off")
    env = make_env(4) if name == "sl" else make_env(16, guide=guide, handoff=handoff)
    policy = make_policy()
    if handoff:
        policy = CausalLMPolicy(policy.model, policy.tokenizer, handoff_prob=0.2)
    agent = ALGORITHMS[name.split()[0]](policy, env, episodes_per_iteration=16, device="cuda")
    agent.learn(total_episodes=16)
    agent.save(tmp_path / "checkpoint")
    loaded = type(agent).load(tmp_path / "checkpoint", env, device="cuda")
    for kind, model in {"policy": agent.policy, **agent.models()}.items():
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        other = loaded.policy if kind == "policy" else loaded.models()[kind]
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    loaded.learn(total_episodes=16)
    assert loaded.iteration == 2
    assert np.isfinite(loaded.history[-1]["loss"])


def test_hand_offs_and_their_judgement_equal_the_cpu(make_env, make_policy):
    rollouts = []
    for device in ("cpu", "cuda"):
        base = make_policy()
        policy = CausalLMPolicy(base.model, base.tokenizer, handoff_prob=0.3).to(device)
        env = make_env(16, guide=LocalGuide(make_policy(1).model, device=device), handoff=True)
        rollout = collect(env, policy, seeds=np.arange(16, dtype=np.uint64), reset_seed=0)
        columns = rollout.columns(rollout.decisions)
        judged = policy.evaluate_actions(rollout.input_ids, rollout.attention_mask, columns, rollout.handoffs)
        torch.testing.assert_close(judged.log_probs, rollout.log_probs, atol=1e-4, rtol=0)
        rollouts.append(rollout)
    cpu, gpu = rollouts
    assert cpu.handoffs.any()
    assert torch.equal(cpu.handoffs, gpu.handoffs.cpu())
    assert torch.equal(cpu.input_ids, gpu.input_ids.cpu())
    torch.testing.assert_close(cpu.log_probs, gpu.log_probs.cpu(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sl", "ppo", "ppo++"])
def test_what_was_trained_there_can_be_evaluated(name, make_env, make_policy):
    guide = LocalGuide(make_policy(1).model, device="cuda")
    env = make_env(4) if name == "sl" else make_env(16, guide=guide)
    agent = ALGORITHMS[name](make_policy(), env, episodes_per_iteration=16, device="cuda")
    agent.learn(total_episodes=16)
    assert np.isfinite(evaluate(agent, make_env(8)).reward)
