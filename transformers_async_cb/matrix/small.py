"""Every model that transformers lists to generate text, from a config made small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto


# What models of a list of transformers do, and the list: of model types, and of classes by config.
TASKS = {
    "text": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING),
    "multimodal": (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    "encoder-decoder": (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    ),
}
VOCABULARY = 128
# Ids below are left to the special tokens of configs: prompts have none of them.
FIRST_ORDINARY = 16
# More parameters than this are not small: 256 MiB in float32.
MOST_PARAMETERS = 2**26

# What fields of configs become, whatever the model, if it has them. Windows, chunks and blocks are shorter than the
# prompts, so that what depends on them shows.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "audio_vocab_size",
         "pronunciation_vocab_size", "shape_vocab_size"),
        VOCABULARY,
    ),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "emb_dim", "embedding_dim",
         "input_embedding_size", "output_embedding_size", "lru_width", "out_hidden_size",
         "embed_dim", "hidden_size_global", "vision_output_dim", "backbone_hidden_size"),
        64,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers",
         "num_encoder_layers", "num_decoder_layers", "num_layers_per_stack"),
        4,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
         "swa_num_attention_heads", "index_n_heads", "linear_num_heads", "linear_num_value_heads"),
        4,
    ),
    **dict.fromkeys(
        ("head_dim", "d_head", "d_kv", "dim_head", "kv_channels", "swa_head_dim", "global_head_dim",
         "attention_head_size", "index_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim",
         "query_pre_attn_scalar", "mamba_d_head", "mamba_head_dim", "mamba_headdim"),
        16,
    ),
    **dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "d_ff", "dff",
         "dim_ff", "d_inner", "ffn_hidden_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size",
         "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp",
         "dense_intermediate_size", "feed_forward_size", "mlp_dim", "mamba_d_ssm"),
        128,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "context_length",
         "model_max_length"),
        512,
    ),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "local_attention", "window_size", "attention_window_size",
         "attention_chunk_size", "local_attention_window_len", "chunk_size", "mamba_chunk_size", "block_size",
         "index_topk", "index_block_size", "keep_window_size", "lsh_attn_chunk_length", "local_attn_chunk_length"),
        8,
    ),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num", "mamba_n_heads",
         "mamba_num_heads", "n_mamba_heads", "qk_rope_head_dim", "state_size", "mamba_d_state", "ssm_state_size",
         "rotary_dim", "router_hidden_size"),
        8,
    ),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank", "time_step_rank", "mamba_dt_rank", "hc_lowrank"), 24),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "hidden_size_per_layer_input"), 16),
    "qk_head_dim": 24,
    "linear_num_key_heads": 2,
}  # fmt: skip
# Fields that are made no larger than this.
_LIMITS: dict[str, int] = {
    "num_key_value_heads": 2, "num_kv_heads": 2, "swa_num_key_value_heads": 2, "num_global_key_value_heads": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "n_group": 2,
    "num_expert_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "n_groups": 2,
    "num_nextn_predict_layers": 0, "pad_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2,
    "max_window_layers": 2, "sep_token_id": 3, "cls_token_id": 3, "num_kv_shared_layers": 2,
    "shared_intermediate_size": 128, "depth": 1,
    "index_topk_blocks": 2, "ngram_vocab_size_base": 512, "ple_embed_dim": 64, "n_inner": 128,
}  # fmt: skip

_DOTS3_NOTE = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16,
    "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
# What single models need beside that, by model type; a name with dots is a field of a part.
_OWN: dict[str, dict[str, Any]] = {
    **{
        name: {"text_config.rope_parameters": _MROPE}
        for name in ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl")
    },
    **{name: {"feed_forward_proj": "gated-gelu"} for name in ("t5", "longt5")},  # others repeat one token
    "glm4v_moe": {"text_config.rope_parameters": _MROPE | {"mrope_section": [2, 1, 1]}},
    "bailing_hybrid": {"layer_group_size": 2, "linear_head_dim": 8},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 512, "patch_in_forward": False},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": {
        "full_attention": None,
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {f"text_config.{name}": value for name, value in _DOTS3_NOTE.items()},
    "dots3_note_text": _DOTS3_NOTE,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 2, "L_cycles": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config.indexer_n_heads": 4, "text_config.indexer_kv_heads": 1, "text_config.indexer_budget": 8,
                  "text_config.indexer_head_dim": 16, "text_config.indexer_compress_ratio": 2,
                  "text_config.layer_types": ["linear_attention", "indexed_attention"] * 2},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 2, "layer_types": ["linear_attention", "indexed_attention"] * 2},
    "reformer": {"axial_pos_shape": [8, 64], "axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh"] * 2},
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4, "chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 32,
              "attention_hidden_size": 128},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
}  # fmt: skip

# Models that are skipped, and why.
SKIPPED: dict[str, str] = {
    "gemma4_assistant": "not a decoder of its own: it drafts from another model's keys and values",
    "gemma4_unified_assistant": "not a decoder of its own: it drafts from another model's keys and values",
}


def model_types(task: str = "text") -> list[str]:
    """Of all models that transformers lists for one of `TASKS`. But for `"text"`, the task is in the names:
    `"t5 (encoder-decoder)"`."""
    names = list(TASKS[task][0])
    return names if task == "text" else [f"{name} ({task})" for name in names]


def small_config(model_type: str) -> PreTrainedConfig:
    """The config of a model type with every size made small, and without an end-of-sequence token.

    Raises:
        Exception: whatever the config has against it.
    """
    own = _OWN.get(model_type, {})
    config_class = CONFIG_MAPPING[model_type]
    usual = config_class()
    return config_class(**_shrunk(usual, own))


def _shrunk(usual: PreTrainedConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to make a small config from, given one of usual size, parts included."""
    fields: dict[str, Any] = {}
    for name, value in vars(usual).items():
        if isinstance(value, PreTrainedConfig):
            of_part = {k.partition(".")[2]: v for k, v in own.items() if k.partition(".")[0] == name}
            fields[name] = {"model_type": value.model_type, **_shrunk(value, of_part)}
        elif type(value) is int and name in _SIZES:
            fields[name] = _SIZES[name]
        elif type(value) is int and name in _LIMITS:
            fields[name] = min(value, _LIMITS[name])
    heads = vars(usual).get("num_attention_heads")
    if "qk_rope_head_dim" in fields and "head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]
    if isinstance(heads, int) and vars(usual).get("num_key_value_heads") == heads:
        fields["num_key_value_heads"] = _SIZES["num_attention_heads"]
    if "tie_word_embeddings" in vars(usual):  # a tied model with wide weights repeats its last token
        fields["tie_word_embeddings"] = False
    if "eos_token_id" in vars(usual):
        fields["eos_token_id"] = None
    if "is_decoder" in vars(usual):
        fields["is_decoder"] = True
    return fields | {k: v for k, v in own.items() if "." not in k}


def small_model(model_type: str, seed: int = 0, spread: float = 0.3) -> PreTrainedModel:
    """A small model of random weights, which are wide: so the logits of two tokens are well apart.

    Args:
        spread (`float`): standard deviation of the weights.

    Raises:
        ValueError: it is not small.
        Exception: whatever the model has against its config.
    """
    name, _, task = model_type.partition(" (")
    config = small_config(name)
    model_class = TASKS[task.rstrip(")") or "text"][1][type(config)]
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    config = next((part for part in parts if isinstance(part, model_class.config_class)), config)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"it has {parameters:,} parameters, made small")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.normal_(0, spread)
    model.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=2)
    return model
