"""Sequence-to-sequence policies do what causal ones do: in every algorithm, from disk, as guides."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from conftest import ENV_ID, HORIZON, PROMPT_TOKENS, evaluate_with_both
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithms import make_agent, numbers
from test_sb3_policy import lively, one_by_one, transitions
from tokenizers import processors
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from agents import ALGORITHMS, GRPO, PPO, SL, CausalLMPolicy, Seq2SeqPolicy, evaluate
from agents.sb3 import CausalLMActorCriticPolicy, Portable, TextVecEnv
from agents.sb3.policies import _Texts
from agents.supervised import supervised_loss
from textgym import Guidance
from textgym.decoding import Decoding
from textgym.guides import GuideRequest
from textgym.guides.local import LocalGuide
from textgym.precision import autocast
from textgym.seq2seq import Seq2SeqCache, decoder_start
from textgym.tokenization import encode_prompts


@pytest.fixture(params=["t5", "bart"])
def family(request):
    return request.param


@pytest.fixture
def make_policy(words_tokenizer, family):
    """Make a tiny sequence-to-sequence policy with random weights, and rows of its vocabulary beyond the tokenizer."""

    def make(seed: int = 0, **arguments) -> Seq2SeqPolicy:
        torch.manual_seed(seed)
        shared = {"vocab_size": len(words_tokenizer) + 4, "d_model": 32, "pad_token_id": words_tokenizer.pad_token_id}
        shared |= {"eos_token_id": words_tokenizer.eos_token_id, "decoder_start_token_id": words_tokenizer.pad_token_id}
        if family == "t5":
            config = T5Config(**shared, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
            model = T5ForConditionalGeneration(config)
        else:
            config = BartConfig(
                **shared, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=PROMPT_TOKENS, forced_eos_token_id=None,
            )  # fmt: skip
            model = BartForConditionalGeneration(config)
        return Seq2SeqPolicy(model, words_tokenizer, **arguments)

    return make


NAMES = [*sorted(ALGORITHMS), "ppo with a hand-off", "ppo with a critic of its own and schedules", "guided rloo"]


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_trains_and_resumes(name, make_env, make_policy, tmp_path):
    arguments = {} if name == "sl" else {"target_coef": 0.1}
    whole = make_agent(name, make_env, make_policy, **arguments)
    start = copy.deepcopy(whole.policy.state_dict())
    whole.learn(total_episodes=48)
    assert any(
        not torch.equal(weight, start[key]) for key, weight in whole.policy.model.state_dict(prefix="model.").items()
    )
    part = make_agent(name, make_env, make_policy, **arguments)
    part.learn(total_episodes=32)
    part.save(tmp_path / "checkpoint")
    resumed = type(part).load(tmp_path / "checkpoint", part.env)
    assert isinstance(resumed.policy, Seq2SeqPolicy)
    assert numbers(resumed.learn(total_episodes=16).history) == numbers(whole.history)


def test_ppo_learns_the_small_task(make_env, make_policy):
    agent = PPO(make_policy(), make_env(32), episodes_per_iteration=32, learning_rate=3e-3, kl_coef=0.0, seed=1)
    agent.learn(total_episodes=32 * 20)
    rewards = [record["reward"] for record in agent.history]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    assert evaluate(agent, make_env(16, split="test")).reward > np.mean(rewards[:3]) + 0.2


def test_supervised_loss_is_the_likelihood_under_transformers_forward_pass(make_env, make_policy):
    agent = SL(make_policy(), make_env(4), episodes_per_iteration=60, n_epochs=20, learning_rate=1e-2)
    examples, model = agent.validation_examples[:7], agent.policy.model
    assert len({len(example.context) for example in examples}) > 1
    total, count, start = 0.0, 0, decoder_start(model)
    for context, target in examples:
        logits = model(
            input_ids=torch.tensor([context]), decoder_input_ids=torch.tensor([[*start, *target[:-1]]])
        ).logits
        log_probs = logits[0, len(start) - 1 :].double().log_softmax(-1)
        total -= log_probs.gather(1, torch.tensor(target)[:, None]).sum().item()
        count += len(target)
    assert supervised_loss(agent.policy, examples, 1).item() == pytest.approx(total / count, rel=1e-5)
    losses = [agent.validation_loss(), agent.learn().validation_loss()]
    assert losses[1] < 0.7 * losses[0]
    with pytest.raises(ValueError, match='loss_on must be "completion" for a sequence-to-sequence'):
        SL(make_policy(), make_env(4), loss_on="text")


def test_the_encoder_reads_each_prompt_once(make_env, make_policy):
    agent = GRPO(make_policy(), make_env(16), episodes_per_iteration=16, minibatch_size=8, group_size=4, device="cpu")
    read = []
    agent.policy.model.get_encoder().register_forward_pre_hook(
        lambda _, args, inputs: read.append(inputs["attention_mask"].sum().item()), with_kwargs=True
    )
    rollout = agent.play()
    prompts = rollout.attention_mask[:, : rollout.prompt_columns].sum(1)
    assert read == [sum({text: int(n) for text, n in zip(rollout.prompts, prompts, strict=True)}.values())]
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    for rows in agent.minibatches(torch.arange(16)):
        read.clear()
        agent.evaluate_actions(rollout, credit, rows)
        assert read == [sum({rollout.prompts[row]: int(prompts[row]) for row in rows.tolist()}.values())]


def test_gradients_are_those_of_single_texts(make_env, make_policy):
    """Shared encoder states, padding, prefixes, hand-offs: none of them is seen in a gradient."""
    agent = make_agent("ppo with a hand-off", make_env, make_policy, device="cpu")
    agent.env.reset(options={"guidance": Guidance(restart_prob=0.5)})
    rollout = agent.play()
    policy = agent.policy.double()
    weights = torch.randn(4, *rollout.log_probs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for parts in ([torch.arange(16)], torch.arange(16).split(1)):
        policy.zero_grad()
        for rows in parts:
            columns = rollout.columns(rollout.decisions)[rows]
            texts = rollout.input_ids[rows], rollout.attention_mask[rows], columns, rollout.handoffs[rows]
            (evaluate_with_both(policy, *texts) * weights[:, rows]).sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-6 * reference.abs().max().item() + 1e-12)


def test_paths_are_enough(make_env, make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path / "policy")
    make_policy(seed=1).save_pretrained(tmp_path / "guide")
    env = make_env(8, guide=str(tmp_path / "guide"))
    agent = ALGORITHMS["lols"](str(tmp_path / "policy"), env, episodes_per_iteration=8).learn(total_episodes=24)
    assert isinstance(agent.policy, Seq2SeqPolicy)
    assert agent.num_guide_tokens > 0
    with pytest.raises(ValueError, match="make it a Seq2SeqPolicy"):
        CausalLMPolicy.from_pretrained(tmp_path / "policy")


def test_prompts_carry_what_the_tokenizer_puts_around_a_text(make_env, make_policy, words_tokenizer):
    ended = copy.deepcopy(words_tokenizer)
    end = (ended.eos_token, ended.eos_token_id)
    ended._tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    plain = dict(encode_prompts(words_tokenizer, [("", "red sun", "")], 8))
    assert dict(encode_prompts(ended, [("", "red sun", "")], 8)) == {"red sun": [*plain["red sun"], end[1]]}
    for side, text in (("right", "red one two"), ("left", "red two sun")):
        [(kept, ids)] = encode_prompts(ended, [("red", " one two sun", "")], 4, side)
        assert kept == text
        assert ids == [*words_tokenizer(text)["input_ids"], end[1]]
    with pytest.raises(ValueError, match="at least one token"):
        encode_prompts(ended, [("", "", "")], 8)

    policy = make_policy()
    policy.tokenizer = ended
    read = []
    policy.model.get_encoder().register_forward_pre_hook(
        lambda _, args, inputs: read.append(inputs["input_ids"].tolist()), with_kwargs=True
    )
    policy.generate(["red sun"], max_new_tokens=2)
    assert read == [[[*plain["red sun"], end[1]]]]


def test_a_guide_with_another_vocabulary_reads_and_writes_text(make_policy, words_tokenizer):
    policy = make_policy(seed=3)
    guide = LocalGuide(policy.model, tokenizer=words_tokenizer, decoding=Decoding(greedy=True))
    other = copy.deepcopy(words_tokenizer)
    other.add_tokens(["unheard"])
    ids = words_tokenizer(" red")["input_ids"]
    asked = [GuideRequest("sun moon", (5, 6), "", (), 4, 1), GuideRequest("sun moon", (5, 6), " red red", (7, 7), 3, 1)]
    written = guide.complete(asked, other)
    prompt = words_tokenizer("sun moon")["input_ids"]
    for begun, completion in zip(([], ids * 2), written, strict=True):
        new = list(begun)
        while len(new) < len(begun) + 4 and words_tokenizer.eos_token_id not in new:
            decoded = torch.tensor([[*decoder_start(policy.model), *new]])
            logits = policy.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoded).logits[0, -1]
            new.append(int(logits[: len(words_tokenizer)].argmax()))
        whole, before = (words_tokenizer.decode(part, skip_special_tokens=True) for part in (new, begun))
        assert whole[len(before) :].startswith(completion.text)
        assert completion.text
    assert [guide.complete([request], other)[0] for request in asked] == written


def test_what_does_not_fit_is_named(make_env, make_policy, family):
    policy = make_policy()
    ids = torch.ones(1, PROMPT_TOKENS + HORIZON, dtype=torch.int64)
    with pytest.raises(ValueError, match="prompt_columns must be set"):
        policy.evaluate_actions(ids, ids, torch.tensor([[PROMPT_TOKENS]]))
    policy.prompt_columns = PROMPT_TOKENS
    with pytest.raises(ValueError, match="columns from 8"):
        policy.evaluate_actions(ids, ids, torch.tensor([[PROMPT_TOKENS - 1]]))
    if family == "bart":
        with pytest.raises(ValueError, match="prompt or new tokens can be 10 tokens long"):
            policy.generate(["red sun"], max_new_tokens=9)
    start = policy.model.generation_config
    start.decoder_start_token_id = start.bos_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        policy.generate(["red sun"], max_new_tokens=2)


def test_texts_of_different_lengths_are_tried_once_for_each_precision(make_policy, monkeypatch):
    model, tried = make_policy().model, []

    def only_in_single(ours, theirs, **arguments):
        tried.append(arguments["dtype"])
        return arguments["dtype"] is None

    monkeypatch.setattr("textgym.seq2seq.nearly_equal", only_in_single)
    ragged = [(np.array([3, 4]), np.array(new)) for new in ([], [5])]
    for _ in range(2):
        Seq2SeqCache(model, ragged, 1)
        with (
            autocast(model.device, torch.bfloat16),
            pytest.raises(ValueError, match="continue texts of different lengths together"),
        ):
            Seq2SeqCache(model, ragged, 1)
    assert tried == [None, torch.bfloat16]


def test_predict_knows_the_prefix_by_the_columns(make_env, make_policy):
    policy, env = make_policy(), make_env(6)
    policy.prompt_columns = PROMPT_TOKENS
    observation, _ = env.reset(seed=1, options={"prefix": [[5] * n or None for n in range(6)]})
    actions, _ = policy.predict(observation, deterministic=True)
    sampler = policy.sampler(
        observation, seeds=np.arange(6), max_new_tokens=HORIZON, prefix_lengths=np.arange(6),
        decoding=Decoding(greedy=True),
    )  # fmt: skip
    assert actions.tolist() == sampler.sample().tokens.tolist()


def test_stable_baselines3_reads_and_trains_it(words_tokenizer, make_policy, tmp_path):
    guided = {"guide": "references", "guidance": {"restart_prob": 0.5}}  # decoders begin at different lengths
    envs = TextVecEnv(gym.make_vec(ENV_ID, num_envs=4, tokenizer=words_tokenizer, **guided))
    policy = lively(make_policy())
    arguments = {"model": policy, "prompt_columns": PROMPT_TOKENS}
    with pytest.raises(ValueError, match="prompt_columns must be given where the model encodes prompts"):
        CausalLMActorCriticPolicy(envs.observation_space, envs.action_space, lambda _: 1e-3, model=policy)
    inside = CausalLMActorCriticPolicy(envs.observation_space, envs.action_space, lambda _: 1e-3, **arguments)
    obs, actions = transitions(envs)
    expected = one_by_one(policy, obs, actions)
    values, log_probs, entropy = inside.evaluate_actions(obs, actions)
    for ours, theirs in zip(expected, (log_probs, entropy, values[:, 0]), strict=False):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inside.predict_values(obs)[:, 0], expected[2], atol=1e-5, rtol=1e-5)
    # A distribution over actions leaves out the rows of the vocabulary beyond the tokenizer.
    every = inside._log_probs(inside._states(obs))
    torch.testing.assert_close(every.gather(1, actions[:, None])[:, 0], expected[0], atol=1e-5, rtol=1e-5)
    distribution = inside.get_distribution(obs).distribution
    torch.testing.assert_close(distribution.logits, every.log_softmax(1), atol=1e-5, rtol=1e-5)
    texts = _Texts(obs["input_ids"], obs["attention_mask"], prompt_columns=PROMPT_TOKENS)
    assert len(texts.input_ids) < len(actions) / 2, "texts are shared"

    model = stable_baselines3.PPO(
        CausalLMActorCriticPolicy, envs, n_steps=2 * HORIZON, batch_size=24, n_epochs=1, seed=3, device="cpu",
        policy_kwargs={"model": Portable(policy), "prompt_columns": PROMPT_TOKENS},
    )  # fmt: skip
    before = copy.deepcopy(policy.state_dict())
    model.learn(2 * HORIZON * 4)
    # What was sampled a token a step is what the update read.
    buffer = model.rollout_buffer
    assert any(not torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    policy.load_state_dict(before)
    seen = {name: torch.from_numpy(array) for name, array in buffer.observations.items()}
    now = inside.evaluate_actions(seen, torch.from_numpy(buffer.actions).long().flatten())
    np.testing.assert_allclose(now[1].detach(), buffer.log_probs.flatten(), atol=1e-4)
    np.testing.assert_allclose(now[0].detach().flatten(), buffer.values.flatten(), atol=1e-4)

    model.save(tmp_path / "ppo")
    loaded = stable_baselines3.PPO.load(tmp_path / "ppo", env=envs)
    arrays = {name: array.numpy() for name, array in obs.items()}
    choices = [each.predict(arrays, deterministic=True)[0] for each in (model, loaded)]
    np.testing.assert_array_equal(*choices)
    loaded.learn(2 * HORIZON * 4)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=3), st.lists(st.integers(1, 2), max_size=3)))
)
def test_texts_share_a_row_only_with_the_same_prompt(pairs):
    ids, mask = torch.zeros(2, len(pairs) + 1, 6, dtype=torch.long)
    for row, (prompt, new) in enumerate([([1], []), *pairs]):
        ids[row, 3 - len(prompt) : 3 + len(new)] = torch.tensor([*prompt, *new])
        mask[row, 3 - len(prompt) : 3 + len(new)] = 1
    texts = _Texts(ids, mask, prompt_columns=3)
    for row, (prompt, new) in enumerate([([1], []), *pairs]):
        shared, entry = texts._row[row], texts._entry[row]
        end = texts.columns[shared, entry]
        assert end == 3 + len(new)
        valid = texts.attention_mask[shared, :end]
        assert texts.input_ids[shared, :end][valid].tolist() == [*prompt, *new]
        assert valid[:3].tolist() == (mask[row, :3] == 1).tolist()
