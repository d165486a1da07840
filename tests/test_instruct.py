"""Environments for instruct models: templates that only the policy reads, and texts that end before a string."""

from __future__ import annotations

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows_of
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

import textgym
from agents import PPO, SL, CausalLMPolicy
from agents.rollout import collect
from textgym import Guidance, Task, seeding
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.guides import Author, CallableGuide, Completion
from textgym.tokenization import train_tokenizer
from textgym.trl import prompt_dataset, reward_function

HORIZON = 8
CHAT = (
    "{% for turn in messages %}<|{{ turn['role'] }}|>{{ turn['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def tokenizer():
    """Words, bytes, and the special tokens of a chat."""
    made = train_tokenizer([" ".join(row["ask"] for row in rows_of(0, 24))] * 2)
    made.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>", "<|turn|>"]})
    made.chat_template = CHAT
    return made


def reward(*, prompts, completions, references):
    return {"length": [len(text) for text in completions], "prompt": [hash(text) % 97 for text in prompts]}


TASK = Task(
    "talk", rows_of(0, 24), lambda row: ("ask ", row["ask"], "?"), "answer", 12, HORIZON, reward, truncation_side="left"
)
textgym.register("test/Talk-v0", TASK)
TURN = {"chat": True, "template": "Now {prompt}!", "stop": ["<|turn|>", "s"]}


def random_writer(requests):
    """Writes tokens by the request's seed alone, and knows nothing of stop strings."""
    words = np.array(tokenizer()(" red blue one hill tree sea moon stars")["input_ids"])
    return [
        Completion(
            token_ids=words[seeding.integer(0, len(words) - 1, seeding.uniform(request.seed, np.arange(9)))].tolist(),
            finished=request.seed % 2 == 0,
        )
        for request in requests
    ]


GUIDE = CallableGuide(random_writer)


def vector(n=4, **arguments):
    return TextVectorEnv(n, task=TASK, tokenizer=tokenizer(), **arguments)


def shown(observation, row):
    return observation["input_ids"][row][observation["attention_mask"][row] == 1].tolist()


@pytest.mark.parametrize("template", ["{prompt}", "Now {prompt} {{please}}!"])
@pytest.mark.parametrize("chat", [True, False])
def test_only_the_policy_reads_the_template(chat, template):
    asked = []

    def guide(requests):
        asked.extend(requests)
        return ["red"] * len(requests)

    arguments = {"guide": guide, "handoff": True}
    plain, env = vector(24, **arguments), vector(24, chat=chat, template=template, **arguments)
    before, after = plain.reset(seed=0), env.reset(seed=0)
    assert data_equivalence({**after[1], "authors": 0}, {**before[1], "authors": 0}, exact=True)
    for row, prompt in enumerate(after[1]["prompt"]):
        text = template.format(prompt=prompt)
        turns = [{"role": "user", "content": text}]
        expected = tokenizer()(text)["input_ids"]
        if chat:
            expected = tokenizer().apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert shown(after[0], row) == expected
    for made in (plain, env):
        made.step(np.full(24, 5))
    results = [made.step(np.full(24, made.vocab_size)) for made in (plain, env)]
    np.testing.assert_array_equal(results[0][1], results[1][1])
    theirs, ours = asked[:24], asked[24:]
    assert [request.prompt for request in ours] == [request.prompt for request in theirs]
    assert [list(request.prompt_ids) for request in ours] == [shown(after[0], row) for row in range(24)]
    # A text after the mark of an answer, like one after a prompt, gets a space; after white space it would not.
    assert list(results[1][4]["text"]) == list(results[0][4]["text"])


@settings(max_examples=30, deadline=None)
@given(st.integers(9, 26), st.sampled_from(["left", "right"]), st.integers(0, 23), st.booleans())
def test_truncation_leaves_the_template(columns, side, index, chat):
    template = "Now {prompt} !"
    wide = vector(1, chat=chat, template=template)
    whole = shown(wide.reset(seed=0, options={"index": index})[0], 0)
    env = vector(1, chat=chat, template=template, max_prompt_tokens=columns, truncation_side=side)
    body = tokenizer()(TASK.data[index]["ask"], add_special_tokens=False)["input_ids"]
    try:
        observation, info = env.reset(seed=0, options={"index": index})
    except ValueError:  # a token that is partly of the template is no part of the body
        assert columns <= len(whole) - len(body) + 1
        return
    ids = shown(observation, 0)
    assert len(ids) == min(columns, len(whole))
    assert not observation["attention_mask"][0, : columns - len(ids)].any()
    same_start = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), len(ids))
    kept = len(ids) - same_start
    assert kept == 0 or ids[-kept:] == whole[-kept:]  # one stretch of tokens is missing
    assert info["prompt"][0].startswith("ask ")
    assert info["prompt"][0].endswith("?")
    decoded = tokenizer().decode(ids, skip_special_tokens=True)
    assert decoded.strip() == template.format(prompt=info["prompt"][0]).strip()


def test_a_template_that_does_not_fit_says_so():
    with pytest.raises(ValueError, match="max_prompt_tokens=4 is too small"):
        vector(chat=True, max_prompt_tokens=4).reset(seed=0)
    with pytest.raises(ValueError, match="chat must be False for a tokenizer without a chat template"):
        TextVectorEnv(1, task=TASK, tokenizer=train_tokenizer(["a b"]), chat=True)
    for template in ("no place", "{prompt} {prompt}", "{other}", "{prompt} {}", 3):
        with pytest.raises(ValueError, match="template must hold"):
            vector(template=template)
    for stop in ("x", [""], [3]):
        with pytest.raises(ValueError, match="stop must be a sequence of strings"):
            vector(stop=stop)


STOPS = [("s",), ("re", "n s"), ("é",), ("<|turn|>",), ("zq", "<|turn|>", "é!")]


@pytest.mark.parametrize("stop", STOPS)
def test_an_episode_ends_with_the_token_that_completes_a_stop_string(stop):
    """Against decoding everything after every token."""
    rng = np.random.default_rng(len(stop[0]))
    n, special = 200, tokenizer().convert_tokens_to_ids("<|turn|>")
    pieces = tokenizer()("é!zqén sre")["input_ids"]
    actions = rng.integers(2, len(tokenizer()), (n, HORIZON))
    likely = rng.random((n, HORIZON)) < 0.5
    actions[likely] = rng.choice([*pieces, special], likely.sum())
    env = vector(n, stop=stop, parking=True)
    env.reset(seed=0)
    for column in actions.T:
        _, _, terminations, _, infos = env.step(column)
        if terminations.all():
            break
    reasons = []
    for row in range(n):
        length, text, reason = HORIZON, "", "length"
        for length in range(1, HORIZON + 1):
            token = actions[row, length - 1]
            if token == tokenizer().eos_token_id or (token == special and "<|turn|>" in stop):
                reason = "stop"
                break
            text = tokenizer().decode(actions[row, :length], skip_special_tokens=True)
            ends = [text.index(end) for end in stop if end in text]
            if ends:
                text, reason = text[: min(ends)], "stop"
                break
        reasons.append(reason)
        assert (infos["policy_tokens"][row], infos["text"][row]) == (length, text)
        assert infos["finish_reason"][row] == reason
        assert infos["reward_parts"]["length"][row] == len(text)
    assert 10 < reasons.count("stop") < n
    masks = vector(2, stop=stop, min_new_tokens=1)
    masks.reset(seed=0)
    assert masks.action_masks()[:, special].all() != ("<|turn|>" in stop)


GUIDED = {"guide": GUIDE, "guidance": Guidance(0.5, None, 0.5), **TURN}


def test_rows_equal_single_environments():
    n = 5
    ours = vector(n, **GUIDED)
    theirs = SyncVectorEnv([lambda: TextEnv(task=TASK, tokenizer=tokenizer(), **GUIDED)] * n)
    rng = np.random.default_rng(0)
    assert data_equivalence(ours.reset(seed=1), theirs.reset(seed=1), exact=True)
    for _ in range(60):
        actions = rng.integers(2, len(tokenizer()), n)
        assert data_equivalence(ours.step(actions), theirs.step(actions), exact=True)


def test_guides_are_cut_at_stop_strings():
    n = 60
    env = vector(n, parking=True, **GUIDED)
    _, first = env.reset(seed=4)
    assert 0 < np.count_nonzero(first["prefix_length"]) < n
    actions = np.random.default_rng(1).integers(2, len(tokenizer()), (HORIZON, n))
    for column in actions:
        observation, _, terminations, _, infos = env.step(column)
        if terminations.all():
            break
    assert set(infos["finish_reason"]) == {"stop", "length", "handoff"}
    completed = 0
    for row in range(n):
        ids = observation["input_ids"][row, -HORIZON:][observation["attention_mask"][row, -HORIZON:] == 1]
        text, earlier = tokenizer().batch_decode([ids, ids[:-1]], skip_special_tokens=True)
        assert "s" not in earlier  # nothing follows the token that completed a stop string
        assert infos["text"][row] == text.partition("s")[0]
        completed += infos["finish_reason"][row] == "handoff" and "s" in text
    assert completed > 5


def test_what_has_ended_is_no_prefix():
    env = vector(1, stop=["s"], guide=lambda requests: [" sun moon"] * len(requests), guidance={"restart_prob": 1})
    _, infos = env.reset(seed=0)
    sun = tokenizer()(" sun")["input_ids"]
    length = infos["prefix_length"][0]
    assert length < len(sun) + 1
    with pytest.raises(ValueError, match="nothing of stop"):
        env.reset(options={"prefix": " sea"})
    env.reset(options={"prefix": " blue"})
    assert (env._authors[0, :2] == Author.USER).any()


def test_a_specification_with_a_template_is_json(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    env = gym.make("test/Talk-v0", tokenizer=str(tmp_path), **TURN)
    env.spec.kwargs.pop("task", None)
    spec = EnvSpec.from_json(env.spec.to_json())
    again = gym.make("test/Talk-v0", **spec.kwargs)
    assert data_equivalence(env.reset(seed=3), again.reset(seed=3), exact=True)


def policy():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer()), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return CausalLMPolicy(GPT2LMHeadModel(config), tokenizer())


def test_batched_sampling_stops_as_single_rows_do():
    n, writer = 40, policy()
    seeds = np.arange(n, dtype=np.uint64)
    arguments = {**TURN, "parking": True, "autoreset_mode": AutoresetMode.DISABLED}
    together = collect(vector(n, **arguments), writer, seeds=seeds, reset_seed=0)
    assert {"stop", "length"} <= set(together.finish_reason)
    assert not any("s" in text for text in together.texts)
    width = together.policy_tokens.max()
    for row in range(0, n, 5):
        alone = collect(vector(1, **arguments), writer, seeds=seeds[row : row + 1], reset_seed=row)
        assert torch.equal(alone.input_ids[0], together.input_ids[row])
        assert (alone.texts[0], alone.finish_reason[0]) == (together.texts[row], together.finish_reason[row])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[row], atol=1e-5, rtol=1e-5)
    # The slow path: every token chosen anew from the observation alone.
    assert width > 1
    evaluated = writer.evaluate_actions(together.input_ids, together.attention_mask, together.columns(together.body))
    torch.testing.assert_close(evaluated.log_probs.detach(), together.log_probs, atol=1e-4, rtol=1e-4)


def test_algorithms_learn_from_what_the_policy_reads():
    env = vector(8, **TURN, parking=True, guide="references", guidance={"restart_prob": 0.5})
    agent = PPO(policy(), env, episodes_per_iteration=8, minibatch_size=4, target_coef=0.1, seed=0)
    before = [weight.clone() for weight in agent.trainable]
    agent.learn(total_episodes=16)
    assert any(not torch.equal(old, new) for old, new in zip(before, agent.trainable, strict=True))
    rollout = agent.last_rollout
    for row, example in agent.demonstrations(rollout).items():
        turns = [{"role": "user", "content": f"Now {rollout.prompts[row]}!"}]
        assert example.context == tokenizer().apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    supervised = SL(policy(), env, seed=0)
    (example,) = supervised.encode(env.data, [(3, "a text")])
    turns = [{"role": "user", "content": f"Now ask {TASK.data[3]['ask']}?!"}]
    assert example.context == tokenizer().apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("chat", [True, False])
def test_trl_gets_the_template_and_rewards_what_stands_before_a_stop_string(chat):
    env = vector(24, **{**TURN, "chat": chat}, order="sequential", parking=True)
    observation, infos = env.reset(seed=0)
    dataset = prompt_dataset(env)
    for row in range(24):
        if chat:
            ids = tokenizer().apply_chat_template(dataset[row]["prompt"], add_generation_prompt=True)["input_ids"]
        else:
            ids = tokenizer()(dataset[row]["prompt"])["input_ids"]
        assert ids == shown(observation, row)
        assert dataset[row]["task_prompt"] == infos["prompt"][row]
    actions = np.random.default_rng(0).integers(2, len(tokenizer()), (HORIZON, 24))
    for column in actions:
        _, rewards, terminations, _, _ = env.step(column)
        if terminations.all():
            break
    texts = tokenizer().batch_decode(actions.T.tolist(), skip_special_tokens=True)
    columns = {name: dataset[name] for name in ("task_prompt", "references", "sample_id")}
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    paid = reward_function(env)(
        prompts=dataset["prompt"], completions=completions, completion_ids=actions.T.tolist(), **columns
    )
    assert paid == rewards.tolist()
