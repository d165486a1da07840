"""LongRoPE: which positions a text gets depends on its environment or its own length, never on the rows beside it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from test_policy import tiny_tokenizer
from transformers import AutoModelForCausalLM, Phi3Config

from agents import PPO, CausalLMPolicy
from agents.rollout import collect
from textgym import Task
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.guides.base import GuideRequest
from textgym.guides.local import LocalGuide
from textgym.metrics.models import Perplexity
from textgym.positions import fix_positions, short_context

VOCAB, SHORT = 64, 12
PROMPTS = [3, 9]


def model_of(seed=0):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    torch.manual_seed(seed)
    config = Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, original_max_position_embeddings=SHORT,
        initializer_range=0.4, pad_token_id=1, bos_token_id=0, eos_token_id=0,
        rope_parameters={**rope, "original_max_position_embeddings": SHORT},
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def alone(model, ids, long):
    """Log-probabilities of the tokens of one text by transformers' own forward pass, whose length decides."""
    ids = torch.as_tensor(ids)[None]
    padded = torch.nn.functional.pad(ids, (0, SHORT + 1 - ids.shape[1])) if long and ids.shape[1] <= SHORT else ids
    logits = model(padded, use_cache=False).logits[0, : ids.shape[1]].log_softmax(-1)
    return logits[:-1].gather(1, ids[0, 1:, None])[:, 0]


def env_of(columns, horizon, **arguments):
    rows = [{"p": " ".join(f"w{2 + i}" for i in range(n)), "r": "w3"} for n in PROMPTS]
    task = Task("t", rows, "{p}", "r", columns, horizon, lambda prompts, **_: [0.0] * len(prompts))
    return TextVectorEnv(8, task=task, tokenizer=tiny_tokenizer(), parking=True, **arguments)


@pytest.mark.parametrize("horizon", [3, 8])
def test_an_environment_decides_for_all_its_texts(horizon):
    reference, policy = model_of(), CausalLMPolicy(model_of(), tiny_tokenizer())
    env = env_of(9, horizon)
    agent = PPO(policy, env, episodes_per_iteration=8, device="cpu")
    assert policy.context_length == 9 + horizon
    rollout = collect(env, policy, seeds=np.arange(8, dtype=np.uint64), reset_seed=0)
    columns = rollout.columns(rollout.body)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged = policy.evaluate_actions(rollout.input_ids, rollout.attention_mask, columns).log_probs
    torch.testing.assert_close(judged, rollout.log_probs, atol=1e-4, rtol=0)
    lengths = rollout.attention_mask.sum(1)
    assert lengths.min() <= SHORT, "the test needs short texts"
    for row in range(8):
        valid = rollout.attention_mask[row] > 0
        own = alone(reference, rollout.input_ids[row][valid], long=9 + horizon > SHORT)
        written = int(rollout.body[row].sum())
        torch.testing.assert_close(judged[row][:written], own[-written:], atol=1e-4, rtol=0)
        one = slice(row, row + 1)
        by_itself = policy.evaluate_actions(rollout.input_ids[one], rollout.attention_mask[one], columns[one]).log_probs
        torch.testing.assert_close(by_itself[0], judged[row], atol=1e-4, rtol=0)
    agent.learn(total_episodes=8)


def test_without_an_environment_a_policy_reads_short_texts_and_warns_of_longer_ones(tmp_path):
    policy = CausalLMPolicy(model_of(), tiny_tokenizer())
    ids = torch.arange(2, 2 + SHORT + 2)[None]
    mask, columns = torch.ones_like(ids), torch.tensor([[SHORT - 1]])
    with pytest.warns(UserWarning, match=r"14 tokens .* texts of up to 12: set policy.context_length"):
        beside = policy.evaluate_actions(ids, mask, columns).log_probs
    mask[0, SHORT:] = 0
    torch.testing.assert_close(policy.evaluate_actions(ids, mask, columns).log_probs, beside, atol=1e-4, rtol=0)
    with pytest.warns(UserWarning, match="20 tokens"):
        policy.generate(["w2 w3"], max_new_tokens=18)
    policy.context_length = SHORT + 1
    other = policy.evaluate_actions(ids, mask, columns).log_probs
    assert (other - beside).abs().max() > 0.01, "the test needs factors that differ"
    policy.save_pretrained(tmp_path)
    loaded = CausalLMPolicy.from_pretrained(tmp_path, device="cpu")
    torch.testing.assert_close(loaded.evaluate_actions(ids, mask, columns).log_probs, other, atol=0, rtol=0)
    assert loaded.model.config.rope_parameters["rope_type"] == "longrope"


def test_a_guide_gives_each_request_the_positions_that_it_needs():
    guide, reference = LocalGuide(model_of(), decoding=Decoding(greedy=True), device="cpu"), model_of()
    reference.generation_config.eos_token_id = None
    asked = [
        GuideRequest("", tuple(range(2, 2 + n)), "", (), limit, seed)
        for seed, (n, limit) in enumerate([(3, 4), (9, 9), (9, 2), (3, 20), (5, 7)])
    ]
    written = guide.complete(asked, tiny_tokenizer())
    assert [guide.complete([request], tiny_tokenizer())[0] for request in asked] == written
    for request, completion in zip(asked, written, strict=True):
        fix_positions(reference, len(request.prompt_ids) + request.max_new_tokens)
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        chosen = reference(ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1).tolist()
        assert chosen == completion.token_ids


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_does_not_depend_on_the_batch(batch_size):
    rng, reference = np.random.default_rng(0), model_of()
    prompts, texts = ([rng.integers(2, VOCAB, n).tolist() for n in lengths] for lengths in ((3, 9, 4, 9), (5, 9, 8, 2)))
    total = sum(
        float(alone(reference, [*prompt, *text], long=False)[-len(text) :].detach().double().sum())
        for prompt, text in zip(prompts, texts, strict=True)
    )
    metric = Perplexity(model_of(), batch_size=batch_size)
    result = metric.compute(prompt_ids=prompts, prediction_ids=texts)
    assert result["perplexity"] == pytest.approx(np.exp(-total / sum(map(len, texts))), rel=1e-4)


def test_a_short_context_of_few_tokens_can_be_tried():
    config = model_of().config
    config.rope_parameters["original_max_position_embeddings"] = 6
    config.original_max_position_embeddings = 6
    assert CausalLMPolicy(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer())


def test_other_models_stay_as_they_are():
    from test_decoding import tiny_model

    for name in ("llama", "gpt2"):
        model = tiny_model(name)
        assert short_context(model) is None
        fix_positions(model, 10**6)
