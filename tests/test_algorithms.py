"""What all algorithms promise: reproducible, exactly resumable, clear when something is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker

from agents import ALGORITHMS, PPO, SL, PPOPlusPlus
from agents.supervised import supervised_loss
from textgym.guides import CallableGuide, Completion
from textgym.seeding import hash64

GUIDE = CallableGuide(
    lambda requests: [
        Completion(token_ids=(20 + hash64(r.seed, np.arange(r.max_new_tokens)) % 9).astype(int).tolist())
        for r in requests
    ]
)


def make_agent(name, make_env, make_policy, **arguments):
    if name == "sl":
        return SL(make_policy(), make_env(4), episodes_per_iteration=16, learning_rate=3e-3, **arguments)
    guide = "references" if name == "dr-po" else GUIDE
    return ALGORITHMS[name](make_policy(), make_env(8, guide=guide), episodes_per_iteration=16, **arguments)


def numbers(history):
    """A history without its clocks."""
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in history]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_seed_decides_the_history_to_the_bit(name, make_env, make_policy):
    histories = []
    for seed in (3, 3, 4):
        agent = make_agent(name, make_env, make_policy, seed=seed, eval_every=2, eval_prompts=8)
        histories.append(numbers(agent.learn(total_episodes=48).history))
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_saving_and_loading_changes_nothing(name, make_env, make_policy, tmp_path):
    arguments = {} if name == "sl" else {"kl_target": 0.1, "target_coef": 0.1}
    whole = make_agent(name, make_env, make_policy, **arguments)
    whole.learn(total_episodes=64)

    part = make_agent(name, make_env, make_policy, **arguments)
    part.learn(total_episodes=32)
    part.save(tmp_path / "checkpoint")
    part.learn(total_episodes=16)  # what happens after a save is not in it
    resumed = type(part).load(tmp_path / "checkpoint", part.env)
    resumed.learn(total_episodes=32)

    assert numbers(resumed.history) == numbers(whole.history)
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name])
    assert resumed.num_timesteps == whole.num_timesteps == sum(r["policy_tokens"] for r in whole.history)


def test_a_checkpoint_of_another_algorithm_is_refused(make_env, make_policy, tmp_path):
    make_agent("ppo", make_env, make_policy).save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="'ppo'"):
        SL.load(tmp_path / "ppo", make_env(4))
    with pytest.raises(ValueError, match="path"):
        PPO.load(tmp_path / "nowhere", make_env(8))


def test_numbers_that_are_not_finite_stop_with_a_clear_error(make_env, make_policy, tmp_path):
    calls = 0

    def exploding(*, prompts, completions, references):
        nonlocal calls
        calls += 1
        return [1e30 if calls == 3 else 0.5] * len(completions)

    env = make_env(16, reward=exploding)
    agent = PPO(make_policy(), env, episodes_per_iteration=16, output_dir=tmp_path / "run", seed=1)
    agent.learn(total_episodes=32)
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    with pytest.raises(FloatingPointError, match="ppo, iteration 3: loss is not finite"):
        agent.learn(total_episodes=32)
    for name, value in agent.policy.state_dict().items():
        assert torch.equal(value, before[name])
    assert [folder.name for folder in (tmp_path / "run").iterdir()] == ["last"]
    assert PPO.load(tmp_path / "run" / "last", env).iteration == 2

    undefined = make_env(16, reward=lambda *, prompts, completions, references: [float("nan")] * len(completions))
    with pytest.raises(ValueError, match="finite") as error:
        PPO(make_policy(), undefined, episodes_per_iteration=16).learn(total_episodes=16)
    assert "iteration 1 of ppo" in error.value.__notes__[0]


class Notebook(GeneralTracker):
    """Keeps what is logged."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **kwargs):
        self.lines.append((step, values))


def test_learning_evaluates_tracks_and_keeps_best_and_last(make_env, make_policy, tmp_path):
    notebook = Notebook()
    agent = PPO(
        make_policy(),
        make_env(16),
        episodes_per_iteration=16,
        learning_rate=3e-3,
        eval_every=2,
        eval_prompts=20,
        output_dir=tmp_path,
        track=[notebook],
    )
    agent.learn(total_episodes=16 * 6)
    judged = {record["iteration"]: record["eval/reward"] for record in agent.history if "eval/reward" in record}
    assert sorted(judged) == [2, 4, 6]
    best = PPO.load(tmp_path / "best", agent.env)
    assert judged[best.iteration] == max(judged.values()) == best.evaluate().reward
    assert PPO.load(tmp_path / "last", agent.env).iteration == 6
    assert [values for _, values in notebook.lines] == agent.history
    assert notebook.config["algorithm"] == "ppo"


def test_totals_and_callbacks_end_learning(make_env, make_policy):
    agent = PPO(make_policy(), make_env(8), episodes_per_iteration=8)
    agent.learn(total_episodes=9)
    assert (agent.num_episodes, agent.iteration) == (16, 2)
    start = agent.num_timesteps
    agent.learn(total_timesteps=60)
    assert agent.num_timesteps - start >= 60 > agent.num_timesteps - start - agent.history[-1]["policy_tokens"]
    before = agent.iteration
    agent.learn(total_episodes=800, callback=lambda scope, _: scope["record"]["iteration"] < before + 2)
    assert agent.iteration == before + 2
    for totals in ({}, {"total_timesteps": 1, "total_episodes": 1}, {"total_episodes": 0}):
        with pytest.raises(ValueError, match="total"):
            agent.learn(**totals)


def test_supervised_learning_stops_at_the_best_validation_loss(make_env, make_policy):
    agent = SL(
        make_policy(),
        make_env(4),
        n_epochs=200,
        episodes_per_iteration=60,
        learning_rate=1e-2,
        patience=3,
        eval_prompts=22,
    )
    start = agent.validation_loss()
    agent.learn()
    losses = [record["validation_loss"] for record in agent.history]
    best = int(np.argmin(losses))
    assert losses[best] < 0.5 * start
    assert len(losses) == best + 1 + 3 < 200
    assert agent.validation_loss() == pytest.approx(losses[best], abs=1e-6)


def test_supervised_loss_is_the_likelihood_of_completions_whatever_the_batch(make_env, make_policy):
    agent = SL(make_policy(), make_env(4), episodes_per_iteration=16)
    examples = agent.validation_examples[:5]
    total, count = 0.0, 0
    for context, target in examples:
        logits = agent.policy.model(torch.tensor([context + target])).logits[0].double().log_softmax(-1)
        total -= sum(logits[len(context) + h - 1, token].item() for h, token in enumerate(target))
        count += len(target)
        assert target[-1] == agent.env.eos_token_id
    assert supervised_loss(agent.policy, examples, 1).item() == pytest.approx(total / count, rel=1e-5)


def test_supervised_learning_reads_every_reference_once_an_epoch(make_env, make_policy):
    agent = SL(make_policy(), make_env(4), episodes_per_iteration=16, n_epochs=2.5)
    count = len(agent.train_pairs)
    order = agent.order(0, round(2.5 * count))
    assert sorted(order[:count]) == sorted(order[count : 2 * count]) == list(range(count))
    assert order[:count].tolist() != order[count : 2 * count].tolist()
    pieces = [agent.order(at, min(at + 16, len(order))) for at in range(0, len(order), 16)]
    assert np.concatenate(pieces).tolist() == order.tolist()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("learning_rate", 0),
        ("gamma", 1.5),
        ("clip_range", -0.1),
        ("kl_coef", -1),
        ("minibatch_size", 0),
        ("episodes_per_iteration", 12),
        ("eval_every", -1),
        ("target_kl", 0),
    ],
)
def test_wrong_arguments_are_named(argument, value, make_env, make_policy):
    with pytest.raises(ValueError, match=argument):
        PPO(make_policy(), make_env(8), **{"episodes_per_iteration": 8, argument: value})


def test_wrong_environments_are_refused(make_env, make_policy):
    with pytest.raises(ValueError, match="parking=True"):
        PPO(make_policy(), make_env(8, parking=False), episodes_per_iteration=8)
    with pytest.raises(ValueError, match="guide"):
        PPOPlusPlus(make_policy(), make_env(8), episodes_per_iteration=8)
