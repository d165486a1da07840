"""The tabular policy: sampling and judging speak of the same distribution, the one in its table."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import evaluate_with_both
from gymnasium.vector import AutoresetMode

import textgym  # noqa: F401
from agents.evaluation import evaluate
from agents.policy.tabular import TabularPolicy
from agents.rollout import collect
from textgym.decoding import Decoding
from textgym.tasks.lock import CombinationLock

LOCK = CombinationLock(6, 5, fork=True)
P, T = 3, LOCK.length


def random_policy(seed=0, dtype=torch.float32, **arguments):
    policy = TabularPolicy.for_lock(LOCK, **arguments).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in policy.parameters():
            table.copy_(torch.randn(table.shape, generator=generator))
    return policy


def observations(count, seed=0):
    """One prompt token at the right end of P columns, then a prefix that mostly follows an ending, then padding."""
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(0, 6, (count, P + T)), np.zeros((count, P + T), np.int8)
    prefix_lengths = rng.integers(0, T, count)
    for row, length in enumerate(prefix_lengths):
        ending, _ = LOCK.endings[rng.integers(2)]
        ids[row, P : P + length] = ending[:length]
        if length and rng.random() < 0.3:
            ids[row, P + rng.integers(length)] = rng.integers(1, 6)
        mask[row, P - 1 : P + length] = 1
    return ids, mask, prefix_lengths


def written(policy, ids, mask, prefix_lengths, seeds, **arguments):
    """Sample to the end: the filled ids and mask, the columns written to, log-probabilities and values there."""
    ids, mask = ids.copy(), mask.copy()
    columns, log_probs, values = np.full(ids.shape, -1), np.zeros(ids.shape), np.zeros(ids.shape)
    lengths = prefix_lengths.copy()
    observation = {"input_ids": ids.copy(), "attention_mask": mask.copy()}
    sampler = policy.sampler(observation, seeds=seeds, max_new_tokens=T, prefix_lengths=prefix_lengths, **arguments)
    while len(sampler.rows):
        rows, sample = sampler.rows, sampler.sample()
        column = P + lengths[rows]
        ids[rows, column], mask[rows, column], columns[rows, column] = sample.tokens.numpy(), 1, column
        log_probs[rows, column], values[rows, column] = sample.log_probs.numpy(), sample.values.numpy()
        lengths[rows] += 1
        sampler.keep((sample.tokens.numpy() != 0) & (lengths[rows] < T))
    return *map(torch.from_numpy, (ids, mask, columns)), log_probs, values


def plain(policy, ids, mask, columns):
    """Decision by decision, from the tables and the lock's own idea of a state."""
    results = np.zeros((4, *columns.shape))
    for (row, entry), column in np.ndenumerate(columns.numpy()):
        if column >= 0:
            text = [int(ids[row, c]) for c in range(column) if mask[row, c]][1:]
            state = LOCK._state(text)
            log_probs = policy.logits[state].log_softmax(0)
            judged = log_probs[ids[row, column]], -(log_probs.exp() * log_probs).sum()
            results[:, row, entry] = [*judged, policy.value_table[state], policy.guide_value_table[state]]
    return results


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling_evaluate_and_the_definition_agree(dtype):
    policy = random_policy(dtype=dtype, decoding=Decoding(top_k=4, temperature=1.3, min_new_tokens=2))
    ids, mask, prefix_lengths = observations(60)
    ids, mask, columns, log_probs, values = written(policy, ids, mask, prefix_lengths, np.arange(60))
    finished = mask[:, P:].sum(1)
    assert (finished < T).any()
    assert (finished == T).any()
    assert not (ids[:, P : P + 2] == 0)[mask[:, P : P + 2] == 1].any()
    judged = policy.evaluate_actions(ids, mask, columns)
    assert all(part.dtype == dtype for part in judged)
    np.testing.assert_allclose(judged.log_probs, log_probs, atol=1e-6)
    np.testing.assert_allclose(judged.values, values, atol=1e-6)
    both = evaluate_with_both(policy, ids, mask, columns)
    np.testing.assert_allclose(both, plain(policy, ids, mask, columns), atol=1e-6)
    for of, expected in zip(("policy", "guide"), both[2:], strict=True):
        assert torch.equal(policy.values(ids, mask, columns, of), expected)


@torch.no_grad()
def test_values_after_the_last_token():
    policy = random_policy()
    texts = torch.tensor([ending for ending, _ in LOCK.endings])
    ids = torch.cat([torch.ones(2, 1, dtype=torch.int64), texts], 1)
    states_after = ids, torch.ones_like(ids), torch.tensor([[1, 6, -1], [6, -1, 3]])
    values, guide_values = (policy.values(*states_after, of) for of in ("policy", "guide"))
    states = torch.tensor([[0, 5, 0], [10, 0, 7]])  # of two paths of five
    there = torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert torch.equal(values, policy.value_table[states] * there)
    assert torch.equal(guide_values, policy.guide_value_table[states] * there)


@torch.no_grad()
def test_neither_padding_nor_neighbours_change_anything():
    policy = random_policy()
    ids, mask, prefix_lengths = observations(30, seed=1)
    seeds = np.arange(30) * 7
    together = written(policy, ids, mask, prefix_lengths, seeds)
    noise = np.where(mask, ids, np.random.default_rng(5).integers(0, 6, ids.shape))
    refilled = written(policy, noise, mask, prefix_lengths, seeds)
    valid = together[1] == 1
    assert torch.equal(refilled[0][valid], together[0][valid])
    assert torch.equal(refilled[1], together[1])
    judged = torch.stack(policy.evaluate_actions(*together[:3]))
    assert torch.equal(torch.stack(policy.evaluate_actions(*refilled[:3])), judged)
    for row in range(30):
        only = slice(row, row + 1)
        alone = written(policy, ids[only], mask[only], prefix_lengths[only], seeds[only])
        assert torch.equal(alone[0][valid[only]], together[0][only][valid[only]])
        padded = [torch.nn.functional.pad(part[only], (2, 3)) for part in together[:2]]
        shifted = torch.where(together[2][only] >= 0, together[2][only] + 2, -1)
        assert torch.equal(torch.stack(policy.evaluate_actions(*padded, shifted)), judged[:, only])


@torch.no_grad()
def test_frequencies_are_the_softmax():
    policy, count = random_policy(), 20_000
    for ending, _ in LOCK.endings:
        ids = np.tile([1, *ending[:2]], (count, 1))
        sampler = policy.sampler(
            {"input_ids": ids, "attention_mask": np.ones_like(ids)},
            seeds=np.arange(count),
            max_new_tokens=T,
            prefix_lengths=np.full(count, 2),
        )
        frequencies = np.bincount(sampler.sample().tokens, minlength=6) / count
        expected = policy.logits[LOCK._state(ending[:2])].softmax(0)
        np.testing.assert_allclose(frequencies, expected, atol=4 * 0.5 / np.sqrt(count))


def test_gradients_reach_the_visited_states_of_every_table():
    policy = random_policy(dtype=torch.float64)
    ids = torch.tensor([[1, *LOCK.endings[0][0]]])
    evaluate_with_both(policy, ids, torch.ones_like(ids), torch.tensor([[1, -1, 3]])).sum().backward()
    assert policy.logits.grad.abs().sum(1).nonzero().squeeze(1).tolist() == [0, 2]
    for table in (policy.value_table, policy.guide_value_table):
        assert table.grad.nonzero().squeeze(1).tolist() == [0, 2]


def test_what_a_policy_earns_is_its_closed_form():
    policy, count = random_policy(), 1500
    with torch.no_grad():  # on the better path, mostly
        for depth, symbol in enumerate(LOCK.endings[1][0]):
            policy.logits[LOCK._state(LOCK.endings[1][0][:depth]), symbol] += 5
        expected = LOCK.value(lambda prefix: policy.logits[LOCK._state(prefix)].softmax(0))
    env = gym.make_vec(
        "textgym/CombinationLock-v0",
        num_envs=count,
        vocab_size=6,
        length=5,
        fork=True,
        parking=True,
        autoreset_mode=AutoresetMode.DISABLED,
    ).unwrapped
    rewards = collect(env, policy, seeds=np.arange(count)).rewards
    assert expected > 0.3
    assert float(rewards.mean()) == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(count))
    assert evaluate(policy, env, decoding=Decoding(greedy=True)).reward == 1.0


def test_an_untrained_policy_is_uniform():
    assert not any(table.any() for table in TabularPolicy.for_lock(LOCK).parameters())


def test_predict_and_generate():
    policy = random_policy(decoding=Decoding(min_new_tokens=3))
    ids, mask, _ = observations(8)
    mask[5] = 0  # an idle row
    actions, state = policy.predict({"input_ids": ids, "attention_mask": mask})
    assert actions.shape == (8,)
    assert actions[5] == 0
    assert (np.delete(actions, 5) > 0).all()
    assert state.tolist() == [1] * 8
    single, state = policy.predict({"input_ids": ids[0], "attention_mask": mask[0]}, deterministic=True)
    assert single.shape == ()
    assert state.tolist() == [1]
    texts = policy.generate(["s1", "s2"], max_new_tokens=T, seed=1)
    assert texts == policy.generate(["s1", "s2"], max_new_tokens=T, seed=1)
    assert policy.generate([], max_new_tokens=T) == []
    assert all(3 <= len(text.split()) <= T for text in texts)
    greedy = policy.generate(["s1"], max_new_tokens=1, decoding=Decoding(greedy=True, min_new_tokens=1))
    assert greedy == [f"s{int(policy.logits[0, 1:].argmax()) + 1}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load_give_the_same_policy(tmp_path, dtype):
    policy = random_policy(dtype=dtype, decoding=Decoding(temperature=0.7))
    for _ in range(2):  # the second replaces the first
        policy.save_pretrained(tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    again = TabularPolicy.from_pretrained(tmp_path / "policy", states=policy.states, device="cpu")
    for name, table in policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], table)
        assert again.state_dict()[name].dtype == dtype
    assert again.decoding == policy.decoding
    assert again.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="states must be given"):
        TabularPolicy.from_pretrained(tmp_path / "policy")
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtype'"):
        TabularPolicy.from_pretrained(tmp_path / "policy", states=policy.states, dtype=torch.float32)
    with pytest.raises(ValueError, match="path must be a folder written by"):
        TabularPolicy.from_pretrained(tmp_path, states=policy.states)
    for file in ("tables.safetensors", "policy.json"):
        content = (tmp_path / "policy" / file).read_bytes()
        (tmp_path / "policy" / file).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"policy/{file} is damaged"):
            TabularPolicy.from_pretrained(tmp_path / "policy", states=policy.states)
        (tmp_path / "policy" / file).write_bytes(content)


def test_what_does_not_fit_is_refused():
    policy = random_policy()
    ids, mask, _ = (torch.from_numpy(part) for part in observations(2))
    with pytest.raises(ValueError, match="cannot hand off"):
        policy.evaluate_actions(ids, mask, torch.full((2, 1), P), torch.ones(2, 1, dtype=torch.bool))
    for column in (0, P - 1):  # padding, and the prompt's first token
        with pytest.raises(ValueError, match="columns must hold -1 or columns"):
            policy.evaluate_actions(ids, mask, torch.full((2, 1), column))
    observation = {"input_ids": ids, "attention_mask": mask}
    sampler = policy.sampler(observation, seeds=np.arange(2), max_new_tokens=0)
    with pytest.raises(ValueError, match="more than max_new_tokens"):
        sampler.sample()
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        sampler.keep([1, 0])
    sampler.keep([False, False])
    with pytest.raises(ValueError, match="all rows have left"):
        sampler.sample()
