"""Adapters: only they and the heads are trained, the base is there once, and PEFT's own folder is what is saved."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_algorithms import numbers

from agents import GRPO, PPO, SL, LanguageModelPolicy
from agents.rollout import collect
from textgym.guides.local import LocalGuide
from textgym.models import load_model

peft = pytest.importorskip("peft")
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration  # noqa: E402

LORA = {"r": 4, "lora_alpha": 16}


@pytest.fixture(params=["gpt2", "t5"])
def base(request, make_policy, words_tokenizer, tmp_path):
    """The folder of a base model."""
    if request.param == "gpt2":
        model = make_policy().model
    else:
        torch.manual_seed(0)
        ends = {"pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=len(words_tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, **ends)
        )
    model.save_pretrained(tmp_path / "base")
    words_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base, **arguments):
    return LanguageModelPolicy.from_pretrained(base, device="cpu", lora=LORA, **arguments)


def randomised(policy, scale=0.3):
    """Adapters and heads that say something."""
    torch.manual_seed(1)
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data += scale * torch.randn_like(weight)
    return policy


def judged(policy, make_env):
    """What a policy says of one fixed set of episodes."""
    env = make_env(8)
    policy.prompt_columns = env.max_prompt_tokens
    writer = policy.copy()
    rollout = collect(env, writer, seeds=np.arange(8), reset_seed=1)
    batch = rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.decisions)
    return batch, rollout.log_probs


@torch.no_grad()
def test_fresh_adapters_change_nothing_and_are_always_the_same(base, make_env):
    plain, first, second = LanguageModelPolicy.from_pretrained(base, device="cpu"), adapted(base), adapted(base)
    batch, recorded = judged(first, make_env)
    plain.prompt_columns = first.prompt_columns
    assert torch.equal(plain.evaluate_actions(*batch).log_probs, first.evaluate(*batch).log_probs)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    trained = {name for name, weight in first.named_parameters() if weight.requires_grad}
    assert trained == {n for n in first.state_dict() if "lora_" in n or n.startswith("heads.")}
    draws = []
    for options in ({"lora": LORA}, {}):  # adapters are drawn from a seed of their own
        torch.manual_seed(5)
        LanguageModelPolicy.from_pretrained(base, device="cpu", **options)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)
    policy = randomised(first)
    batch, recorded = judged(policy, make_env)
    assert (policy.evaluate_actions(*batch).log_probs - plain.evaluate_actions(*batch).log_probs).abs().max() > 0.1
    np.testing.assert_allclose(policy.evaluate_actions(*batch).log_probs, recorded, atol=1e-4)


@torch.no_grad()
def test_it_is_what_peft_computes(base, make_env):
    """The base, opened by PEFT with the saved adapters, has the policy's log-probabilities; merged it does too."""
    policy = randomised(adapted(base))
    batch, _ = judged(policy, make_env)
    policy.save_pretrained(base.parent / "policy")
    saved = {path.name for path in (base.parent / "policy").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "heads.safetensors"} <= saved
    assert "model.safetensors" not in saved
    kind = AutoModelForSeq2SeqLM if policy.encodes_prompts else AutoModelForCausalLM
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(base), base.parent / "policy")
    wrapped = type(policy)(model, policy.tokenizer)
    opened = type(policy)(kind.from_pretrained(base.parent / "policy"), policy.tokenizer)
    expected = policy.evaluate_actions(*batch)
    merged = policy.merged()
    merged.save_pretrained(base.parent / "merged")
    again = LanguageModelPolicy.from_pretrained(base.parent / "merged", device="cpu")
    assert not [name for name in again.state_dict() if "lora" in name]
    for other in (wrapped, opened, merged, again):
        other.prompt_columns = policy.prompt_columns
        np.testing.assert_allclose(other.evaluate_actions(*batch).log_probs, expected.log_probs, atol=1e-4)
    np.testing.assert_allclose(again.evaluate_actions(*batch).values, expected.values, atol=1e-4)
    # What PEFT saves of its own wrapping is what we saved.
    model.save_pretrained(base.parent / "by peft")
    ours, theirs = (peft.load_peft_weights(base.parent / name) for name in ("policy", "by peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(params=["float32", "bfloat16", "4bit"])
def precision(request):
    if request.param == "4bit":
        pytest.importorskip("bitsandbytes")
        return {"quantization": "4bit"}
    return {"dtype": getattr(torch, request.param)}


def test_training_moves_only_adapters_and_heads_and_resumes_exactly(base, make_env, precision, tmp_path):
    def make():
        policy = adapted(base, **precision)
        return PPO(policy, make_env(8), episodes_per_iteration=8, device="cpu", critic="separate", kl_target=0.1,
                   learning_rate=1e-2)  # fmt: skip

    whole = make()
    before = copy.deepcopy(whole.policy.state_dict())
    whole.learn(total_episodes=40)
    moved = {name for name, weight in whole.policy.state_dict().items() if not torch.equal(weight, before[name])}
    assert any("lora_" in name for name in moved)
    assert all("lora_" in name or name.startswith("heads.") for name in moved)
    assert all(weight.dtype == torch.float32 for weight in whole.trainable)
    reference = whole.reference.state_dict()
    assert all(torch.equal(reference[name], weight) for name, weight in before.items())
    frozen = {name: weight for name, weight in whole.policy.named_parameters() if not weight.requires_grad}
    for other in (whole.reference, whole.value_function.network):
        shared = dict(other.named_parameters())
        assert all(shared[name] is weight for name, weight in frozen.items()), "the base is there once"
        own = [weight for name, weight in shared.items() if name not in frozen]
        assert not {weight.data_ptr() for weight in own} & {weight.data_ptr() for weight in whole.policy.parameters()}

    part = make().learn(total_episodes=24)
    part.save(tmp_path / "checkpoint")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint" / "training").iterdir()}
    assert max(sizes[name] for name in ("reference.safetensors", "critic.safetensors")) < 60_000
    resumed = PPO.load(tmp_path / "checkpoint", part.env, device="cpu").learn(total_episodes=16)
    assert numbers(resumed.history) == numbers(whole.history)
    for name, weight in resumed.policy.state_dict().items():
        assert torch.equal(weight, whole.policy.state_dict()[name])


def test_supervised_learning_puts_back_the_best_adapters(base, make_env):
    agent = SL(adapted(base), make_env(4), n_epochs=60, episodes_per_iteration=60, learning_rate=3e-2)
    start = agent.validation_loss()
    agent.learn()
    losses = [record["validation_loss"] for record in agent.history]
    assert agent.validation_loss() == pytest.approx(min(losses), abs=1e-6)
    assert min(losses) < 0.96 * start
    assert all("lora_" in name or name.startswith("heads.") for name in agent.best_state)


def test_a_guide_can_be_the_same_base(base, make_env):
    policy = adapted(base)
    guide = LocalGuide(policy.model, device="cpu")
    env = make_env(16, guide=guide)
    agent = GRPO(policy, env, episodes_per_iteration=16, beta=1.0, learning_rate=1e-2, device="cpu")
    before = guide.fingerprint
    agent.learn(total_episodes=32)
    assert agent.num_guide_tokens > 0
    own = dict(guide._model.named_parameters())
    frozen = [name for name, weight in policy.model.named_parameters() if not weight.requires_grad]
    assert all(own[name] is policy.model.get_parameter(name) for name in frozen)
    guide._fingerprint = None
    assert guide.fingerprint == before, "training the policy's adapters does not move the guide"


def test_adapters_from_a_folder_guide_too(base, make_env):
    policy = randomised(adapted(base))
    policy.save_pretrained(base.parent / "policy")
    model = load_model(base.parent / "policy", device="cpu")
    state = policy.model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    env = make_env(8, guide=str(base.parent / "policy"))
    agent = GRPO(policy, env, episodes_per_iteration=8, beta=1.0, device="cpu").learn(total_episodes=8)
    assert agent.num_guide_tokens > 0


def test_what_does_not_fit_is_named(base, words_tokenizer, monkeypatch):
    policy = adapted(base)
    policy.save_pretrained(base.parent / "policy")
    with pytest.raises(ValueError, match="lora must be None for a model that has adapters"):
        adapted(base.parent / "policy")
    with pytest.raises(ValueError, match=r"lora must hold arguments of peft\.LoraConfig"):
        LanguageModelPolicy.from_pretrained(base, lora={"rank": 3})
    with pytest.raises(ValueError, match='quantization must be None or "4bit"'):
        LanguageModelPolicy.from_pretrained(base, quantization="2bit")
    policy.model.name_or_path = ""
    with pytest.raises(ValueError, match="loaded from nowhere"):
        policy.save_pretrained(base.parent / "lost")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32, num_layers=2,
                                      num_attention_heads=2)  # fmt: skip
    if not policy.encodes_prompts:
        tuned = peft.get_peft_model(load_model(base, device="cpu"), prompts)
        with pytest.raises(ValueError, match="adapters in its layers"):
            type(policy)(tuned, words_tokenizer)
    monkeypatch.setattr("textgym.models.is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r'pip install "textgym\[peft\]"'):
        load_model(base.parent / "policy")
    monkeypatch.setattr("textgym.models.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r'pip install "textgym\[quantization\]"'):
        load_model(base, quantization="4bit")
