"""Packed tokens, shared prompts, caches, blocks of logits, half precision: each equals its slow twin."""

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import CONFIGS, EOS, VOCAB, WIDE, tiny_model
from test_policy import tiny_policy
from transformers import AutoModelForCausalLM, BloomConfig, CohereConfig, Gemma2Config, Gemma3TextConfig, MistralConfig

import agents.policy.language_model
from agents.grpo import GRPO
from agents.policy import CausalLMPolicy
from textgym.caches import PackedCache, PaddedCache
from textgym.decoding import Decoding
from textgym.generation import generate
from textgym.models import fuse_activations
from textgym.packing import can_pack, decode_packed, head, read
from textgym.precision import autocast

WINDOW = 5
OTHERS = {
    "mistral": MistralConfig(**WIDE, num_key_value_heads=1, sliding_window=WINDOW, initializer_range=0.3),
    "gemma3": Gemma3TextConfig(
        **WIDE,
        head_dim=16,
        num_key_value_heads=1,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
    ),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=VOCAB, initializer_range=0.3),
}
PACKED = {name: name not in ("gemma2", "bloom") for name in (*CONFIGS, *OTHERS)}


def model_of(name):
    if name in CONFIGS:
        return tiny_model(name)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(OTHERS[name]).eval()


def slow_states(model, text):
    """States after every token of one text, alone, as transformers computes them."""
    ids = torch.tensor([text])
    return model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[0]


def tokens_read(model):
    """Counts the tokens that go through the first layer of a model from now on."""
    assert can_pack(model)  # which is tried only once
    counts = []
    layer = next(module for module in model.modules() if type(module).__name__.endswith(("Block", "Layer")))
    layer.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[0] * args[0].shape[1]))
    return counts


@st.composite
def texts_and_states(draw):
    """Texts, some of which begin alike, and the lengths after which a state is asked; none at all for some."""
    begins = draw(st.lists(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=3))
    texts, asked = [], []
    for _ in range(draw(st.integers(1, 6))):
        begin = draw(st.sampled_from(begins))
        texts.append([*begin, *draw(st.lists(st.integers(1, VOCAB - 1), max_size=9))])
        places = st.integers(draw(st.sampled_from([1, len(begin)])), len(texts[-1]))
        asked.append(sorted(draw(st.sets(places, max_size=5))))
    return texts, asked


@functools.cache
def exact_model(name):
    """In float64 if it can be packed: what else runs is transformers alone, some of which is NaN in it."""
    return model_of(name).double() if PACKED[name] else model_of(name)


# Some models compute norms or rotations in float32, whatever the type of their weights.
TOLERANCE = {name: 1e-10 if name in ("gpt2", "opt", "gpt_neox") else 1e-4 for name in PACKED}


@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=10, deadline=None)
@given(case=texts_and_states(), seed=st.integers(0, 9))
def test_states_and_gradients_are_those_of_single_texts(name, case, seed):
    texts, asked = case
    model = exact_model(name)
    assert can_pack(model) == PACKED[name]
    order = np.random.default_rng(seed).permutation(sum(map(len, asked)))
    rows = np.repeat(np.arange(len(texts)), [len(places) for places in asked])[order]
    lengths = np.array([place for places in asked for place in places], int)[order]
    ids = torch.full((len(texts), max(map(len, texts)) + 2), 7)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    states = read(model, ids, torch.from_numpy(rows).long(), torch.from_numpy(lengths))
    if not len(rows):
        assert states.shape == (0, *slow_states(model, texts[0]).shape[1:])
        return
    alone = [slow_states(model, text) for text in texts]
    expected = torch.stack([alone[row][length - 1] for row, length in zip(rows, lengths, strict=True)])
    assert (states - expected).abs().max() <= TOLERANCE[name]
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed), dtype=states.dtype)
    parameters = list(model.get_decoder().parameters())
    gradients, references = (
        torch.autograd.grad((weights * value).sum(), parameters, allow_unused=True, materialize_grads=True)
        for value in (states, expected)
    )
    for gradient, reference in zip(gradients, references, strict=True):
        assert (gradient - reference).abs().max() <= TOLERANCE[name] * max(1, reference.abs().max())


@pytest.mark.parametrize("cache", [PackedCache, PaddedCache])
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_a_cache_gives_the_states_of_reading_anew_whoever_leaves(name, cache):
    model = exact_model(name)
    if cache is PackedCache and not PACKED[name]:
        pytest.skip("it cannot be packed")
    random = np.random.default_rng(0)
    for equal_lengths in (False, True):
        texts = [random.integers(1, VOCAB, 6 if equal_lengths else random.integers(1, 9)) for _ in range(5)]
        texts = [texts[i] for i in (0, 1, 2, 0, 3, 4, 1, 0)]
        written = {row: list(text) for row, text in enumerate(texts)}
        rows = np.arange(len(texts))
        kept = cache(model, texts, 12)
        states = kept.prefill()
        for step in range(12):
            for row, state in zip(rows, states, strict=True):
                np.testing.assert_allclose(state, slow_states(model, written[row])[-1], atol=TOLERANCE[name])
            if step in (2, 3, 7):
                stay = random.random(len(rows)) < 0.7
                stay[random.integers(len(rows))] = True
                count = stay.sum()
                order, moved = np.arange(count), np.flatnonzero(~stay[:count])
                order[moved] = count + np.flatnonzero(stay[count:])
                kept.keep(torch.from_numpy(order), torch.from_numpy(moved))
                rows = rows[order]
            tokens = random.integers(1, VOCAB, len(rows))
            for row, token in zip(rows, tokens, strict=True):
                written[row].append(token)
            states = kept.step(torch.from_numpy(tokens))
        assert len(rows) < len(texts)


@torch.no_grad()
def test_shared_tokens_are_read_once_and_padding_never():
    policy = tiny_policy()
    random = np.random.default_rng(0)
    prompts = [random.integers(1, VOCAB, length) for length in (3, 7, 5)]
    ids, mask = np.zeros((12, 20), np.int64), np.zeros((12, 20), np.int64)
    new = random.integers(2, 7, 12)
    for row in range(12):  # 4 texts of each prompt, padded on both sides
        prompt = prompts[row // 4]
        ids[row, 7 - len(prompt) : 7], mask[row, 7 - len(prompt) : 7 + new[row]] = prompt, 1
        ids[row, 7 : 7 + new[row]] = random.integers(1, VOCAB, new[row])
    columns = np.where(np.arange(13) < new[:, None], np.arange(13) + 7, -1)
    counts = tokens_read(policy.model)
    policy.evaluate_actions(*map(torch.from_numpy, (ids, mask, columns)))
    assert counts == [15 + sum(new - 1)], "prompts once, and of each text all but its last token"
    counts.clear()
    observation = {"input_ids": ids[:, :7], "attention_mask": mask[:, :7]}
    sampler = policy.sampler(observation, seeds=np.arange(12), max_new_tokens=3)
    sampler.sample()
    sampler.keep(np.arange(12) % 3 > 0)
    sampler.sample()
    assert counts == [15, 8], "prompts once, then the rows that stayed"


def test_a_minibatch_of_groups_shares_prompts_and_has_the_gradient_of_its_texts(make_env, make_policy):
    agent = GRPO(make_policy(), make_env(16), episodes_per_iteration=16, minibatch_size=8, group_size=4, device="cpu")
    rollout = agent.play()
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    for rows in agent.minibatches(torch.arange(16)):
        assert sorted((rows // 4).bincount(minlength=4).tolist()) == [0, 0, 4, 4], "groups stay together"
    prompt_tokens = rollout.attention_mask[:, : rollout.prompt_columns].sum(1)
    counts = tokens_read(agent.policy.model)
    together = agent.evaluate_actions(rollout, credit, rows)
    prompts_once = sum(int(prompt_tokens[4 * group]) for group in {*(rows // 4).tolist()})
    assert counts == [prompts_once + sum(int(rollout.policy_tokens[row]) - 1 for row in rows)]
    agent.loss(together, credit[rows], credit[rows])["loss"].backward()
    gradients = [parameter.grad.clone() for parameter in agent.trainable if parameter.grad is not None]
    agent.policy.zero_grad()
    parts = [agent.evaluate_actions(rollout, credit, row[None]) for row in rows]
    alone = type(together)(*(torch.cat(part) for part in zip(*parts, strict=True)))
    agent.loss(alone, credit[rows], credit[rows])["loss"].backward()
    expected = [parameter.grad for parameter in agent.trainable if parameter.grad is not None]
    largest = max(gradient.abs().max() for gradient in expected)
    assert len(gradients) == len(expected) > 10
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient - reference).abs().max() <= 1e-5 * largest


def shared_batch():
    """Texts of two prompts; every second column is a decision, the others are states alone."""
    random = np.random.default_rng(1)
    ids = torch.from_numpy(random.integers(1, VOCAB, (6, 14)))
    ids[:3, :6], ids[3:, :6] = ids[0, :6].clone(), ids[3, :6].clone()
    columns = torch.arange(6, 14).expand(6, 8).clone()
    columns[1, 5:] = -1
    return ids, torch.ones_like(ids), columns, (torch.arange(8) % 2 == 1).expand(6, 8)


def test_states_alone_get_no_logits_and_everything_else_is_as_ever():
    policy = tiny_policy(handoff_prob=0.3)
    ids, mask, columns, states_only = shared_batch()
    judged = []
    policy.model.get_output_embeddings().register_forward_hook(lambda _, args, output: judged.append(output.shape[-2]))
    full = policy.evaluate_actions(ids, mask, columns)
    some = policy.evaluate_actions(ids, mask, columns, None, states_only)
    assert judged == [(columns >= 0).sum(), ((columns >= 0) & ~states_only).sum()]
    assert torch.equal(full.values, some.values)
    for name in ("log_probs", "entropy"):
        np.testing.assert_allclose(
            getattr(some, name).detach(), getattr(full, name).masked_fill(states_only, 0).detach(), atol=1e-6
        )


def test_blocks_of_logits_change_nothing_and_bound_the_largest(monkeypatch):
    policy = tiny_policy()
    ids, mask, columns, _ = shared_batch()
    largest, results = [], []
    policy.model.get_output_embeddings().register_forward_hook(lambda _, args, output: largest.append(output.numel()))
    for entries in (2**24, 5 * VOCAB):
        monkeypatch.setattr(agents.policy.language_model, "_LOGITS_AT_ONCE", entries)
        largest.clear()
        policy.zero_grad()
        judged = torch.stack(policy.evaluate_actions(ids, mask, columns))
        (judged * torch.arange(1.0, 4.0)[:, None, None]).sum().backward()
        results.append((judged.detach(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
    assert max(largest) <= 5 * VOCAB
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-6)
    for gradient, reference in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(gradient, reference, atol=1e-5 * max(1, reference.abs().max().item()))


def test_half_precision_is_near_and_leaves_the_weights_alone():
    exact, half = tiny_policy(), tiny_policy(autocast=torch.bfloat16)
    weights = copy.deepcopy(half.state_dict())
    ids, mask, columns, _ = shared_batch()
    gradients, log_probs = [], []
    for policy in (exact, half):
        judged = policy.evaluate_actions(ids, mask, columns)
        assert judged.log_probs.dtype == judged.entropy.dtype == judged.values.dtype == torch.float32
        judged.log_probs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        log_probs.append(judged.log_probs.detach())
    # Weights of this model are 15 times those of a trained one; one in 2^8 is what bfloat16 tells apart.
    scale = log_probs[0].abs().max()
    assert (log_probs[0] - log_probs[1]).abs().max() < 0.05 * scale
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99

    observation = {"input_ids": ids[:, :6], "attention_mask": mask[:, :6]}
    sampler = half.sampler(observation, seeds=np.arange(6), max_new_tokens=4)
    sample = sampler.sample()
    ids[:, 6] = sample.tokens
    judged = half.evaluate_actions(ids, mask, torch.full((6, 1), 6))
    assert (judged.log_probs[:, 0] - sample.log_probs).abs().max() < 0.05 * scale
    for name, parameter in half.state_dict().items():
        assert torch.equal(parameter, weights[name])
        assert parameter.dtype == torch.float32
    half.model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sampler.sample()
    assert all(isinstance(weight, torch.nn.Parameter) for weight in half.model.transformer.h[0].mlp.c_fc.parameters())
    assert half.model.transformer.h[0].mlp.c_fc.weight.dtype == torch.float32


@pytest.mark.parametrize("wrong", [torch.float16, "bfloat16", True])
def test_a_wrong_autocast_is_named(wrong):
    with pytest.raises(ValueError, match="autocast must be None"):
        tiny_policy(autocast=wrong)


def test_how_it_computes_is_saved_with_a_policy(tmp_path):
    tiny_policy(autocast=torch.bfloat16, compile=True).save_pretrained(tmp_path / "policy")
    again = CausalLMPolicy.from_pretrained(tmp_path / "policy")
    assert (again.autocast, again.compiled, again.model.dtype) == (torch.bfloat16, True, torch.float32)
    auto = CausalLMPolicy.from_pretrained(tmp_path / "policy", dtype="auto", compile=False)
    assert (auto.autocast, auto.compiled, auto.model.dtype) == ("auto", False, torch.float32)
    assert CausalLMPolicy.from_pretrained(tmp_path / "policy", dtype=torch.float32).autocast is None


def test_fused_activations_are_the_same_function():
    model = tiny_model()
    fused = copy.deepcopy(model)
    fuse_activations(fused)
    assert type(fused.transformer.h[0].mlp.act) is not type(model.transformer.h[0].mlp.act)
    assert fused.config.to_dict() == model.config.to_dict()
    assert fused.state_dict().keys() == model.state_dict().keys()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        np.testing.assert_allclose(fused(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**WIDE, head_dim=16, num_key_value_heads=1, final_logit_softcapping=2.0, initializer_range=0.3),
        CohereConfig(**WIDE, logit_scale=0.3, initializer_range=0.3),
    ],
)
@torch.no_grad()
def test_the_head_is_the_models_own(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(9)[None]
    states = model.get_decoder()(input_ids=ids).last_hidden_state[0]
    expected = model(ids).logits[0]
    assert not torch.allclose(expected, states @ model.get_output_embeddings().weight.T)
    torch.testing.assert_close(head(model, states), expected)

    decoder = model.get_decoder()
    usual = decoder.forward
    decoder.forward = patched = lambda *args, **kwargs: usual(*args, **kwargs)  # as accelerate's hooks do
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        head(model, states)
    hook.remove()
    assert decoder.forward is patched
    torch.testing.assert_close(model(ids).logits[0], expected)


def test_packing_leaves_the_models_own_attention_in_place():
    model = tiny_model()
    usual = model.config._attn_implementation
    assert can_pack(model)
    with autocast(model.device, None), pytest.raises(AttributeError):
        decode_packed(model, torch.arange(4), torch.arange(4), object())
    assert model.config._attn_implementation == usual


def test_decoding_under_a_cache_is_that_of_the_fallback(monkeypatch):
    model = tiny_model()
    ids = np.random.default_rng(0).integers(1, VOCAB, (5, 8))
    texts = []
    for packs in (True, False):
        monkeypatch.setattr("textgym.sampling.can_pack", lambda _, packs=packs: packs)
        decoding = Decoding(top_k=20, top_p=0.9, temperature=1.2)
        texts.append(
            generate(
                model,
                ids,
                np.ones_like(ids),
                decoding=decoding,
                seeds=np.arange(5),
                eos_token_id=EOS,
                max_new_tokens=20,
            )
        )
    assert texts[0] == texts[1]
