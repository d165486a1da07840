"""Cached, batched sampling must be indistinguishable from one plain pass over the finished text."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from textgym.decoding import Decoding
from textgym.generation import generate
from textgym.sampling import Sampler, choose, nucleus
from textgym.seeding import uniform

VOCAB, EOS = 64, 0
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 40}
WIDE = {**SIZES, "hidden_size": 32, "intermediate_size": 64}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=40, vocab_size=VOCAB, initializer_range=0.3),
    "llama": LlamaConfig(**WIDE, num_key_value_heads=1, initializer_range=0.3),
    "qwen2": Qwen2Config(**WIDE, num_key_value_heads=2, initializer_range=0.3),
    "gpt_neox": GPTNeoXConfig(**WIDE, initializer_range=0.3),
    "opt": OPTConfig(
        **SIZES, hidden_size=32, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False, init_std=0.3
    ),
    # Caps its logits after the output embedding, and every other layer attends to a window of 6 tokens.
    "gemma2": Gemma2Config(
        **WIDE, head_dim=16, num_key_value_heads=1, sliding_window=6, final_logit_softcapping=2.0, initializer_range=0.3
    ),
}


def tiny_model(name="gpt2"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    # Biases and norms too are random, so that no part of the network is the identity.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.data.mean().item(), std=0.3)
    return model.eval()


def observations(rng, rows=9, prompt_columns=7, new_columns=12):
    """Prompts of several lengths on the left, prefixes of several lengths on the right, padding around them."""
    ids = rng.integers(1, VOCAB, (rows, prompt_columns + new_columns))
    prompt_lengths = rng.integers(1, prompt_columns + 1, rows)
    prefix_lengths = rng.integers(0, 6, rows)
    columns = np.arange(prompt_columns + new_columns)
    mask = (columns >= prompt_columns - prompt_lengths[:, None]) & (columns < prompt_columns + prefix_lengths[:, None])
    return np.where(mask, ids, 1), mask.astype(np.int8), prefix_lengths


def play(model, ids, mask, prefix_lengths, seeds, decoding, horizon, value_head=None):
    """Sample every row to EOS or the horizon; return for each its tokens, log-probabilities and values."""
    sampler = Sampler(
        model,
        ids,
        mask,
        decoding=decoding,
        seeds=seeds,
        eos_token_id=EOS,
        prefix_lengths=prefix_lengths,
        max_new_tokens=horizon,
        value_head=value_head,
    )
    texts = [([], [], []) for _ in ids]
    while len(sampler.rows):
        sample = sampler.sample()
        values = sample.values if sample.values is not None else torch.zeros(len(sampler.rows))
        for row, *entry in zip(
            sampler.rows.tolist(), sample.tokens.tolist(), sample.log_probs.tolist(), values.tolist(), strict=True
        ):
            for line, number in zip(texts[row], entry, strict=True):
                line.append(number)
        written = torch.tensor([len(texts[row][0]) + prefix_lengths[row] for row in sampler.rows.tolist()])
        sampler.keep((sample.tokens != EOS) & (written < horizon))
    return texts


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_cached_sampling_is_one_pass_over_the_text(name):
    model = tiny_model(name)
    torch.manual_seed(1)
    value_head = torch.nn.Linear(model.get_output_embeddings().weight.shape[1], 1)
    ids, mask, prefix_lengths = observations(np.random.default_rng(0))
    texts = play(model, ids, mask, prefix_lengths, np.arange(9), Decoding(temperature=1.5), 12, value_head)
    lengths = [len(tokens) for tokens, _, _ in texts]
    assert min(lengths) < max(lengths) - 3, "the test needs rows that leave early"
    states = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for row, (tokens, log_probs, values) in enumerate(texts):
        context = ids[row][mask[row] == 1].tolist()
        logits = model(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        np.testing.assert_allclose(log_probs, expected.numpy(), atol=1e-4)
        expected_values = value_head(states.pop()[0, len(context) - 1 : -1]).squeeze(-1)
        np.testing.assert_allclose(values, expected_values.numpy(), atol=1e-4)
    hook.remove()


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(),
        Decoding(top_k=5, min_new_tokens=7),
        Decoding(top_p=0.8, temperature=0.7),
        Decoding(top_k=20, top_p=0.9),
        Decoding(greedy=True),
    ],
    ids=str,
)
def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order(decoding):
    model = tiny_model()
    ids, mask, prefix_lengths = observations(np.random.default_rng(1))
    seeds = np.arange(9) * 977
    together = play(model, ids, mask, prefix_lengths, seeds, decoding, 12)
    for row in range(9):
        one = slice(row, row + 1)
        alone = play(model, ids[one], mask[one], prefix_lengths[one], seeds[one], decoding, 12)
        assert alone[0][0] == together[row][0]
    order = np.random.default_rng(2).permutation(9)
    written = generate(
        model,
        ids[order],
        mask[order],
        decoding=decoding,
        seeds=seeds[order],
        eos_token_id=EOS,
        prefix_lengths=prefix_lengths[order],
        max_new_tokens=12,
        batch_size=4,
    )
    assert written == [together[row][0] for row in order]
    for row, text in zip(order, written, strict=True):
        early = EOS in text[: max(decoding.min_new_tokens - prefix_lengths[row], 0)]
        assert not early
        assert len(text) + prefix_lengths[row] == 12 or text[-1] == EOS


def test_texts_may_use_every_position_of_the_model():
    """A row that ends early, after a long prefix, must not run beyond the last position while others go on."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=15, vocab_size=8))
    ids, mask = np.ones((9, 14), int), np.ones((9, 14), int)
    mask[1:, 3:] = 0
    prefix_lengths = np.array([11] + [0] * 8)
    texts = play(model.eval(), ids, mask, prefix_lengths, np.arange(9), Decoding(min_new_tokens=12), 12)
    assert [len(tokens) for tokens, _, _ in texts] == [1] + [12] * 8


def test_generate_keeps_each_rows_own_limit():
    model = tiny_model()
    ids, mask, _ = observations(np.random.default_rng(3))
    limits = np.array([0, 1, 2, 3, 5, 8, 12, 4, 0])
    arguments = {"decoding": Decoding(min_new_tokens=12), "seeds": np.arange(9), "eos_token_id": EOS}
    whole = generate(model, ids, mask, max_new_tokens=12, **arguments)
    cut = generate(model, ids, mask, max_new_tokens=limits, **arguments)
    assert cut == [text[:limit] for text, limit in zip(whole, limits, strict=True)]


@torch.no_grad()
def test_greedy_is_what_transformers_generates():
    model = tiny_model("llama")
    ids, mask, _ = observations(np.random.default_rng(4), new_columns=0)
    written = generate(
        model, ids, mask, decoding=Decoding(greedy=True), seeds=np.zeros(9), eos_token_id=EOS, max_new_tokens=10
    )
    expected = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=10, eos_token_id=EOS,
        pad_token_id=EOS,
    )[:, ids.shape[1] :]  # fmt: skip
    for text, line in zip(written, expected.tolist(), strict=True):
        assert text == line[: len(text)]
        assert len(text) == 10 or text[-1] == EOS


def truncated_distribution(logits, decoding):
    """The definition, in float64 and with one full sort: temperature, top-k, nucleus inside it."""
    order = np.argsort(-logits, kind="stable")
    scores = logits[order] / decoding.temperature
    if decoding.top_k:
        scores = scores[: decoding.top_k]
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    kept = int(np.searchsorted(np.cumsum(probs), decoding.top_p - 1e-12)) + 1
    result = np.zeros(len(logits))
    result[order[: len(probs)][:kept]] = probs[:kept] / probs[:kept].sum()
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.sampled_from([2, 7, 300, 3000]),
    scale=st.sampled_from([0.05, 1.0, 6.0, 60.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([1e-6, 0.5, 0.92, 1.0]),
)
def test_choices_follow_the_truncated_distribution(seed, vocabulary, scale, temperature, top_k, top_p):
    """A grid of uniform numbers must give each token as many choices as its probability, to within rounding."""
    decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = (np.random.default_rng(seed).normal(size=vocabulary) * scale).astype(np.float32)
    expected = truncated_distribution(logits.astype(np.float64), decoding)
    points = 4000
    uniforms = torch.cat([(torch.arange(points, dtype=torch.float64) + 0.5) / points, torch.tensor([0.0, 1 - 2**-53])])
    tokens = choose(torch.from_numpy(logits).expand(len(uniforms), -1), uniforms, decoding)
    frequencies = np.bincount(tokens[:points], minlength=vocabulary) / points
    # A cut of the nucleus that falls within rounding of top_p may include one token more or less.
    np.testing.assert_allclose(frequencies, expected, atol=1 / points + 1e-3)
    assert (expected[tokens.numpy()] > 0).mean() > 0.999
    assert not top_k or len(set(tokens.tolist())) <= top_k


def test_counted_draws_pass_a_chi_square_test():
    logits = torch.linspace(-1, 1, 12)
    draws = torch.from_numpy(uniform(np.arange(40_000), 3))
    observed = np.bincount(choose(logits.expand(len(draws), -1), draws, Decoding()), minlength=12)
    expected = logits.double().softmax(-1).numpy() * len(draws)
    assert ((observed - expected) ** 2 / expected).sum() < 31.3  # 0.999 quantile of chi-square with 11 degrees


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(top_k=3), Decoding(top_p=0.999)], ids=str)
def test_a_token_without_probability_is_never_chosen(decoding):
    edges = torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    impossible = torch.full((4, 40), -math.inf)
    impossible[:, 17] = 3.0
    assert choose(impossible, edges, decoding).tolist() == [17] * 4
    underflowing = torch.full((4, 40), -500.0)
    underflowing[:, [5, 9]] = 500.0
    assert set(choose(underflowing, edges, decoding).tolist()) == {5, 9}


def test_tokens_beyond_the_vocabulary_are_never_chosen_and_idle_rows_never_enter():
    model = tiny_model()
    ids, mask, prefix_lengths = observations(np.random.default_rng(5))
    ids, mask[4] = ids % 8, 0
    sampler = Sampler(
        model, ids, mask, decoding=Decoding(temperature=9.0), seeds=np.arange(9), eos_token_id=EOS,
        prefix_lengths=prefix_lengths, max_new_tokens=12, vocab_size=8,
    )  # fmt: skip
    assert sampler.rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    for _ in range(7):
        sample = sampler.sample()
        assert sample.tokens.max() < 8
        assert (sample.log_probs.exp() < 1).all()


def test_samples_can_be_constants_of_a_loss():
    model = tiny_model()
    ids, mask, prefix_lengths = observations(np.random.default_rng(6))
    value_head = torch.nn.Linear(32, 1)
    sample = Sampler(
        model, ids, mask, decoding=Decoding(), seeds=np.arange(9), eos_token_id=EOS, prefix_lengths=prefix_lengths,
        max_new_tokens=12, value_head=value_head,
    ).sample()  # fmt: skip
    weight = torch.ones(9, requires_grad=True)
    (weight * sample.log_probs * sample.values).sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0}, {"temperature": math.nan}, {"temperature": True}, {"top_k": -1}, {"top_k": 2.0},
        {"top_p": 0}, {"top_p": 1.1}, {"min_new_tokens": -1}, {"greedy": 1},
    ],
)  # fmt: skip
def test_a_wrong_decoding_is_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"Decoding\.{name} must be .* got "):
        Decoding(**arguments)


def test_wrong_arguments_are_named():
    model = tiny_model()
    ids, mask = np.ones((2, 5), int), np.ones((2, 5), int)
    common = {"decoding": Decoding(), "seeds": np.arange(2), "eos_token_id": EOS, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="can be 45 tokens long, but GPT2LMHeadModel has 40 positions"):
        Sampler(model, ids, mask, **{**common, "max_new_tokens": 40})
    with pytest.raises(ValueError, match="seeds must have one entry for each of 2 rows"):
        Sampler(model, ids, mask, **{**common, "seeds": np.arange(3)})
    with pytest.raises(ValueError, match=r"\(rows, columns\)"):
        Sampler(model, ids, mask[:1], **common)
    with pytest.raises(ValueError, match="row 1 has none"):
        generate(model, ids, mask * [[1], [0]], **common)
    sampler = Sampler(model, ids, mask, **common)
    with pytest.raises(ValueError, match="mask must be bool"):
        sampler.keep(np.array([1, 0]))
    sampler.keep(np.array([False, False]))
    with pytest.raises(ValueError, match="all rows have left"):
        sampler.sample()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([7, 300, 700]), st.sampled_from([0.05, 0.3, 0.9, 0.999]), st.booleans()
)
def test_a_nucleus_keeps_no_more_of_equal_tokens_than_it_needs(seed, vocabulary, top_p, flat):
    rng = np.random.default_rng(seed)
    scores = np.zeros((4, vocabulary)) if flat else np.round(rng.normal(0, 2, (4, vocabulary)))
    kept = nucleus(torch.tensor(scores, dtype=torch.float32), top_p).isfinite().numpy()
    for row, inside in zip(scores, kept, strict=True):
        probs = np.exp(row - row.max())
        probs /= probs.sum()
        ranked = np.argsort(-row, kind="stable")  # of equal scores the first ids
        size = inside.sum()
        assert set(np.flatnonzero(inside)) == set(ranked[:size])
        assert probs[ranked[:size]].sum() >= top_p - 1e-5
        assert probs[ranked[: size - 1]].sum() <= top_p + 1e-5


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-39, 1e-45, 1e-320])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_the_lowest_temperatures_are_greedy(temperature, truncation):
    scores = torch.randn(50, 90, generator=torch.Generator().manual_seed(0)) * 30
    scores[:, 7] = -math.inf
    uniforms = torch.rand(50, dtype=torch.float64)
    chosen = choose(scores, uniforms, Decoding(temperature=temperature, **truncation))
    assert torch.equal(chosen, scores.argmax(-1))
    assert chosen.dtype == torch.int64
