"""Every causal family of transformers, tiny and random: served as its model alone says, or refused by name."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from test_decoding import observations
from test_models import P, play, texts_of
from test_policy import tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from agents.policy import CausalLMPolicy
from textgym.decoding import Decoding
from textgym.packing import can_pack

# What the fields of any config are set to, where it has them.
SIZES = [
    (64, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input pronunciation_vocab_size "
         "shape_vocab_size encoder_hash_byte_group_vocab max_position_embeddings n_positions n_ctx max_seq_len "
         "context_length model_max_length max_target_positions max_source_positions rel_extent"),
    (48, "intermediate_size moe_intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size n_inner "
         "dim_ff dff d_inner shared_expert_intermediate_size shared_intermediate_size feed_forward_size "
         "moe_shared_expert_intermediate_size shared_experts_intermediate_size intermediate_size_mlp "
         "expert_ffn_hidden_size dense_intermediate_size prefix_dense_intermediate_size"),
    (32, "hidden_size d_model n_embd embedding_size input_embedding_size output_embedding_size word_embed_proj_dim "
         "emb_dim embedding_dim lru_width mamba_d_ssm pronunciation_embed_dim shape_embed_dim backbone_hidden_size "
         "ple_embed_dim prompt_mid_dim attention_hidden_size hidden_size_global "
         "index_n_heads"),  # many, so that scores of an index are not equal, all heads being 0
    (16, "head_dim qk_rope_head_dim d_head dim_head swa_head_dim v_head_dim qk_nope_head_dim mamba_d_head "
         "mamba_head_dim mamba_headdim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim "
         "kv_channels attention_head_dim attention_head_size mamba_d_state state_size ssm_state_size "
         "query_pre_attn_scalar"),
    (8, "rotary_dim q_lora_rank kv_lora_rank o_lora_rank time_step_rank mamba_dt_rank laurel_rank "
        "hidden_size_per_layer_input router_hidden_size adapter_rank hc_lowrank gated_norm_rank d_rel image_size "
        "num_mel_bins"),
    (5, "sliding_window window_size attention_window_size local_attention sliding_window_size keep_window_size "
        "attention_chunk_size mamba_chunk_size chunk_size block_size index_topk local_attention_window_len"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts patch_size zero_expert_num"),
    (2, "n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers num_blocks "
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads mamba_n_heads "
        "mamba_num_heads n_mamba_heads linear_num_value_heads linear_num_heads linear_num_key_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k bos_token_id decoder_start_token_id"),
    (1, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups n_group topk_group n_groups "
        "num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace "
        "num_dense_layers mamba_n_groups mamba_ngroups num_kv_shared_layers pad_token_id"),
    (0, "eos_token_id"),
    (True, "is_decoder use_sliding_window output_router_logits"),
    (None, "forced_eos_token_id"),
]  # fmt: skip
SMALL = {name: value for value, names in SIZES for name in names.split()}
LISTS = "layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"

SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
TWO_KEY_HEADS = {"num_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What a family needs besides, by the type of a config, which can also be a part of another.
OVERRIDES = {
    "bamba": {"mamba_expand": 1, "attn_layer_indices": [1]},
    "beam": TWO_KEY_HEADS,
    "codegen": {"n_head": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": {**ROPE, "mrope_section": [4, 2, 2]}, "full_attention": None},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "diffllama": TWO_KEY_HEADS,
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {
        **TWO_KEY_HEADS,
        "swa_num_attention_heads": 2,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
        "swa_num_key_value_heads": 2,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {**SHARED_KV, "activation_sparsity_pattern": [0.5] * 4, "intermediate_size": [48] * 4},
    "gemma4_text": SHARED_KV,
    "gemma4_unified_text": SHARED_KV,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_expand": 1, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "llama4_text": {"floor_scale": 4},
    "mamba2": {"expand": 1},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 1,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral3": {
        "rope_parameters": {
            **ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "nemotron": TWO_KEY_HEADS,
    "nemotron_h": {"time_step_min": 1e-12},  # its scan does not go below, its single steps do
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "time_step_min": 1e-12,  # as in nemotron_h
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
        "mamba_headdim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Families that are served on padded rows; the others are packed.
PADDED = """
axk2 bailing_hybrid bamba beam big_bird biogpt bloom codegen ctrl deepseek_v32 diffllama doge dots3_note
dots3_note_text falcon falcon_h1 falcon_mamba flint gemma2 gemma3n_text gemma4 gemma4_text gemma4_unified
gemma4_unified_text glm_moe_dsa gpt_neo gpt_neox_japanese gpt_oss gptj granite_swa granitemoe_swa granitemoehybrid
hrm_text hy_v4 inkling2_text inkling_text jamba kimi_linear lfm2 lfm2_moe lfm3 llama4 llama4_text longcat_flash
mamba mamba2 megatron-bert mimo_v2_flash mpt nemotron nemotron_h olmo_hybrid phimoe qwen2_moe
qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text rembert stablelm vaultgemma
whisper xglm zamba zamba2 zaya
"""
# What refusals say, and the families that are refused so.
REFUSALS = {
    "attend to blocks of columns": "deepseek_v4 minimax_m3_vl_text",
    # They count positions from the first column of a batch, padding included; moshi has a window with a cache alone.
    "in texts continued from a cache": "bart bigbird_pegasus blenderbot blenderbot-small git marian mbart moshi mvp "
    "pegasus plbart roformer trocr",
    # They count positions from the number of the padding token.
    "in texts read together": "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
    "has no attribute 'past_key_values'": "openai-gpt recurrent_gemma rwkv xlm xlnet",
    "has no attribute 'reorder_cache'": "xlstm",
    # `reorder_cache` leaves the states of its linear attention as they are.
    "is invalid for input of size": "minimax",
    "has no attribute 'num_hidden_layers'": "blt",  # so that no cache is made for it
    "must match the size": "cpmant",  # its mask does not know the prompt that it adds
    "tuple index out of range": "prophetnet",  # it makes logits of more than one state
    "upper bound and lower bound inconsistent": "reformer",
}
REFUSED = {name: refusal for refusal, names in REFUSALS.items() for name in names.split()}
# Classes of the mapping that are not tried, and why.
NOT_TRIED = {
    "gemma3n": "its image encoder needs timm; its text decoder is gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads",
    "musicgen": "writes codes of sounds, several at a time",
    "musicgen_melody": "writes codes of sounds, several at a time",
}
TRIED = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_TRIED]
SERVED = [name for name in TRIED if name not in REFUSED]


def shrunk(kind, **overrides):
    """The default config of a class, made small, with at least one layer of each kind that it has."""
    default = kind()
    fields = default.to_dict()
    small = {name: value for name, value in SMALL.items() if name in fields}
    for name in kind.sub_configs:
        if (part := getattr(default, name)) is not None:
            small[name] = shrunk(type(part), **OVERRIDES.get(part.model_type, {}))
    if "kv_lora_rank" in fields:
        small |= TWO_KEY_HEADS
    different = {name: list(dict.fromkeys(fields[name])) for name in LISTS if fields.get(name)}
    if "use_sliding_window" in fields and "layer_types" in fields:
        different["layer_types"] = ["sliding_attention", "full_attention"]
    layers = max([2, *map(len, different.values())])
    if "num_hidden_layers" in fields:
        small["num_hidden_layers"] = layers
    for name, kinds in different.items():
        small[name] = [*itertools.islice(itertools.cycle(kinds), layers)]
    return kind(**small | overrides)


@functools.cache
def model_of(name):
    config = shrunk(CONFIG_MAPPING[name], **OVERRIDES.get(name, {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases and norms too are random, so that no part is the identity
        torch.nn.init.normal_(parameter, mean=parameter.data.mean().item() if parameter.ndim == 1 else 0, std=0.3)
    return model.eval()


def test_every_name_is_served_refused_or_listed():
    assert set(REFUSED) <= set(TRIED)
    assert set(PADDED.split()) <= set(SERVED)
    assert set(NOT_TRIED) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(SERVED) >= 150


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_it_is_served_as_the_model_alone_says(name):
    policy = CausalLMPolicy(model_of(name), tiny_tokenizer())
    assert can_pack(policy.model) == (name not in PADDED.split())
    given, valid, prefix_lengths = observations(np.random.default_rng(0))
    given[1:3, :P], valid[1:3, :P] = given[0, :P], valid[0, :P]  # rows that share a prompt, or a prompt and more
    ids, mask, columns, sampled, _ = play(policy, given, valid, prefix_lengths, np.arange(9), Decoding(temperature=1.3))
    lengths = (columns >= 0).sum(1)
    assert min(lengths) < max(lengths) - 3, "the test needs rows that leave early"
    judged = policy.evaluate_actions(*map(torch.from_numpy, (ids, mask, columns))).log_probs
    alone = np.zeros(columns.shape)
    for row, (prompt, new) in enumerate(texts_of(ids, mask)):
        log_probs = policy.model(input_ids=torch.tensor([[*prompt, *new]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        for h in np.flatnonzero(columns[row] >= 0):
            alone[row, h] = log_probs[h, new[h]]
    assert alone.max() - alone[columns >= 0].min() > 0.1, "the test needs tokens that differ in probability"
    np.testing.assert_allclose(judged, alone, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(sampled, alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name):
    model = model_of(name)
    with pytest.raises(ValueError, match=f"^model must .* {type(model).__name__} does not.*{REFUSED[name]}"):
        CausalLMPolicy(model, tiny_tokenizer())
