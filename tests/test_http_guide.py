"""A guide behind an OpenAI-compatible server, here a small one on loopback that counts what it is asked."""

import asyncio
import contextlib
import copy
import multiprocessing
import pickle
import re
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import plugins
import pytest
from conftest import ENV_ID, WORDS
from fake_server import request, requests, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.comparison.results import read_results
from benchmarks.comparison.runner import Benchmark
from benchmarks.profiles import Row
from benchmarks.run_all import run_all
from textgym.decoding import Decoding
from textgym.guides import Author, CallableGuide, GuideRequest
from textgym.tokenization import train_tokenizer

pytest.importorskip("httpx2")
from textgym.guides.answers import Answer
from textgym.guides.http import Budget, BudgetExceeded, HTTPGuide, Usage, without_echo


@pytest.fixture
def server(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


def kept(folder):
    """How many completions a cache has."""
    with contextlib.closing(sqlite3.connect(folder / "completions.sqlite")) as connection:
        return connection.execute("SELECT count(*) FROM completions").fetchone()[0]


def play(envs, seed=3, steps=40):
    """Random episodes; all observations and infos of their ends."""
    observations, _ = envs.reset(seed=seed)
    envs.action_space.seed(seed)
    seen = [observations["input_ids"].copy()]
    ends = []
    for _ in range(steps):
        observations, rewards, terminated, _, infos = envs.step(envs.action_space.sample())
        seen.append(observations["input_ids"].copy())
        if terminated.any():
            ends.append((rewards.copy(), {name: copy.deepcopy(value) for name, value in infos.items()}))
    return np.array(seen), ends


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_episodes_restart_and_hand_off(server, words_tokenizer, api):
    guide = HTTPGuide("words", base_url=server.url, api=api)
    envs = gym.make_vec(
        ENV_ID, num_envs=8, tokenizer=words_tokenizer, guide=guide, handoff=True, autoreset_mode="Disabled",
        guidance={"restart_prob": 1.0, "restart_length": 2},
    ).unwrapped  # fmt: skip
    _, infos = envs.reset(seed=0)
    assert set(infos["prefix_length"]) <= {0, 1, 2}
    assert 2 in infos["prefix_length"]
    authors = infos["authors"]
    assert ((authors == Author.GUIDE).sum(1) == infos["prefix_length"]).all()
    before = envs._input_ids.copy()
    one_policy_token = np.full(8, words_tokenizer(" moon")["input_ids"][0])
    envs.step(one_policy_token)
    written = envs._length.copy()
    _, _, terminated, _, infos = envs.step(np.full(8, envs.vocab_size))
    assert terminated.all()
    assert set(infos["finish_reason"]) == {"handoff"}
    for row in range(8):
        start = envs.max_prompt_tokens
        prefix = int(infos["prefix_length"][row])
        kept = envs._input_ids[row, start : start + written[row]]
        assert (kept[:prefix] == before[row, start : start + prefix]).all(), "the prefix stays a prefix"
        assert kept[prefix] == one_policy_token[0]
        after = envs._authors[row, written[row] : envs._length[row]]
        assert len(after)
        assert (after == Author.GUIDE).all()
    assert guide.usage.calls == len(server.bodies) >= 16
    assert guide.usage.completion_tokens > 0 < guide.usage.seconds
    sent = server.bodies[-1]
    text = sent["prompt"] if api == "completions" else sent["messages"][-1]["content"]
    assert " moon" in text, "the server reads what the policy wrote"
    assert {body["seed"] < 2**31 for body in server.bodies} == {True}


def test_single_environment(server, words_tokenizer):
    guide = HTTPGuide("words", base_url=server.url)
    env = gym.make(ENV_ID, tokenizer=words_tokenizer, guide=guide, guidance={"restart_prob": 1.0})
    for seed in range(4):
        env.reset(seed=seed)
    assert guide.usage.calls == len(server.bodies) > 0


def test_a_second_run_reads_the_cache(server, words_tokenizer, tmp_path):
    def run(port_of=server):
        guide = HTTPGuide("words", base_url=port_of.url, cache=tmp_path / "kept")
        envs = gym.make_vec(
            ENV_ID, num_envs=6, tokenizer=words_tokenizer, guide=guide, handoff=True,
            guidance={"restart_prob": 0.5, "handoff_prob": 0.5},
        )  # fmt: skip
        return *play(envs), guide.usage

    seen, ends, first = run()
    asked = len(server.bodies)
    again, ends_again, second = run()
    assert asked == len(server.bodies) == first.calls > 10
    assert (second.calls, second.cache_hits, second.prompt_tokens) == (0, first.calls + first.cache_hits, 0)
    np.testing.assert_equal(again, seen)
    np.testing.assert_equal(ends_again, ends)
    assert kept(tmp_path / "kept") == asked


def test_what_the_cache_tells_apart(server, words_tokenizer, tmp_path):
    def calls(base=None, **arguments):
        guide = HTTPGuide(arguments.pop("model", "words"), base_url=server.url, cache=tmp_path, **arguments)
        guide.complete([base or request()], words_tokenizer)
        return guide.usage.calls

    assert calls() > 0
    assert calls() == 0
    for changed in (
        {"model": "others"},
        {"decoding": Decoding(top_p=0.5)},
        {"stop": ["."]},
        {"extra_body": {"min_p": 0.1}},
        {"template": "Say: {prompt}{prefix}"},
        {"api": "chat"},
        {"base": request(seed=1)},
        {"base": request(limit=3)},
        {"base": request(prefix=" moon")},
        {"base": request("blue")},
    ):
        assert calls(**changed) > 0, changed
        assert calls(**changed) == 0, changed
    greedy = {"decoding": Decoding(greedy=True)}
    assert calls(**greedy) > 0
    assert calls(request(seed=5), **greedy) == 0, "seeds mean nothing without a draw"


def _complete_in_another_process(guide):
    tokenizer = train_tokenizer([" ".join(WORDS), " " + " ".join(reversed(WORDS))] * 3)
    return guide.complete(requests(8), tokenizer), guide.usage


@pytest.mark.slow
def test_processes_share_a_cache(server, tmp_path, words_tokenizer):
    guide = HTTPGuide("words", base_url=server.url, cache=tmp_path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        (first, _), (second, _) = pool.map(_complete_in_another_process, [guide, guide])
    assert first == second == guide.complete(requests(8), words_tokenizer)
    assert guide.usage.calls == 0 < guide.usage.cache_hits
    assert kept(tmp_path) == guide.usage.cache_hits


def test_same_request_same_completion_and_one_call(server, words_tokenizer):
    guide = HTTPGuide("words", base_url=server.url)
    together = guide.complete(requests(12), words_tokenizer)
    assert [guide.complete([one], words_tokenizer)[0] for one in requests(12)] == together
    greedy = HTTPGuide("words", base_url=server.url, decoding=Decoding(greedy=True))
    before = len(server.bodies)
    first, *others = greedy.complete([request(seed=i, limit=1) for i in range(5)], words_tokenizer)
    assert len(server.bodies) == before + 1
    assert all(other == first for other in others)
    assert server.bodies[-1]["temperature"] == 0
    assert "seed" not in server.bodies[-1]
    assert guide.complete([], words_tokenizer) == []
    assert guide.complete([request(limit=0)], words_tokenizer)[0].token_ids == ()
    assert len(server.bodies) == before + 1


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=40), limit=st.integers(1, 12), reason=st.sampled_from(["stop", "length"]))
def test_text_becomes_ids_of_the_environment(text, limit, reason):
    tokenizer = train_tokenizer(["red sun and blue moon"] * 3, vocab_size=280)

    class Canned(HTTPGuide):
        def _answers(self, bodies):
            return [Answer(text, reason, 1, 1) for _ in bodies]

    [completion] = Canned("m", base_url="http://localhost/v1").complete([request(limit=limit)], tokenizer)
    assert len(completion.token_ids) <= limit
    decoded = tokenizer.decode(completion.token_ids, skip_special_tokens=False)
    whole = text if reason == "stop" else text * (limit + 1)
    assert whole.encode().startswith(decoded.encode().rstrip("\ufffd".encode())), (
        "what the server wrote, from its start"
    )


def test_a_word_of_the_policy_can_be_finished(server, words_tokenizer):
    server.answer = lambda text, body: ("oon", "stop")
    envs = gym.make_vec(
        ENV_ID, num_envs=1, tokenizer=words_tokenizer, handoff=True, autoreset_mode="Disabled",
        guide=HTTPGuide("words", base_url=server.url),
    ).unwrapped  # fmt: skip
    envs.reset(seed=0, options={"prefix": " m"})
    observations, _, _, _, _ = envs.step([envs.vocab_size])
    written = observations["input_ids"][0][observations["attention_mask"][0] == 1]
    assert words_tokenizer.decode(written, skip_special_tokens=True).endswith(" moon")


def test_what_follows_a_template_fits_the_prompt(server, words_tokenizer):
    server.answer = lambda text, body: ("moon", "stop")
    guide = HTTPGuide("words", base_url=server.url, template="{prompt} => {prefix}")
    [begun, inside] = guide.complete([request(), request(prefix=" ")], words_tokenizer)
    assert words_tokenizer.decode(begun.token_ids) == " moon"
    assert words_tokenizer.decode(inside.token_ids) == "moon"


def test_a_text_cut_by_the_servers_tokens_goes_on(server, words_tokenizer):
    """A token of this server is a letter."""
    story = "".join(f" {word}" for word in WORDS)

    def letters(text, body):
        done = len(text) - len("red sun")
        return story[done : done + body["max_tokens"]], "length"

    server.answer = letters
    guide = HTTPGuide("letters", base_url=server.url)
    [completion] = guide.complete([request(limit=10)], words_tokenizer)
    expected = words_tokenizer(story, add_special_tokens=False)["input_ids"][:10]
    assert list(completion.token_ids) == expected
    assert not completion.finished
    assert 1 < guide.usage.calls <= 5
    assert all(body["max_tokens"] <= 160 for body in server.bodies)


@pytest.mark.parametrize(
    ("answer", "before", "rest"),
    [
        ("the red sun sets", "the red sun", " sets"),
        ("\n the red sun sets", " the red sun", " sets"),
        ("the red sunset", "the red sun", "set"),
        ("the red sun sets", "the red sun ", "sets"),
        ("and so", " a", None),
        ("a star", " a", " star"),
        ("anything", "", None),
        ("blue", "the red sun", None),
    ],
)
def test_echoes_are_cut(answer, before, rest):
    assert without_echo(answer, "a prompt " + before, before) == rest


def test_a_chat_answers_beside_or_with_the_text(server, words_tokenizer):
    answers = iter(["moon sea", "red sun green moon sea", "green moon sea"])
    server.answer = lambda text, body: (next(answers), "stop")
    guide = HTTPGuide("words", base_url=server.url, api="chat", concurrency=1)
    asked = [request(prefix=" green", seed=seed) for seed in range(3)]
    expected = words_tokenizer(" moon sea", add_special_tokens=False)["input_ids"]
    assert [list(one.token_ids) for one in guide.complete(asked, words_tokenizer)] == [expected] * 3
    assert [message["role"] for message in server.bodies[0]["messages"]] == ["system", "user"]


def test_templates_and_stop_reach_the_server(server, words_tokenizer):
    shots = "blue => moon\n{prompt} => {prefix}"
    guide = HTTPGuide("words", base_url=server.url, template=shots, stop=["\n"], extra_body={"min_p": 0.1})
    guide.complete([request(prefix="sea", limit=1)], words_tokenizer)
    body = server.bodies[0]
    assert body["prompt"] == "blue => moon\nred sun => sea"
    assert (body["stop"], body["min_p"], body["top_p"], body["max_tokens"]) == (["\n"], 0.1, 0.92, 1)
    messages = [{"role": "system", "content": "{{short}}"}, {"role": "user", "content": "{prompt}|{prefix}"}]
    chat = HTTPGuide("words", base_url=server.url, api="chat", template=messages, decoding=Decoding(0.5, top_k=7))
    chat.complete([request(prefix="sea", limit=1)], words_tokenizer)
    body = server.bodies[1]
    assert [message["content"] for message in body["messages"]] == ["{short}", "red sun|sea"]
    assert (body["temperature"], body["top_k"]) == (0.5, 7)
    assert len({guide.fingerprint, chat.fingerprint, HTTPGuide("words", base_url=server.url).fingerprint}) == 3


def test_budget_of_calls_stops_or_goes_on_unguided(server, words_tokenizer):
    stops = HTTPGuide("words", base_url=server.url, budget=Budget(calls=5))
    with pytest.raises(BudgetExceeded, match="budget is spent: 5 of 5 calls"):
        stops.complete(requests(8), words_tokenizer)
    assert len(server.bodies) == stops.usage.calls == 5

    def run():
        guide = HTTPGuide("words", base_url=server.url, budget=Budget(calls=9, when_spent="unguided"))
        envs = gym.make_vec(
            ENV_ID, num_envs=6, tokenizer=words_tokenizer, guide=guide, handoff=True, autoreset_mode="Disabled",
            guidance={"restart_prob": 1.0, "restart_length": 2, "handoff_prob": 1.0, "handoff_length": 1},
        )  # fmt: skip
        envs.reset(seed=0)
        _, _, terminated, _, infos = envs.step(np.full(6, words_tokenizer(" sea")["input_ids"][0]))
        assert terminated.all()
        _, later = envs.reset(seed=9)
        assert guide.usage.calls == 9
        assert not later["prefix_length"].any(), "a restart begins at its prompt"
        return infos

    infos = run()
    assert set(infos["finish_reason"]) == {"handoff"}
    unguided = infos["guide_tokens"] == infos["prefix_length"]
    assert unguided.any()
    assert not unguided.all()
    for row in np.flatnonzero(unguided):
        authors = infos["authors"][row][infos["authors"][row] >= 0]
        assert authors[-1] == Author.POLICY, "a text that is handed off ends where it is"
    np.testing.assert_equal(run(), infos)


def test_budget_of_tokens_and_cost(server, words_tokenizer):
    server.answer = lambda text, body: (" red sun", "stop")
    tokens = HTTPGuide("words", base_url=server.url, concurrency=1, budget=Budget(tokens=10))
    with pytest.raises(BudgetExceeded, match="10 of 10 tokens"):  # 3 read and 2 written each
        tokens.complete(requests(4), words_tokenizer)
    assert tokens.usage.calls == 2
    cost = HTTPGuide("words", base_url=server.url, concurrency=2, budget=Budget(cost=1.0, prices=(0.1, 0.2)))
    with pytest.raises(BudgetExceeded, match=r"of 1 cost"):
        cost.complete(requests(8), words_tokenizer)
    assert 2 <= cost.usage.calls <= 3, "no more than what was under way"
    assert cost.usage.cost == pytest.approx(0.7 * cost.usage.calls)
    free = Budget(calls=0)
    assert free.spent(Usage()) == "0 of 0 calls"


def test_what_the_cache_answers_is_free(server, words_tokenizer, tmp_path):
    written = HTTPGuide("words", base_url=server.url, cache=tmp_path).complete(requests(5), words_tokenizer)
    broke = HTTPGuide("words", base_url=server.url, cache=tmp_path, budget=Budget(calls=0))
    assert broke.complete(requests(5), words_tokenizer) == written
    with pytest.raises(BudgetExceeded):
        broke.complete(requests(6), words_tokenizer)


def log_prob_of(token, at):
    """What the server says of a token at a place of a text."""
    return -((7 * token + 3 * at) % 11) / 4 - 0.1


def answers(tokenizer):
    """The forms in which servers return log-probabilities of what they read."""

    def echo(ids):
        """OpenAI's, followed by a token that was written."""
        log_probs = [None, *(log_prob_of(token, at) for at, token in enumerate(ids) if at), -0.5]
        tokens = [*tokenizer.convert_ids_to_tokens(ids), " moon"]
        logprobs = {"tokens": tokens, "token_logprobs": log_probs, "top_logprobs": None, "text_offset": None}
        return {"text": tokenizer.decode(ids) + " moon", "logprobs": logprobs}

    def prompt_logprobs(ids):
        """vLLM's, where likelier tokens stand beside, and nothing of the prompt is repeated."""
        places = [
            {str(token): {"logprob": log_prob_of(token, at), "rank": 2, "decoded_token": "?"}, "1": {"logprob": -0.01}}
            for at, token in enumerate(ids)
        ]
        logprobs = {"tokens": [" moon"], "token_logprobs": [-0.5], "top_logprobs": None, "text_offset": [0]}
        return {"text": " moon", "logprobs": logprobs, "prompt_logprobs": [None, *places[1:]]}

    def both(ids):
        return echo(ids) | {"prompt_logprobs": prompt_logprobs(ids)["prompt_logprobs"]}

    return {"echo": echo, "prompt_logprobs": prompt_logprobs, "both": both}


def texts_to_score(tokenizer, count=6):
    """Requests with continuations of one to three words, or none."""
    ids = [tuple(tokenizer("".join(f" {word}" for word in WORDS[k : k + 3]))["input_ids"]) for k in range(count)]
    asked = [GuideRequest("red sun", (262, 263), " moon", text[:1], 6, seed) for seed, text in enumerate(ids)]
    return asked, [text[: k % 4] for k, text in enumerate(ids)]


@pytest.mark.parametrize("form", ["echo", "prompt_logprobs", "both"])
def test_a_server_scores_given_tokens_and_each_text_once(server, words_tokenizer, tmp_path, form):
    server.scores = answers(words_tokenizer)[form]
    guide = HTTPGuide("words", base_url=server.url, cache=tmp_path, extra_body={"min_p": 0.1}, concurrency=2)
    asked, texts = texts_to_score(words_tokenizer)
    twice = guide.score(asked + asked[::-1], texts + texts[::-1], words_tokenizer)
    for one, text, scores in zip(asked, texts, twice, strict=False):
        before = len(one.prompt_ids) + len(one.prefix_ids)
        expected = [log_prob_of(token, before + h) for h, token in enumerate(text)]
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, np.array(expected, np.float32))
    np.testing.assert_equal(twice[6:], twice[:6][::-1])
    sent = {(*r.prompt_ids, *r.prefix_ids, *text) for r, text in zip(asked, texts, strict=True) if text}
    assert sorted(tuple(body["prompt"]) for body in server.bodies) == sorted(sent)
    assert {(body["temperature"], body["top_p"], body["min_p"], "stop" in body) for body in server.bodies} == {
        (1.0, 1.0, 0.1, False)
    }
    calls = guide.usage.calls
    assert calls == len(server.bodies) == guide.usage.completion_tokens == 4
    again = HTTPGuide("words", base_url=server.url, cache=tmp_path, extra_body={"min_p": 0.1}, budget=Budget(calls=0))
    np.testing.assert_equal(again.score(asked, texts, words_tokenizer), twice[:6])
    assert (again.usage.calls, again.usage.cache_hits, len(server.bodies)) == (0, 4, calls)
    assert again.score([], [], words_tokenizer) == []


def test_a_server_that_cannot_score_says_so(server, words_tokenizer):
    asked, texts = texts_to_score(words_tokenizer)
    forms = answers(words_tokenizer)
    guide = HTTPGuide("words", base_url=server.url, concurrency=1)
    none = {"text": " moon", "logprobs": None}
    ignores_echo = {"text": " moon", "logprobs": {"tokens": [" moon"], "token_logprobs": [-0.5]}}
    for choice in (none, ignores_echo, {"text": " moon"}):
        server.scores = lambda ids, choice=choice: choice
        with pytest.raises(
            RuntimeError, match=r"must answer with the log-probabilities of the tokens that it read, got"
        ):
            guide.score(asked, texts, words_tokenizer)
    others = {"prompt_logprobs": lambda ids: forms["prompt_logprobs"]([token + 1 for token in ids])}
    others["nan"] = lambda ids: {"text": "", "logprobs": {"token_logprobs": [None, *[float("nan")] * len(ids)]}}
    for server.scores in others.values():
        with pytest.raises(RuntimeError, match="must answer with the log-probabilities"):
            guide.score(asked, texts, words_tokenizer)
    server.scores = lambda ids: forms["echo"]([token + 1 for token in ids])
    with pytest.raises(
        ValueError, match="a model with the environment's vocabulary to score its tokens, and 'words' reads"
    ):
        guide.score(asked, texts, words_tokenizer)
    server.scores = forms["echo"]
    spent = HTTPGuide("words", base_url=server.url, budget=Budget(calls=2, when_spent="unguided"))
    with pytest.raises(BudgetExceeded, match="nothing is learned without its scores: 2 of 2 calls"):
        spent.score(asked, texts, words_tokenizer)
    for arguments, message in (
        ({"api": "chat"}, 'api must be "completions" to score tokens'),
        ({"template": "Say: {prompt}{prefix}"}, "template must be None to score tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            HTTPGuide("words", base_url=server.url, **arguments).score([], [], words_tokenizer)


def test_a_text_that_ends_within_a_character_is_an_echo(server):
    """The token after it, which the server writes, can complete the character."""
    tokenizer = train_tokenizer(["red sun and blue moon"] * 3, vocab_size=280)
    ids = tokenizer("red é")["input_ids"]
    server.scores = lambda ids: {**answers(tokenizer)["echo"](ids), "text": "<s>red é"}
    guide = HTTPGuide("words", base_url=server.url)
    asked = GuideRequest("red", tuple(ids[:1]), "", (), 6, 0)
    with pytest.raises(ValueError, match="reads"):  # a token that the environment's tokenizer has not
        guide.score([asked], [ids[1:-1]], tokenizer)
    server.scores = lambda ids: {**answers(tokenizer)["echo"](ids), "text": "red é"}
    assert len(guide.score([asked], [ids[1:-1]], tokenizer)[0]) == len(ids) - 2


def test_concurrency_has_a_limit_and_works_in_a_loop(server, words_tokenizer):
    server.delay = 0.05
    guide = HTTPGuide("words", base_url=server.url, concurrency=3)

    async def inside():
        return guide.complete([request(seed=i, limit=1) for i in range(9)], words_tokenizer)

    assert len(asyncio.run(inside())) == 9
    assert server.busiest == 3


def test_retries_wait_as_long_as_the_server_says(server, words_tokenizer):
    server.plan = [(429, {"Retry-After": "1"}, {"error": {"message": "slow down"}})]
    guide = HTTPGuide("words", base_url=server.url)
    guide.complete([request(limit=1)], words_tokenizer)
    assert server.times[1] - server.times[0] >= 0.95
    assert (guide.usage.calls, guide.usage.failures, len(server.bodies)) == (2, 1, 2)
    server.plan = [(500, {"retry-after-ms": "10"}, {"error": {"message": "oops"}})] * 2
    guide.complete([request(limit=1, seed=2)], words_tokenizer)
    assert (guide.usage.calls, guide.usage.failures, len(server.bodies)) == (5, 3, 5)


def test_errors_say_who_and_what(server, words_tokenizer):
    def complete(**arguments):
        guide = HTTPGuide("words", **{"base_url": server.url, "max_retries": 0, **arguments})
        try:
            guide.complete([request(limit=1)], words_tokenizer)
        finally:
            failures.append(guide.usage.failures)

    failures: list[int] = []
    server.plan = [(404, {}, {"error": {"message": "no model 'words'"}})]
    with pytest.raises(RuntimeError, match=rf"{server.url} answered 404 for model 'words', 1 tries.*no model 'words'"):
        complete(max_retries=5)
    server.plan = [(500, {"retry-after-ms": "5"}, {"error": {"message": "oops"}})] * 3
    with pytest.raises(RuntimeError, match=r"answered 500 .* 3 tries.*oops"):
        complete(max_retries=2)
    for wrong in ({"hello": 1}, "<html>"):
        server.plan = [(200, {}, wrong)]
        with pytest.raises(RuntimeError, match=r"must answer with a completion, got .*h"):
            complete()
    server.delay = 0.5
    with pytest.raises(TimeoutError, match=r"did not answer within timeout=0.1 seconds, 1 tries"):
        complete(timeout=0.1)
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9/v1 cannot be reached, 1 tries"):
        complete(base_url="http://127.0.0.1:9/v1")
    assert failures == [1, 3, 1, 1, 1, 1]


def test_copies_share_and_pickles_begin_anew(server, words_tokenizer):
    guide = HTTPGuide("words", base_url=server.url, budget=Budget(calls=20))
    twin = copy.deepcopy(guide)
    expected = guide.complete(requests(3), words_tokenizer)
    assert twin.usage is guide.usage
    assert twin.usage.calls >= 3
    other = pickle.loads(pickle.dumps(guide))
    assert other.usage == Usage()
    assert other.complete(requests(3), words_tokenizer) == expected
    assert other.fingerprint == guide.fingerprint == HTTPGuide("words", base_url="http://localhost:1/v1").fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": ""}, "model must be the name of a model"),
        ({"api": "responses"}, 'api must be "completions" or "chat", got \'responses\''),
        ({"base_url": "localhost:8000"}, "base_url must be a URL such as .*, got 'localhost:8000'"),
        ({"base_url": "http://me:secret@localhost/v1"}, "base_url must have no user, password or query"),
        ({"concurrency": 0}, "concurrency must be an int >= 1, got 0"),
        ({"timeout": 0}, "timeout must be a finite number of seconds > 0, got 0"),
        ({"max_retries": -1}, "max_retries must be an int >= 0, got -1"),
        ({"stop": "."}, "stop must be a sequence of strings"),
        ({"template": "{prefix}{prompt}"}, r"template must be a string with \{prompt\} that ends in \{prefix\}"),
        ({"template": "{prompt} {name}{prefix}"}, "template must be a string"),
        ({"api": "chat", "template": [{"role": "user"}]}, "template must be a string or a sequence of messages"),
        ({"api": "chat", "template": "{prompt}"}, "template must be a string or a sequence of messages"),
        ({"decoding": {"top_p": 1}}, "decoding must be None or a Decoding"),
        ({"decoding": Decoding(num_beams=2)}, "decoding must be None or a Decoding without min_new_tokens and beams"),
        ({"extra_body": {"seed": 1}}, "extra_body must be a mapping without the fields that the guide sets"),
        ({"extra_body": {"x": {1}}}, "extra_body must be JSON values"),
        ({"budget": 3}, "budget must be None or a Budget, got 3"),
        ({"cache": __file__}, "cache must be a folder, got the file"),
        ({"api_key_env": "sk-123"}, "api_key_env must be None or the name of an environment variable, not the key"),
        ({"base_url": "https://example.com/v1"}, "api_key_env: the environment variable OPENAI_API_KEY is not set"),
    ],
)
def test_wrong_arguments_are_named(monkeypatch, arguments, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=message) as raised:
        HTTPGuide(**{"model": "m", "base_url": "http://localhost:8000/v1", **arguments})
    assert "secret" not in str(raised.value)
    assert "sk-123" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": -1}, "Budget.calls must be None or an int >= 0, got -1"),
        ({"tokens": 1.5}, "Budget.tokens must be None or an int >= 0, got 1.5"),
        ({"cost": float("inf")}, "Budget.cost must be None or a finite number >= 0, got inf"),
        ({"cost": 1}, "Budget.cost=1 needs Budget.prices"),
        ({"prices": (1,)}, "Budget.prices must be two finite numbers"),
        ({"when_spent": "stop"}, 'Budget.when_spent must be "error" or "unguided", got \'stop\''),
    ],
)
def test_wrong_budgets_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)


def test_a_benchmark_records_its_accounts(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path / "cache"))
    key = "sk-ThisMustNeverBeSeen"
    monkeypatch.setenv("OPENAI_API_KEY", f"{key}\n")
    server.answer = lambda text, body: (f" sun {key}", "stop")
    guide = HTTPGuide("words", base_url=server.url, cache=tmp_path / "out" / "completions")
    row = Row("ppo++", {"beta": 1.0, "eval_every": 0}, env={"guide": guide})
    profile = profile_with(row)
    monkeypatch.setattr("benchmarks.profiles.load_profile", lambda name: profile)
    assert run_all(out=tmp_path / "out") == 0
    [record] = read_results(tmp_path / "out")
    used = Usage(**record["guide_usage"])
    assert used.calls == len(server.bodies) > 0 == used.failures
    assert used.prompt_tokens == sum(len(body["prompt"].split()) for body in server.bodies)
    assert used.completion_tokens > 0 < used.seconds
    assert record["guide_tokens"] > 0
    assert record["hyperparameters"]["env"] == {"guide": f"HTTPGuide {guide.fingerprint}"}
    assert guide.usage == Usage(), "what a run's process used is told by its record"
    files = [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert any(b"***" in file for file in files)
    assert not any(key.encode() in file for file in files)

    other = replace(row, env={"guide": HTTPGuide("others", base_url=server.url)})
    with pytest.raises(ValueError, match=r"words remote seed 0 has hyperparameters .*HTTPGuide"):
        Benchmark(profile_with(other), None, None, tmp_path / "out")
    unnamed = replace(row, env={"guide": CallableGuide(lambda requests: [" sea"] * len(requests))})
    with pytest.raises(ValueError, match=r"words, remote: .* objects with a fingerprint, got <textgym.*CallableGuide"):
        Benchmark(profile_with(unnamed), None, None, tmp_path / "other")


def profile_with(remote):
    """With this row alone."""
    tasks = {"words": replace(plugins.WORDS, rows={"remote": remote})}
    return replace(plugins.MICRO, tasks=tasks, default=("remote",))


def test_naming_a_guide_is_quick_and_needs_the_extra():
    code = (
        "import sys, copy, pickle; from textgym.guides.http import HTTPGuide;"
        "guide = HTTPGuide('m', base_url='http://localhost/v1'); pickle.loads(pickle.dumps(copy.deepcopy(guide)));"
        "assert not {'torch', 'httpx2', 'transformers'} & set(sys.modules)\n"
        "import textgym.packages; textgym.packages.find_spec = lambda name: None\n"
        "try: HTTPGuide('m')\n"
        "except ImportError as error: assert 'textgym[http]' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_ecosystem_page_runs_as_it_stands(server, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/ecosystem.md").read_text()
    section = page[page.index("## Guides that are services") :]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(code.replace("http://localhost:8000/v1", server.url), namespace)
    usage = namespace["guide"].usage
    assert usage.calls == len(server.bodies) == kept(tmp_path / "completions") > 0
    shot, _, asked = server.bodies[0]["prompt"].partition("\n")
    assert shot == "generate a sentence with: dog park run => A dog runs in the park."
    assert re.fullmatch(r"generate a sentence with: [\w ]+ =>.*", asked)
