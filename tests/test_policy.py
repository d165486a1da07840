"""The policy's judgements equal the plain definition, do not see padding, and survive a round trip to disk."""

import json

import numpy as np
import pytest
import torch
from conftest import evaluate_with_both
from test_decoding import CONFIGS, EOS, VOCAB, observations, tiny_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from agents.policy import CausalLMPolicy
from textgym.decoding import Decoding


def tiny_tokenizer(size=VOCAB, eos_token="w0"):
    """`size` words w0, w1, ... and no padding token."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    from tokenizers.pre_tokenizers import Whitespace

    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos_token)


def tiny_policy(name="gpt2", **arguments):
    policy = CausalLMPolicy(tiny_model(name), tiny_tokenizer(), **arguments)
    for head in policy.heads.values():
        torch.nn.init.normal_(head.weight)
        torch.nn.init.normal_(head.bias)
    return policy


def batch(seed=0):
    """Observations and the columns of some of their tokens, ragged, with holes."""
    rng = np.random.default_rng(seed)
    ids, mask, prefix_lengths = observations(rng)
    columns = np.full((9, 8), -1)
    for row, length in enumerate(prefix_lengths):
        for action in range(length):
            columns[row, action + 2] = 7 + action if rng.random() < 0.8 else -1
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(columns)


def plain(policy, ids, mask, columns):
    """Row by row, all logits, `log_softmax`."""
    results = torch.zeros(4, *columns.shape)
    states = []
    hook = policy.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for row in range(len(ids)):
        places = mask[row].nonzero().squeeze(1)
        log_probs = policy.model(ids[row, places][None]).logits[0].log_softmax(-1)
        state = states.pop()[0]
        values, guide_values = (policy.heads[name](state).squeeze(-1) for name in ("value", "guide_value"))
        for action, column in enumerate(columns[row].tolist()):
            if column >= 0:
                place = places.tolist().index(column)
                before = log_probs[place - 1]
                results[0, row, action] = before[ids[row, column]]
                results[1, row, action] = -(before.exp() * before).sum()
                results[2, row, action] = values[place - 1]
                results[3, row, action] = guide_values[place - 1]
    hook.remove()
    return results


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluate_and_its_gradients_are_those_of_the_definition(name):
    policy = tiny_policy(name)
    ids, mask, columns = batch()
    weights = torch.randn(4, *columns.shape, generator=torch.Generator().manual_seed(0))
    results = {}
    for key, judged in (
        ("evaluate", evaluate_with_both(policy, ids, mask, columns)),
        ("plain", plain(policy, ids, mask, columns)),
    ):
        assert judged.dtype == torch.float32
        policy.zero_grad()
        (weights * judged).sum().backward()
        results[key] = judged, [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    np.testing.assert_allclose(results["evaluate"][0].detach(), results["plain"][0].detach(), atol=5e-5)
    assert (results["evaluate"][0][:, columns < 0] == 0).all()
    gradients, expected = results["evaluate"][1], results["plain"][1]
    assert len(gradients) == len(expected) > 10
    for gradient, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=1e-5 * max(reference.abs().max().item(), 1))


@torch.no_grad()
def test_evaluate_sees_neither_padding_nor_the_rest_of_the_batch():
    policy = tiny_policy()
    ids, mask, columns = batch(1)
    whole = torch.stack(policy.evaluate_actions(ids, mask, columns))
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, ids.shape))
    refilled = torch.stack(policy.evaluate_actions(torch.where(mask.bool(), ids, noise), mask, columns))
    np.testing.assert_allclose(refilled, whole, atol=1e-6)
    for row in range(len(ids)):
        places = mask[row].nonzero().squeeze(1)
        first, last = int(places[0]), int(places[-1]) + 1
        shifted = torch.where(columns[row] >= 0, columns[row] - first, -1)
        alone = policy.evaluate_actions(ids[row, first:last][None], mask[row, first:last][None], shifted[None])
        np.testing.assert_allclose(torch.stack(alone)[:, 0], whole[:, row], atol=1e-5)


@torch.no_grad()
def test_sampling_records_what_evaluate_says():
    policy = tiny_policy(decoding=Decoding(top_k=9, temperature=1.3))
    ids, mask, _ = observations(np.random.default_rng(2))
    sampler = policy.sampler({"input_ids": ids, "attention_mask": mask}, seeds=np.arange(9), max_new_tokens=12)
    sample = sampler.sample()
    column = np.where(mask, np.arange(19), 0).max(1) + 1
    ids[np.arange(9), column], mask[np.arange(9), column] = sample.tokens.numpy(), 1
    judged = policy.evaluate_actions(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(column)[:, None])
    np.testing.assert_allclose(judged.log_probs.squeeze(1), sample.log_probs, atol=1e-5)
    np.testing.assert_allclose(judged.values.squeeze(1), sample.values, atol=1e-5)


def test_evaluate_refuses_tokens_that_are_not_there():
    policy = tiny_policy()
    ids, mask, columns = batch()
    first = int(mask[0].nonzero()[0])
    for column in (18, first):  # padding; and a token with nothing before it
        columns[0, 0] = column
        with pytest.raises(ValueError, match="columns must hold -1 or columns of valid tokens"):
            policy.evaluate_actions(ids, mask, columns)


def test_nothing_to_judge_is_all_zeros_with_gradients():
    policy = tiny_policy()
    ids, mask, columns = batch()
    judged = policy.evaluate_actions(ids, mask, torch.full_like(columns, -1))
    assert (torch.stack(judged) == 0).all()
    sum(part.sum() for part in judged).backward()


def test_dropout_stays_off():
    config = CONFIGS["gpt2"].__class__(**{**CONFIGS["gpt2"].to_dict(), "resid_pdrop": 0.5, "embd_pdrop": 0.5})
    policy = CausalLMPolicy(AutoModelForCausalLM.from_config(config), tiny_tokenizer()).train()
    with torch.no_grad():
        first, second = (torch.stack(policy.evaluate_actions(*batch())) for _ in range(2))
    assert torch.equal(first, second)
    assert (first[2] == 0).all(), "an untrained critic says zero"


def test_save_and_load_give_the_same_policy(tmp_path):
    policy = tiny_policy(decoding=Decoding(top_k=7, min_new_tokens=3))
    folder = tmp_path / "policy"
    policy.save_pretrained(folder)
    policy.heads["value"].weight.data.mul_(2)
    policy.save_pretrained(folder)  # replaces
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    loaded = CausalLMPolicy.from_pretrained(folder, device="cpu")
    assert loaded.decoding == policy.decoding
    assert loaded.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    with torch.no_grad():
        assert torch.equal(
            torch.stack(loaded.evaluate_actions(*batch())), torch.stack(policy.evaluate_actions(*batch()))
        )
    prompts, arguments = ["w3 w4", "w5"], {"max_new_tokens": 9, "seed": 4}
    assert loaded.generate(prompts, **arguments) == policy.generate(prompts, **arguments)

    language_model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(language_model.lm_head.weight, policy.model.lm_head.weight)
    assert len(AutoTokenizer.from_pretrained(folder)) == VOCAB
    assert CausalLMPolicy.from_pretrained(folder, decoding=Decoding(), device="cpu").decoding == Decoding()

    language_model.save_pretrained(tmp_path / "bare")
    bare = CausalLMPolicy.from_pretrained(tmp_path / "bare", tokenizer=folder, device="cpu")
    assert (bare.decoding, bare.heads["value"].weight.abs().sum()) == (Decoding(), 0)


def test_what_does_not_fit_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="tokenizer has 99 tokens, but the model's vocabulary has only 64"):
        CausalLMPolicy(model, tiny_tokenizer(99))
    with pytest.raises(ValueError, match="eos_token"):
        CausalLMPolicy(model, tiny_tokenizer(eos_token=None))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer must be"):
        CausalLMPolicy.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        CausalLMPolicy.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a hub id or a folder of a causal"):
        CausalLMPolicy.from_pretrained(tmp_path / "nothing")
    policy = tiny_policy()
    with pytest.raises(ValueError, match="can be 41 tokens long"):
        policy.generate(["w3"], max_new_tokens=40)


def test_predict_is_the_convention_of_stable_baselines():
    policy = tiny_policy(decoding=Decoding(top_k=5))
    ids, mask, _ = observations(np.random.default_rng(7))
    mask[3] = 0  # an idle row
    observation = {"input_ids": ids, "attention_mask": mask}
    greedy, _ = policy.predict(observation, deterministic=True)
    assert greedy.dtype == np.int64
    assert greedy.shape == (9,)
    assert greedy[3] == EOS
    for row in (0, 5):
        single, state = policy.predict({key: array[row] for key, array in observation.items()}, deterministic=True)
        assert (single.shape, single) == ((), greedy[row])
        assert state.tolist() == [1]
    policy.set_seed(5)
    draws = np.stack([policy.predict(observation)[0] for _ in range(40)])
    assert all(1 < len(set(column)) <= 5 for column in np.delete(draws, 3, 1).T)
    policy.set_seed(5)
    np.testing.assert_array_equal(draws[0], policy.predict(observation)[0])


def test_predict_counts_the_tokens_of_an_episode():
    policy = tiny_policy(decoding=Decoding(min_new_tokens=2))
    with torch.no_grad():  # a model that always wants to stop
        policy.model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 32))
        policy.model.lm_head.weight[EOS] = 100 * policy.model.transformer.ln_f.bias
        policy.model.transformer.ln_f.weight.zero_()
    ids, mask, _ = observations(np.random.default_rng(7))
    observation, state, starts = {"input_ids": ids, "attention_mask": mask}, None, np.ones(9, bool)
    stopped = []
    for step in range(4):
        starts[2] = step in (0, 2)  # row 2 begins again
        actions, state = policy.predict(observation, state, starts, deterministic=step % 2 == 0)
        stopped.append(actions == EOS)
        starts = np.zeros(9, bool)
    assert not np.any(stopped[:2])
    assert np.array_equal(stopped[2:], [np.arange(9) != 2] * 2)


def test_generate_does_not_depend_on_neighbours():
    policy = tiny_policy()
    first, second, third = policy.generate(["w3 w4 w5 w6 w7", "w8", "w9 w3"], max_new_tokens=9, seed=1)
    assert policy.generate(["w3 w4 w5 w6 w7"], max_new_tokens=9, seed=1) == [first]
    assert policy.generate(["w3 w4 w5 w6 w7", "w8"], max_new_tokens=9, seed=1) == [first, second]
    assert policy.generate([], max_new_tokens=9) == []
    assert not any("w0" in text.split() for text in (first, second, third))


def test_settings_are_readable(tmp_path):
    tiny_policy(decoding=Decoding(top_p=0.5)).save_pretrained(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["decoding"]["top_p"] == 0.5
