"""The lock's closed forms against enumeration and against what happens, its guide, its states, its errors."""

from __future__ import annotations

import copy
import itertools
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

import textgym  # noqa: F401
from agents.environments import sibling_env
from textgym.guides.base import Guide, GuideRequest
from textgym.tasks.lock import CombinationLock, LockGuide

ID = "textgym/CombinationLock-v0"
SMALL = {"plain": CombinationLock(5, 4, 0.7), "fork": CombinationLock(5, 4, fork=True, combination_seed=3)}


def make_env(num_envs, **arguments):
    return gym.make_vec(
        ID, num_envs=num_envs, parking=True, autoreset_mode=AutoresetMode.DISABLED, **arguments
    ).unwrapped


def arguments_of(lock):
    names = ("vocab_size", "length", "fork", "combination_seed")
    return {name: getattr(lock, name) for name in names} | (
        {} if lock.fork else {"guide_accuracy": lock.guide_accuracy}
    )


def enumerated(lock, probs, prefix):
    """The expected reward over every text that can follow, EOS at any place included."""
    if prefix[-1:] == (0,) or len(prefix) == lock.length:
        text = lock.tokenizer().decode(prefix, skip_special_tokens=True)
        return lock.reward(prompts=["s1"], completions=[text], references=[()])[0]
    return sum(p * enumerated(lock, probs, (*prefix, token)) for token, p in enumerate(probs(prefix)) if p)


@pytest.mark.parametrize("name", SMALL)
def test_closed_forms_equal_enumeration(name, monkeypatch):
    lock = SMALL[name]
    tokenizer = lock.tokenizer()
    monkeypatch.setattr(CombinationLock, "tokenizer", lambda self: tokenizer)  # making one takes its time
    rng = np.random.default_rng(0)
    table = {prefix: rng.dirichlet(np.ones(5)) for n in range(4) for prefix in itertools.product(range(5), repeat=n)}
    ends = [ending for ending, _ in lock.endings]
    for prefix in {(), *(end[:depth] for end in ends for depth in (1, 2)), (1,), (0,), (0, *ends[0][:1]), *ends}:
        expected = enumerated(lock, table.__getitem__, prefix)
        assert lock.value(table.__getitem__, prefix) == pytest.approx(expected, abs=1e-12)
        expected = enumerated(lock, lock.guide_probs, prefix)
        assert lock.guide_value(prefix) == pytest.approx(expected, abs=1e-12)
        if len(prefix) < lock.length and 0 not in prefix:
            assert lock.guide_probs(prefix).sum() == pytest.approx(1)
            assert lock.guide_probs(prefix)[0] == 0
            assert lock.guide_probs(prefix) @ lock.guide_q(prefix) == pytest.approx(expected, abs=1e-12)
    assert lock.guide_q().dtype == lock.guide_probs().dtype == np.float64


def test_the_guide_is_the_one_of_the_definition():
    plain, fork = CombinationLock(), CombinationLock(fork=True)
    ((combination, worth),) = plain.endings
    assert worth == 1
    assert plain.guide_value() == pytest.approx(0.9**10)
    np.testing.assert_allclose(
        plain.guide_probs(combination[:3]), [0, *np.where(np.arange(1, 20) == combination[3], 0.9, 0.1 / 18)]
    )
    np.testing.assert_allclose(plain.guide_probs([combination[0] % 19 + 1]), [0, *[1 / 19] * 19])
    (safe, half), (better, one) = fork.endings
    assert (half, one) == (0.5, 1.0)
    np.testing.assert_allclose(fork.guide_probs()[[safe[0], better[0]]], [0.8, 0.2])
    assert fork.guide_probs(safe[:4])[safe[4]] == 1
    np.testing.assert_allclose(
        fork.guide_probs(better[:4]), [0, *np.where(np.arange(1, 20) == better[4], 0.4, 0.6 / 18)]
    )
    q = fork.guide_q()
    np.testing.assert_allclose(q[[safe[0], better[0]]], [0.5, 0.4**9])
    assert np.flatnonzero(q).size == 2
    assert fork.guide_value() == pytest.approx(0.4 + 0.2 * 0.4**9)


@pytest.mark.parametrize("fork", [False, True])
def test_combinations_are_hashes_of_their_seed(fork):
    seen = set()
    for seed in range(200):
        lock = CombinationLock(4, 3, fork=fork, combination_seed=seed)
        endings = [ending for ending, _ in lock.endings]
        assert all(len(ending) == 3 and all(1 <= symbol < 4 for symbol in ending) for ending in endings)
        assert len({ending[0] for ending in endings}) == len(endings)
        seen.add(tuple(ending[0] for ending in endings))
    assert len(seen) == (6 if fork else 3)  # every first symbol, and every pair of two different ones


@pytest.mark.parametrize("name", SMALL)
def test_what_happens_agrees_with_the_closed_forms(name):
    """The guide writes whole texts, with and without a restart, and finishes what a uniform first token began."""
    lock, n = SMALL[name], 4000
    env = make_env(n, **arguments_of(lock), guidance={"restart_prob": 0.5, "handoff_prob": 1.0, "handoff_length": 0})
    env.reset(seed=0)
    _, rewards, *_ = env.step(np.zeros(n, np.int64))

    def deviates(mean, expected, count):
        return abs(mean - expected) > 4 * np.sqrt(0.3 / count)

    assert lock.guide_value() > 0.2
    assert not deviates(rewards.mean(), lock.guide_value(), n)
    env.reset(seed=1, options={"guidance": {"handoff_prob": 1.0, "handoff_length": 1}})
    actions = np.random.default_rng(0).integers(0, 5, n)
    _, rewards, terminations, _, _ = env.step(actions)
    assert terminations.all()
    for token, q in enumerate(lock.guide_q()):
        mine = actions == token
        assert not deviates(rewards[mine].mean(), q, mine.sum())


def requests(count, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 10, count)
    prefixes = [tuple(rng.integers(1, 20, length).tolist()) for length in lengths]
    return [
        GuideRequest("s1", (1,), "", prefix, int(rng.integers(1, 11 - len(prefix))), int(rng.integers(2**62)))
        for prefix in prefixes
    ]


def test_the_guide_hangs_on_its_request_alone():
    guide, tokenizer = LockGuide(CombinationLock(fork=True)), None
    asked = requests(60)
    together = guide.complete(asked, tokenizer)
    assert isinstance(guide, Guide)
    assert guide.complete([], tokenizer) == []
    assert [guide.complete([request], tokenizer)[0] for request in asked] == together
    assert pickle.loads(pickle.dumps(guide)).complete(asked[::-1], tokenizer) == together[::-1]
    assert copy.deepcopy(guide).complete(asked, tokenizer) == together
    for request, completion in zip(asked, together, strict=True):
        assert len(completion.token_ids) == request.max_new_tokens
        assert all(0 < token < 20 for token in completion.token_ids)
        assert not completion.finished


@pytest.mark.parametrize("name", SMALL)
def test_the_guide_writes_its_probabilities(name):
    lock, count = SMALL[name], 20_000
    for prefix in {(), *(ending[:2] for ending, _ in lock.endings)}:
        asked = [GuideRequest("s1", (1,), "", prefix, 1, seed) for seed in range(count)]
        first = [completion.token_ids[0] for completion in LockGuide(lock).complete(asked, None)]
        frequencies = np.bincount(first, minlength=5) / count
        np.testing.assert_allclose(frequencies, lock.guide_probs(prefix), atol=4 * 0.5 / np.sqrt(count))
        assert (frequencies[lock.guide_probs(prefix) == 0] == 0).all()


@given(data=st.data(), fork=st.booleans(), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_states_equal_an_obvious_twin(data, fork, seed):
    lock = CombinationLock(5, 4, fork=fork, combination_seed=seed)
    endings = [ending for ending, _ in lock.endings]
    width = data.draw(st.integers(0, 6))
    rows = []
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.sampled_from(endings))[: data.draw(st.integers(0, width))]
        rest = width - len(start)
        rows.append([*start, *data.draw(st.lists(st.integers(0, 4), min_size=rest, max_size=rest))])
    tokens = torch.tensor(rows, dtype=torch.int64).view(len(rows), width)
    states = lock.states(tokens)
    assert states.shape == (len(rows), width + 1)
    assert states.dtype == torch.int64

    names = {(): 0}
    for path, ending in enumerate(endings):
        names |= {ending[: depth + 1]: path * 4 + depth + 1 for depth in range(4)}
    assert lock.num_states == len(names) + 1
    expected = [[names.get(tuple(row[:h]), lock.num_states - 1) for h in range(width + 1)] for row in rows]
    assert states.tolist() == expected
    for row in rows:  # texts in one state have one guide and one value
        assert [lock._state(row[:h]) for h in range(width + 1)] == expected[rows.index(row)]


def test_reward_of_texts():
    lock = CombinationLock(fork=True)
    (safe, _), (better, _) = lock.endings
    env = make_env(5, fork=True)
    assert env.data.rows[0]["ending"] == env.tokenizer.decode(better)
    assert env.lock == lock
    # Both endings, one symbol wrong, an ending cut short by EOS, nothing at all.
    texts = np.array([safe, better, (*better[:9], better[9] % 19 + 1), (*safe[:9], 0), (0,) * 10])
    observation, infos = env.reset(seed=0)
    assert observation["input_ids"].shape == (5, 11)
    assert infos["references"][0] == (env.tokenizer.decode(better),)
    for tokens in texts.T:
        _, rewards, terminations, _, infos = env.step(tokens)
    assert terminations.all()
    assert rewards.tolist() == [0.5, 1, 0, 0, 0]
    assert infos["finish_reason"].tolist() == ["length"] * 3 + ["stop"] * 2


def test_a_sibling_has_the_same_lock_and_no_guide(tmp_path):
    env = make_env(2, length=3, guide_accuracy=0.5, guidance={"restart_prob": 0.5})
    sibling = sibling_env(env, num_envs=4, split="validation")
    assert sibling.lock == env.lock == CombinationLock(length=3, guide_accuracy=0.5)
    assert isinstance(env.guide, LockGuide)
    assert sibling.guide is None
    # A tokenizer that went through a folder serves as well; that of another lock does not.
    env.tokenizer.save_pretrained(tmp_path)
    make_env(2, tokenizer=tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer must be None or have the lock's vocabulary \(9 tokens"):
        make_env(2, vocab_size=9, tokenizer=env.tokenizer)
    pickle.loads(pickle.dumps(env))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 2}, "vocab_size must be an int >= 3 with fork=False, got 2"),
        ({"vocab_size": 3, "fork": True}, "vocab_size must be an int >= 4 with fork=True, got 3"),
        ({"length": 0}, "length must be an int >= 1"),
        ({"length": 1, "fork": True}, "length must be an int >= 2"),
        ({"length": 2.0}, "length must be an int >= 1"),
        ({"guide_accuracy": 1.1}, r"guide_accuracy must be a number in \[0, 1\], got 1.1"),
        ({"guide_accuracy": float("nan")}, "guide_accuracy must be a number in"),
        ({"guide_accuracy": 0.5, "fork": True}, "guide_accuracy has no effect with fork=True"),
        ({"fork": 1}, "fork must be True or False, got 1"),
        ({"combination_seed": "x"}, "combination_seed must be an int, got 'x'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gym.make(ID, **arguments)


def test_what_does_not_belong_to_a_lock_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens must be None or length=10"):
        gym.make(ID, max_new_tokens=9)
    with pytest.raises(ValueError, match=r"prefix must hold token ids in \[0, 20\), got -1"):
        CombinationLock().guide_probs([-1])
