"""Algorithms of Stable-Baselines3 behind the interface of ours: same start, same objective, same evaluation."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
from conftest import HORIZON, WORDS

from agents import PPO as OurPPO
from agents import CausalLMPolicy, evaluate
from agents.sb3 import MaskableCausalLMActorCriticPolicy, SB3Algorithm, SB3Policy
from agents.sb3.algorithm import CLASS_FILE
from textgym import Guidance
from textgym.decoding import Decoding

ROWS = 16
PPO = SB3Algorithm.of(stable_baselines3.PPO)


class ShyPPO(stable_baselines3.PPO):
    """A user's own algorithm, with a constructor that names nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


def a_few_words(requests):
    return [f" {WORDS[request.seed % 12]}" * (1 + request.seed % 4) for request in requests]


def make_ppo(make_policy, make_env, **arguments):
    return PPO(make_policy(), make_env(ROWS), **{"episodes_per_iteration": 2 * ROWS, "minibatch_size": 8, **arguments})


@pytest.mark.parametrize(
    "sb3_class", [stable_baselines3.PPO, stable_baselines3.A2C, sb3_contrib.TRPO, sb3_contrib.MaskablePPO, ShyPPO]
)
def test_actor_critics_train_the_policy_and_are_judged_like_others(sb3_class, make_policy, make_env):
    policy = make_policy()
    before = copy.deepcopy(policy)
    env = make_env(ROWS, guide=a_few_words, guidance=Guidance(restart_prob=0.5, handoff_prob=0.3))
    algorithm = SB3Algorithm.of(sb3_class)(policy, env, episodes_per_iteration=2 * ROWS, minibatch_size=8, seed=1)
    assert isinstance(algorithm.model, sb3_class)
    seen = []
    algorithm.learn(total_episodes=3 * ROWS, callback=lambda scope, _: seen.append(scope["record"]["reward"]))
    assert algorithm.policy is policy
    assert (policy.model.lm_head.weight != before.model.lm_head.weight).any()
    assert [record["iteration"] for record in algorithm.history] == list(range(1, len(seen) + 1))
    assert [record["reward"] for record in algorithm.history] == seen
    last = algorithm.history[-1]
    assert last["num_episodes"] == algorithm.num_episodes >= 3 * ROWS
    assert last["num_timesteps"] == algorithm.num_timesteps == algorithm.model.num_timesteps
    assert last["num_guide_tokens"] == algorithm.num_guide_tokens > 0
    finished = sum(record["policy_tokens"] for record in algorithm.history)
    assert finished <= algorithm.num_timesteps < finished + ROWS * HORIZON, "all steps but those of running episodes"
    assert last["seconds"] > 0
    assert np.isfinite(last["kl_per_token"])
    assert json.loads(json.dumps(algorithm.history)) == algorithm.history
    result = evaluate(algorithm, env.spec.id, num_prompts=8)
    assert result.task == "words"
    assert 0 <= result.reward <= 1


def test_the_hand_off_is_learned_too(make_policy, make_env):
    policy = make_policy()
    policy = CausalLMPolicy(policy.model, policy.tokenizer, handoff_prob=0.2)
    env = make_env(ROWS, guide=a_few_words, handoff=True, handoff_cost=0.01)
    algorithm = PPO(policy, env, episodes_per_iteration=ROWS, minibatch_size=8)
    before = policy.heads["handoff"].weight.clone()
    algorithm.learn(total_episodes=2 * ROWS)
    assert (policy.heads["handoff"].weight != before).any()
    assert algorithm.history[0]["handoff_fraction"] > 0
    assert algorithm.history[0]["reward/handoff_cost"] < 0
    assert algorithm.num_guide_tokens > 0


def test_arguments_are_translated_and_the_algorithms_own_win(make_policy, make_env):
    model = make_ppo(make_policy, make_env, n_epochs=3, learning_rate=2e-4, gamma=0.9).model
    assert (model.n_steps, model.batch_size) == (2 * HORIZON, 8 * HORIZON)
    assert (model.n_epochs, model.learning_rate, model.gamma) == (3, 2e-4, 0.9)
    model = make_ppo(make_policy, make_env, n_steps=3, batch_size=24).model
    assert (model.n_steps, model.batch_size) == (3, 24)
    a2c = SB3Algorithm.of(stable_baselines3.A2C)(make_policy(), make_env(ROWS), episodes_per_iteration=ROWS)
    assert a2c.model.n_steps == 5, "its own default, which is no more than an iteration"
    maskable = SB3Algorithm.of(sb3_contrib.MaskablePPO)(
        make_policy(), make_env(ROWS), episodes_per_iteration=ROWS, policy_kwargs={"top_p": 0.9}
    )
    assert isinstance(maskable.model.policy, MaskableCausalLMActorCriticPolicy)
    assert maskable.model.policy.top_p == 0.9
    assert PPO.name == "stable_baselines3:PPO"
    with pytest.raises(TypeError, match="nonsense"):
        make_ppo(make_policy, make_env, nonsense=1)
    for name, value in (("kl_coef", -1), ("minibatch_size", 0), ("n_epochs", 0), ("eval_every", -1)):
        with pytest.raises(ValueError, match=name):
            make_ppo(make_policy, make_env, **{name: value})
    with pytest.raises(ValueError, match="sb3_class"):
        SB3Algorithm.of(dict)
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        SB3Algorithm.of(sb3_contrib.RecurrentPPO)(make_policy(), make_env(ROWS), episodes_per_iteration=ROWS)
    searching = make_policy()
    searching.decoding = Decoding(num_beams=2)
    with pytest.raises(ValueError, match="decoding must have num_beams=1 for training"):
        PPO(searching, make_env(ROWS), episodes_per_iteration=ROWS)


def test_a_run_hangs_on_its_seed_alone(make_policy, make_env):
    def run(seed, disturbed=False):
        algorithm = make_ppo(make_policy, make_env, seed=seed)

        def callback(*_):
            if disturbed:
                torch.rand(3)
                np.random.rand(3)  # noqa: NPY002

        algorithm.learn(total_episodes=4 * ROWS, callback=callback)
        return [record["reward"] for record in algorithm.history], algorithm.policy.model.lm_head.weight

    rewards, weights = run(0)
    again, same_weights = run(0, disturbed=True)
    assert rewards == again
    assert torch.equal(weights, same_weights)
    assert run(1)[0] != rewards


def test_schedules_go_over_all_iterations(make_policy, make_env):
    algorithm = make_ppo(make_policy, make_env, learning_rate=lambda progress: 1e-3 * progress)
    algorithm.learn(total_episodes=8 * ROWS)
    rates = [record["learning_rate"] for record in algorithm.history]
    starts = [0, *(record["num_episodes"] for record in algorithm.history[:-1])]
    np.testing.assert_allclose(rates, [1e-3 * (1 - start / (8 * ROWS)) for start in starts])


def test_checkpoints_are_model_folders_that_can_be_resumed(make_policy, make_env, tmp_path):
    arguments = {"eval_every": 1, "eval_prompts": 8, "output_dir": tmp_path, "kl_coef": 0.1, "seed": 2}
    algorithm = make_ppo(make_policy, make_env, **arguments)
    algorithm.learn(total_episodes=2 * ROWS)
    assert "eval/reward" in algorithm.history[0]
    assert (tmp_path / "best" / "model.safetensors").is_file()
    loaded = PPO.load(tmp_path / "last", make_env(ROWS))
    assert loaded.history == algorithm.history
    assert (loaded.num_episodes, loaded.num_timesteps) == (algorithm.num_episodes, algorithm.num_timesteps)
    for name, value in algorithm.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value), name
    reference = make_policy().state_dict()
    for name, value in loaded.models()["reference"].state_dict().items():
        assert torch.equal(reference[name], value), name
    ours, theirs = (agent.optimizer.state_dict()["state"] for agent in (loaded, algorithm))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key]["exp_avg"], theirs[key]["exp_avg"]) for key in ours)
    loaded.learn(total_episodes=2 * ROWS)
    assert loaded.iteration == len(loaded.history) == 2 * algorithm.iteration
    # New episodes, not those of the beginning again
    assert (loaded.env.get_state()["episode"] > algorithm.env.get_state()["episode"]).all()


def test_dqn_learns_its_own_network_and_is_judged_by_what_it_predicts(make_policy, make_env, tmp_path, monkeypatch):
    dqn = SB3Algorithm.of(stable_baselines3.DQN)
    arguments = {"buffer_size": 500, "learning_starts": 10, "target_update_interval": 50, "output_dir": tmp_path}
    algorithm = dqn(make_policy(), make_env(ROWS), episodes_per_iteration=ROWS, n_epochs=3, **arguments)
    algorithm.learn(total_episodes=4 * ROWS)
    assert isinstance(algorithm.policy, SB3Policy)
    assert algorithm.num_episodes >= 4 * ROWS
    assert algorithm.model._n_updates > 0
    env = make_env(8, split="test")
    result = evaluate(algorithm, env)
    assert len(result.rewards) == 37
    assert 0 <= result.reward <= 1
    # What was written is what the network predicts of each state.
    observation, _ = env.reset(options={"index": result.sample_ids[:8].tolist()})
    written = []
    for _ in range(HORIZON):
        actions, _ = algorithm.model.predict(observation, deterministic=True)
        written.append(actions)
        observation, *_ = env.step(actions)
    for row, tokens in enumerate(result.token_ids[:8]):
        assert tokens == np.array(written)[: len(tokens), row].tolist()
    again = SB3Policy.from_pretrained(tmp_path / "last")
    np.testing.assert_array_equal(evaluate(again, make_env(8, split="test")).rewards, result.rewards)
    assert type(again.model) is stable_baselines3.DQN
    with pytest.raises(ValueError, match="SB3Policy"):
        SB3Policy.from_pretrained(tmp_path)
    # A folder that was written elsewhere, or changed since, can run code.
    shutil.copytree(tmp_path / "last", tmp_path / "changed")
    (tmp_path / "changed" / CLASS_FILE).write_text('{"module": "antigravity", "class": "fly"}')
    with pytest.raises(ValueError, match=r"trusted must be True .* can run any code"):
        SB3Policy.from_pretrained(tmp_path / "changed")
    monkeypatch.setattr("agents.sb3.algorithm._WRITTEN", set())
    with pytest.raises(ValueError, match="trusted"):
        SB3Policy.from_pretrained(tmp_path / "last")
    assert type(SB3Policy.from_pretrained(tmp_path / "last", trusted=True).model) is stable_baselines3.DQN
    with pytest.raises(ValueError, match="which only writes"):
        OurPPO(again, make_env(8))


def test_reward_rises(make_policy, make_env):
    policy = make_policy()
    before = evaluate(policy, make_env(22, split="validation"), decoding=Decoding(), metrics=()).reward
    algorithm = PPO(
        policy, make_env(32), episodes_per_iteration=32, minibatch_size=8, learning_rate=3e-3, kl_coef=0.0, seed=0
    )
    algorithm.learn(total_episodes=15 * 32)
    after = evaluate(algorithm, make_env(22, split="validation"), metrics=()).reward
    assert after > before + 0.3
