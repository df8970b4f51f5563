"""Tiny models of every causal-LM type of transformers, with random weights.

Configs are made small through names of attributes that many families share. `OVERRIDES` contains further
settings that some types need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

VOCABULARY = 128
LAYERS = 4
MOST_PARAMETERS = 30_000_000

_SMALL: dict[str, Any] = {
    # sizes
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "emb_dim", "lru_width"), 32),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 64
    ),
    **dict.fromkeys(("ffn_hidden_size", "prefix_lm_hidden_size", "attention_hidden_size", "d_inner"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "global_head_dim", "d_kv", "attention_head_dim"), 8),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256
    ),
    "sliding_window": 8,
    "attention_window_size": 8,
    "window_size": 8,
    "attention_chunk_size": 8,
    "rotary_dim": 4,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "type_vocab_size": 2,
    # experts
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "zero_expert_num": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 16,
    # recurrent layers
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim", "n_mamba_heads"), 8
    ),
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "time_step_rank": 4,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 64},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_shared_experts": 1, "topk_method": "greedy"},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attention_head_size": 8},
}


def tiny_config(model_type: str) -> Any:
    """Return a small config of a type."""
    from transformers import AutoConfig

    return _tiny(AutoConfig.for_model(model_type), OVERRIDES.get(model_type, {}))


def tiny_model(model_type: str, *, seed: int = 0) -> Any:
    """Return a small model of a type in evaluation mode, with weights large enough that every layer matters.

    Raises:
        ValueError: The model has more than `MOST_PARAMETERS` parameters.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"the smallest model built has {size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2 and 0 < float(weight.std()) < 0.15:
                weight.mul_(0.15 / weight.std())
    return model.eval()


def _tiny(default: Any, overrides: Mapping[str, Any]) -> Any:
    """Return a new config of the same class with small sizes, so that derived sizes are small, too."""
    alias = default.attribute_map or {}
    fields = {each.name for each in dataclasses.fields(default) if each.init}
    names = fields | {name for name, real in alias.items() if real in fields}
    wanted: dict[str, Any] = {}
    for name in names:
        value = vars(default).get(alias.get(name, name))
        if name in _SMALL and value is not None and not isinstance(value, bool | list | tuple | dict):
            wanted[name] = _SMALL[name]
    for name in names:
        value = vars(default).get(alias.get(name, name))
        if (
            isinstance(value, list | tuple)
            and value
            and len(value) == getattr(default, "num_hidden_layers", -1)
        ):
            wanted[name] = _first_of_each_kind(value)
    if "kv_lora_rank" in names and "num_key_value_heads" in wanted:
        wanted["num_key_value_heads"] = wanted["num_attention_heads"]  # latent attention has no groups
    for name in getattr(default, "sub_configs", None) or {}:
        own = getattr(default, name, None)
        if own is not None:
            wanted[name] = _tiny(own, OVERRIDES.get(own.model_type, {}))
    said = {alias.get(name, name) for name in overrides}
    others = {name: value for name, value in wanted.items() if alias.get(name, name) not in said}
    return type(default)(**others, **overrides)


def _first_of_each_kind(values: Any) -> list[Any]:
    """Return `LAYERS` values: the distinct ones in order of first occurrence, repeated if too few."""
    kinds = list(dict.fromkeys(values))[:LAYERS]
    return (kinds * LAYERS)[:LAYERS]
