"""Guides and rewards that fail: the environment and the training are as they were, and can be asked again."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

import agents
from agents.rollout import collect, replay
from agents.sb3.vec_env import TextVecEnv
from textgym import Guidance, Task, seeding
from textgym.engine import _EPISODES, _TEXTS, TextVectorEnv
from textgym.env import TextEnv
from textgym.guides import Author, Completion
from textgym.tokenization import train_tokenizer
from textgym.wrappers import DenseReward, FrozenPrompts

WORDS = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "star", "sea", "hill", "tree"]
ROWS = [{"ask": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 3]), "answer": WORDS[i % 12]} for i in range(9)]
TOKENIZER = train_tokenizer([" ".join(WORDS), " " + " ".join(reversed(WORDS))] * 3)
EOS = TOKENIZER.eos_token_id


class Away(Exception):
    """What fails here."""


class Moody:
    """Calls that fail at some times, by number, and keep what they are asked for."""

    def __init__(self, plan=()):
        self.plan, self.calls = frozenset(plan), 0

    def call(self):
        self.calls += 1
        if self.calls in self.plan:
            raise Away(self.calls)


class MoodyGuide(Moody):
    """Writes tokens by the request's seed alone; each ends the text with probability 1/4."""

    author, can_hand_off = Author.GUIDE, True

    def __init__(self, plan=()):
        super().__init__(plan)
        self.answered = []

    def complete(self, requests, tokenizer):
        self.call()
        self.answered += requests
        completions = []
        for request in requests:
            draws = seeding.uniform(request.seed, np.arange(request.max_new_tokens))
            ids = (2 + draws * (len(TOKENIZER) - 2)).astype(int)
            if (stops := np.flatnonzero(draws < 0.25)).size:
                ids = np.append(ids[: stops[0]], EOS)
            completions.append(Completion(token_ids=ids.tolist(), finished=False))
        return completions


class MoodyReward(Moody):
    """Lengths of texts."""

    def __call__(self, *, prompts, completions, references):
        self.call()
        return {"length": [float(len(text)) for text in completions], "prompt": [len(text) / 9 for text in prompts]}


def task(reward):
    return Task("colours", ROWS, "{ask}", "answer", max_prompt_tokens=6, max_new_tokens=5, reward=reward)


def state_of(env):
    """Everything that can be seen of an environment, and what its next episodes depend on."""
    engine = env.engine if isinstance(env, TextEnv) else env
    arrays = [getattr(engine, name) for name in (*_TEXTS, *_EPISODES)]
    more = [engine.guide_tokens_written, engine.kept_texts(), engine.exhausted, engine.render(), engine._cursor]
    return plain((arrays, vars(engine._draws), list(engine._guidance), more))


def plain(value):
    """Arrays, and what holds them, as lists."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return str(value.dtype), plain(value.tolist())
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def stubborn(env, call, failures):
    """Call until it succeeds; each failure leaves the environment as it was."""
    while True:
        before = state_of(env)
        try:
            return call()
        except Away:
            failures.append(1)
            assert state_of(env) == before


GUIDANCES = {
    "none": Guidance(),
    "restart": Guidance(restart_prob=0.7, restart_length=(1, 3)),
    "fraction": Guidance(restart_prob=0.8, restart_fraction=(0.2, 0.9)),
    "hand-off": Guidance(restart_prob=0.5, restart_length=2, handoff_prob=0.6),
    "bounded": Guidance(restart_prob=0.4, handoff_prob=1.0, handoff_rate=0.5, handoff_tokens=1),
}
OPTIONS = [
    {},
    {"prefix": "sun"},
    {"index": 4, "guidance": GUIDANCES["restart"]},
    {"prompt": "red sea", "references": ["moon"]},
    {"group_size": 3},
]


def play(*, mode, guidance, order, parking, seed, options, guide_plan=(), reward_plan=(), steps=15):
    """Play some episodes, and return all that was seen, the number of failures, and the guide."""
    guide, reward, failures, log = MoodyGuide(guide_plan), MoodyReward(reward_plan), [], []
    arguments = {"guide": guide, "guidance": guidance, "order": order, "handoff": True, "render_mode": "ansi"}
    arguments |= {"task": task(reward), "tokenizer": TOKENIZER}
    if mode == "single":
        n, env = 1, TextEnv(**arguments)
        options = {key: value for key, value in options.items() if key != "group_size"}
    else:
        n, env = 3, TextVectorEnv(3, parking=parking, autoreset_mode=mode, **arguments)
    rng = np.random.default_rng(seed)
    log.append(stubborn(env, lambda: env.reset(seed=seed, options=options), failures))
    for _ in range(steps):
        if (env if mode != "single" else env.engine).exhausted:
            log.append(stubborn(env, env.reset, failures))
        actions = rng.integers(2, len(TOKENIZER) + 1, n)
        actions[rng.random(n) < 0.15] = len(TOKENIZER)
        step = stubborn(env, lambda actions=actions: env.step(actions if mode != "single" else actions[0]), failures)
        log.append(step)
        ended = np.atleast_1d(step[2])
        if mode == "single" and ended[0]:
            log.append(stubborn(env, env.reset, failures))
        elif mode == AutoresetMode.DISABLED and ended.any():
            log.append(
                stubborn(
                    env,
                    lambda ended=ended: env.reset(options={**options, "group_size": 1, "reset_mask": ended}),
                    failures,
                )
            )
        log.append(state_of(env))
    return log, len(failures), guide


SETTINGS = {
    "mode": st.sampled_from(["single", *AutoresetMode]),
    "guidance": st.sampled_from(list(GUIDANCES.values())),
    "order": st.sampled_from(["random", "sequential"]),
    "parking": st.booleans(),
    "seed": st.integers(0, 5),
    "options": st.sampled_from(OPTIONS),
}
TIMES = st.frozensets(st.integers(1, 14), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(**SETTINGS, guide_plan=TIMES, reward_plan=TIMES)
def test_a_call_that_failed_gives_what_it_would_have_given(guide_plan, reward_plan, **how):
    how["parking"] = how["parking"] and how["mode"] != "single"
    calm, none, _ = play(**how)
    assert none == 0
    log, _, guide = play(**how, guide_plan=guide_plan, reward_plan=reward_plan)
    assert plain(log) == plain(calm)
    assert len(guide.answered) == len(set(guide.answered)), "what the guide wrote is not asked for again"


@pytest.mark.parametrize("door", ["dense", "frozen", "sb3"])
def test_wrappers_and_stable_baselines_lose_nothing(door):
    def seen(guide_plan=(), reward_plan=()):
        reward, failures = MoodyReward(reward_plan), []
        arguments = {"task": task(reward), "tokenizer": TOKENIZER, "guide": MoodyGuide(guide_plan)}
        arguments |= {"guidance": GUIDANCES["hand-off"]}

        def again(call):
            while True:
                try:
                    return call()
                except Away:
                    failures.append(1)

        rng, log = np.random.default_rng(0), []
        if door == "sb3":
            env = TextVecEnv(TextVectorEnv(3, autoreset_mode=AutoresetMode.DISABLED, **arguments))
            env.seed(2)
            log.append(again(env.reset))
            for _ in range(25):
                env.step_async(rng.integers(2, len(TOKENIZER), 3))
                log.append(again(env.step_wait))
                for info in log[-1][3]:
                    info.get("episode", {}).pop("t", None)  # a time
            return plain(log), len(failures)
        inside = TextEnv(**arguments)
        env = DenseReward(inside, gamma=0.9) if door == "dense" else FrozenPrompts(inside, [3, 5, 1])
        ended, log = True, []
        for step in range(40):
            if ended:
                log.append(again(lambda step=step: env.reset(seed=None if step else 4)))
            action = int(rng.integers(2, len(TOKENIZER)))
            log.append(again(lambda action=action: env.step(action)))
            ended = log[-1][2]
        return plain(log), len(failures)

    calm, none = seen()
    broken, failures = seen({1, 2, 4, 7}, {1, 2, 3, 8})
    assert (none, failures >= 6) == (0, True)
    assert broken == calm


def test_a_failed_replay_leaves_the_environment_to_its_episodes(make_env, make_policy):
    def after(fails):
        env, policy = make_env(4, guide=MoodyGuide({2} if fails else ())), make_policy()
        collect(
            env, policy, seeds=np.arange(4, dtype=np.uint64), reset_seed=3, options={"guidance": GUIDANCES["restart"]}
        )
        options = {"index": [1, 2], "guidance": [Guidance(restart_prob=1.0, restart_length=2)] * 2}
        try:
            replay(env, policy, seeds=np.arange(2, dtype=np.uint64), options=options)
        except Away:
            assert fails
        rollout = collect(env, policy, seeds=np.arange(4, dtype=np.uint64))
        return rollout.texts.tolist(), rollout.sample_ids.tolist()

    assert after(True) == after(False)


class MoodyScorer(MoodyGuide):
    """Scores tokens, too."""

    def score(self, requests, continuations, tokenizer):
        if requests:
            self.call()
        return [np.full(len(tokens), -1.0, np.float32) for tokens in continuations]


LEARNERS = {
    "ppo++": {},
    "aggrevated": {},
    "d2lols": {"tau": 1},
    "grpo": {"curriculum": "adaback"},
    "rloo": {"beta": 1.0, "dead_groups": "resample", "resamplings": 1},
    "hpt": {"success": 0.9, "group_size": 4},
    "mentor": {"group_size": 4, "guided_texts": 2},
    "relift": {"success": 0.9, "group_size": 4, "buffer_size": 2},
    "prefix-rft": {"group_size": 4, "dead_groups": "rescue"},
    "vine-ppo": {"rollouts_per_state": 2},
    "opd": {},
    "gail": {},
}


@pytest.mark.parametrize("name", LEARNERS)
def test_learn_goes_on_where_a_guide_or_a_reward_failed(name, make_env, make_policy):
    def learned(guide_plan=(), reward_plan=()):
        reward = MoodyReward(reward_plan)
        env = make_env(8, guide=MoodyScorer(guide_plan), reward=reward)
        shared = {"episodes_per_iteration": 16, "n_epochs": 1, "eval_every": 2, "eval_prompts": 8, "seed": 3}
        agent = agents.ALGORITHMS[name](make_policy(), env, device="cpu", **shared, **LEARNERS[name])
        failures = 0
        while agent.num_episodes < 64:
            try:
                agent.learn(total_episodes=64 - agent.num_episodes)
            except Away:
                failures += 1
                last = agent.history[-1] if agent.history else {"num_episodes": 0, "iteration": 0}
                assert (agent.num_episodes, agent.iteration) == (last["num_episodes"], last["iteration"])
        numbers = [{key: value for key, value in line.items() if "seconds" not in key} for line in agent.history]
        weights = {key: weight.tolist() for key, weight in agent.policy.state_dict().items()}
        return failures, numbers, weights, plain(env.get_state())

    calm = learned()
    broken = learned(set(range(1, 40, 3)), {2, 5, 6, 9, *range(11, 60, 7)})
    assert (calm[0], broken[0] >= 3) == (0, True)
    assert broken[1:] == calm[1:]
