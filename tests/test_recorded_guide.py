"""Recorded completions: what a guide wrote once is a guide."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from agents import SL, CausalLMPolicy
from agents.environments import make_env
from textgym import Guidance
from textgym.guides import Author, Completion, RecordedGuide
from textgym.recording import record

ENV = "textgym/CommonGen-v0"


class Counting:
    """Writes the concepts in an order that depends on the seed, and counts what it was asked."""

    author, can_hand_off = Author.GUIDE, True

    def __init__(self, dies_after: float = np.inf) -> None:
        self.asked, self.dies_after = 0, dies_after

    def complete(self, requests, tokenizer):
        if self.asked + len(requests) > self.dies_after:
            raise ConnectionError("gone")
        self.asked += len(requests)
        texts = []
        for request in requests:
            concepts = request.prompt.split(": ")[1].split()
            order = np.random.default_rng(request.seed).permutation(len(concepts))
            texts.append(Completion(" " + " ".join(concepts[i] for i in order), finished=request.seed % 3 > 0))
        return texts


@pytest.fixture
def path(tmp_path):
    return tmp_path / "texts" / "guide.jsonl"


def test_a_recording_goes_on_where_it_ended_and_equals_one_without_a_break(path, tmp_path):
    env = make_env(ENV, num_envs=1, guide=Counting(), train_samples=20)
    assert record(env, path, completions_per_prompt=3, batch_size=4) == 60
    other = make_env(ENV, num_envs=1, guide=Counting(dies_after=30), train_samples=20)
    broken = tmp_path / "broken.jsonl"
    with pytest.raises(ConnectionError):
        record(other, broken, completions_per_prompt=3, batch_size=4)
    with broken.open("a") as file:
        file.write('{"prompt": "cut in the mid')
    other.guide.dies_after = np.inf
    assert record(other, broken, completions_per_prompt=3, batch_size=4) == 60 - 24
    assert other.guide.asked == 60
    assert broken.read_bytes() == path.read_bytes()
    assert record(env, path, completions_per_prompt=3) == 0
    assert RecordedGuide(path).fingerprint == RecordedGuide(broken).fingerprint


def test_restarts_and_distillation_read_what_the_guide_wrote(path):
    writer = make_env(ENV, num_envs=8, guide=Counting(), train_samples=12)
    record(writer, path, completions_per_prompt=2)
    record(make_env(ENV, num_envs=1, guide=Counting(), split="validation"), path)
    recorded = {entry["prompt"]: entry["completions"] for entry in map(json.loads, path.open())}
    env = make_env(ENV, num_envs=8, guide=str(path), train_samples=12, guidance=Guidance(1.0, restart_fraction=0.5))
    env.guide = pickle.loads(pickle.dumps(env.guide))
    assert len(env.data) == 12
    _, infos = env.reset(seed=0)
    assert set(infos["prompt"]) <= set(recorded)
    assert (infos["prefix_length"] > 0).all()
    for row, ids in zip(env.data.rows, env.guide_texts(range(12)), strict=True):
        text = env.tokenizer.decode(ids, skip_special_tokens=True)
        ended = ids[-1] == env.end_token_id
        assert {"text": text, "finished": ended} in recorded["".join(env.task.prompt_of(row))]
    ids = {"bos_token_id": env.eos_token_id, "eos_token_id": env.eos_token_id, "vocab_size": len(env.tokenizer)}
    policy = CausalLMPolicy(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, **ids)), env.tokenizer)
    learned = SL(policy, env, targets="guide", samples_per_prompt=2, eval_prompts=8, n_epochs=1)
    assert {sample for sample, _ in learned.train_pairs} == set(range(12))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 must be JSON"),
        (json.dumps({"prompt": "p"}), "completions"),
        (json.dumps({"prompt": "p", "completions": []}), "must not be empty"),
        (json.dumps({"prompt": "p", "completions": [{"text": 1, "finished": True}]}), "got 1 and True"),
        (json.dumps({"prompt": "p", "completions": ["text"]}), "line 1 must be JSON"),
    ],
)
def test_a_file_of_another_form_is_refused_by_line(path, line, message):
    path.parent.mkdir()
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        RecordedGuide(path)


def test_what_is_not_recorded_is_named(path):
    env = make_env(ENV, num_envs=4, guide=Counting())
    record(env, path, samples=[0])
    with pytest.raises(ValueError, match="must be a file of recorded completions that exists"):
        make_env(ENV, num_envs=4, guide="nowhere.jsonl")
    env = make_env(ENV, num_envs=4, guide=str(path), guidance=Guidance(1.0, restart_length=1))
    with pytest.raises(ValueError, match="has no completion of prompt"):
        env.reset(seed=0, options={"index": 1})
    with pytest.raises(ValueError, match="hand"):
        make_env(ENV, num_envs=4, guide=str(path), guidance=Guidance(handoff_prob=1.0))
