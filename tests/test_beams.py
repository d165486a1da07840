"""Beam search: the most probable text, for evaluations and `generate`, and never for what is learned from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import tyro
from test_decoding import EOS, VOCAB, observations
from test_local_guide import requests
from test_models import T, model_of, policy_of, texts_of
from test_policy import tiny_tokenizer

from agents import PPO, SL, CausalLMPolicy, TabularPolicy, evaluate
from agents.evaluation import main
from textgym.decoding import Decoding
from textgym.generation import BeamSearch, generate, write
from textgym.guides.local import LocalGuide
from textgym.seq2seq import decoder_start
from textgym.tasks.lock import CombinationLock

FAMILIES = ["gpt2", "llama", "gemma2", "t5", "bart"]
BEAMS = Decoding(num_beams=4)


def search(policy, ids, mask, prefix_lengths, decoding=BEAMS, horizon=T):
    sampler = policy.sampler(
        {"input_ids": ids, "attention_mask": mask}, seeds=np.zeros(len(ids)), prefix_lengths=prefix_lengths,
        max_new_tokens=horizon, decoding=decoding, values=False,
    )  # fmt: skip
    return write(sampler, horizon - prefix_lengths, EOS)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_with_beams_for_every_token_it_is_the_most_probable_text(name):
    """All texts of two tokens, by the definition: the highest log-probability a token, EOS counted."""
    policy = policy_of(name)
    ids, mask, prefix_lengths = observations(np.random.default_rng(0))
    written = search(policy, ids, mask, prefix_lengths, Decoding(num_beams=VOCAB), prefix_lengths + 2)
    for row, (prompt, prefix) in enumerate(texts_of(ids, mask)):
        begun = [*prompt, *prefix]
        if name in ("t5", "bart"):
            start = decoder_start(policy.model)
            inputs = {"input_ids": torch.tensor([prompt] * VOCAB)}
            texts = torch.tensor([[*start, *prefix, token] for token in range(VOCAB)])
            logits = policy.model(**inputs, decoder_input_ids=texts).logits[:, -2:]
        else:
            logits = policy.model(torch.tensor([[*begun, token] for token in range(VOCAB)])).logits[:, -2:]
        first, second = logits[0, 0].log_softmax(-1), logits[:, 1].log_softmax(-1)
        scores = (first[:, None] + second) / 2
        scores[EOS] = -torch.inf
        best = divmod(int(scores.argmax()), VOCAB)
        expected = [EOS] if first[EOS] > scores.max() else list(best)
        assert written[row] == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_what_transformers_finds_for_it_alone(name):
    policy, model = policy_of(name), model_of(name)
    ids, mask, prefix_lengths = observations(np.random.default_rng(1))
    decoding = Decoding(num_beams=4, min_new_tokens=3)
    model.generation_config.length_penalty = 3.0  # what a model brings along is not used
    written = search(policy, ids, mask, prefix_lengths, decoding)
    model.generation_config.length_penalty = None
    for row, (prompt, prefix) in enumerate(texts_of(ids, mask)):
        inputs = {"input_ids": torch.tensor([[*prompt, *prefix]])}
        if name in ("t5", "bart"):
            inputs = {"input_ids": torch.tensor([prompt])}
            inputs["decoder_input_ids"] = torch.tensor([[*decoder_start(model), *prefix]])
        before = list(inputs.values())[-1].shape[1]
        limit = T - len(prefix)
        found = model.generate(
            **inputs, num_beams=4, do_sample=False, max_new_tokens=limit, min_new_tokens=max(3 - len(prefix), 0),
            eos_token_id=EOS, pad_token_id=EOS, forced_bos_token_id=None,
        )[0, before:].tolist()  # fmt: skip
        found = found[: found.index(EOS) + 1] if EOS in found else found
        assert written[row] == found
        assert EOS not in found[: max(3 - len(prefix), 0)]
    assert len({len(text) for text in written}) > 1


def test_rows_leave_before_the_search_and_in_it():
    policy = policy_of("gpt2")
    ids, mask, prefix_lengths = observations(np.random.default_rng(2))
    texts = search(policy, ids, mask, prefix_lengths)
    sampler = policy.sampler(
        {"input_ids": ids, "attention_mask": mask}, seeds=np.arange(9), prefix_lengths=prefix_lengths,
        max_new_tokens=T, decoding=BEAMS, values=False,
    )  # fmt: skip
    assert isinstance(sampler, BeamSearch)
    sampler.keep(np.arange(9) % 4 != 0)
    for step in range(3):
        rows, sample = sampler.rows, sampler.sample()
        expected = [texts[row][step] if step < len(texts[row]) else EOS for row in rows]
        assert sample.tokens.tolist() == expected
        assert sample.log_probs.isnan().all()
        sampler.keep(rows != rows[0])
    assert len(sampler.rows) == 3


def test_tokens_beyond_the_vocabulary_are_never_found():
    ids, mask, _ = observations(np.random.default_rng(5), new_columns=0)
    arguments = {"decoding": BEAMS, "seeds": np.zeros(9), "eos_token_id": -1, "max_new_tokens": 6}
    free, bound = (generate(model_of("gpt2"), ids % 8, mask, vocab_size=size, **arguments) for size in (None, 8))
    assert max(map(max, free)) >= 8 > max(map(max, bound))
    assert {len(text) for text in bound} == {6}, "without an EOS a text ends at its limit"


def test_guides_can_search():
    asked, words = requests(8), tiny_tokenizer()
    guide = LocalGuide(model_of("t5"), decoding=BEAMS, device="cpu", batch_size=3)
    written = guide.complete(asked, words)
    assert [guide.complete([request], words)[0] for request in asked] == written


def test_an_evaluation_with_beams_is_what_generate_writes(make_env, make_policy, tmp_path, capsys):
    policy, decoding = make_policy(), Decoding(num_beams=3, min_new_tokens=2)
    results = [evaluate(policy, make_env(rows, split="test"), decoding=decoding) for rows in (5, 37)]
    texts = policy.generate(results[0].prompts, max_new_tokens=6, decoding=decoding)
    sampled = evaluate(policy, make_env(16, split="test"))
    for result in results:
        assert result.completions == texts
        assert result.to_dict()["decoding"]["num_beams"] == 3
    assert results[0].rewards.tolist() == results[1].rewards.tolist() != sampled.rewards.tolist()
    policy.decoding = Decoding(min_new_tokens=2)
    policy.save_pretrained(tmp_path / "policy")
    command = ["--policy", str(tmp_path / "policy"), "--env", make_env(1).spec.id, "--num-prompts", "9"]
    tyro.cli(main, args=[*command, "--num-beams", "3"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["decoding"] == results[0].to_dict()["decoding"]


def test_an_algorithm_samples_and_evaluates_with_beams(make_env, make_policy):
    policy = make_policy()
    policy.decoding = BEAMS
    agent = PPO(
        policy, make_env(8), episodes_per_iteration=8, decoding=Decoding(min_new_tokens=2), eval_every=1, eval_prompts=8
    )
    agent.learn(total_episodes=8)
    assert agent.evaluate().decoding == BEAMS
    assert agent.history[0]["eval/reward"] == agent.evaluate().reward
    SL(policy, make_env(4), episodes_per_iteration=16)  # which draws nothing


def test_where_beams_cannot_be_is_named(make_env, make_policy):
    policy, env = make_policy(), make_env(8)
    with pytest.raises(ValueError, match="decoding must have num_beams=1 for training"):
        PPO(policy, env, episodes_per_iteration=8, decoding=BEAMS)
    with pytest.raises(ValueError, match="best_of must be 1 with greedy decoding or beams"):
        evaluate(policy, env, decoding=BEAMS, best_of=2)
    observation, _ = env.reset(seed=0)
    arguments = {"seeds": np.arange(8), "max_new_tokens": 3, "decoding": BEAMS}
    with pytest.raises(ValueError, match="num_beams must be 1 where values or entropies are recorded"):
        policy.sampler(observation, **arguments)
    handing = CausalLMPolicy(policy.model, policy.tokenizer, handoff_prob=0.1)
    with pytest.raises(ValueError, match="or a policy can hand off"):
        handing.sampler(observation, values=False, **arguments)
    assert handing.generate(["red"], max_new_tokens=3, decoding=BEAMS)
    policy.decoding = BEAMS
    with pytest.raises(ValueError, match="num_beams=1 to predict"):
        policy.predict(observation)
    policy.predict(observation, deterministic=True)
    tabular = TabularPolicy.for_lock(CombinationLock())
    with pytest.raises(ValueError, match="num_beams must be 1 where single tokens"):
        tabular.generate([tabular.tokenizer.decode([2])], max_new_tokens=3, decoding=BEAMS)
    for wrong in ({"top_k": 3}, {"temperature": 0.5}, {"top_p": 0.9}, {"greedy": True}):
        with pytest.raises(ValueError, match=r"Decoding\.num_beams must be 1 with"):
            Decoding(num_beams=2, **wrong)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"Decoding\.num_beams must be an int >= 1"):
            Decoding(num_beams=wrong)
