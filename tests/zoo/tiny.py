"""Tiny models of any architecture: a configuration's own defaults, with every size cut down by the name of its field."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

# Small values by the name of a field, whatever the architecture; a field that a configuration lacks is not set.
_SIZES: dict[int, str] = {
    2: "num_hidden_layers num_layers n_layer n_layers num_decoder_layers encoder_layers decoder_layers depth "
    "num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk experts_per_token linear_num_key_heads "
    "num_experts_per_token n_kv_heads",
    64: "hidden_size d_model n_embd embed_dim dim n_embed emb_dim embedding_size word_embed_proj_dim attention_hidden_size "
    "rnn_hidden_size lru_width projection_dim moe_intermediate_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size",
    128: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim vocab_size "
    "max_position_embeddings n_positions n_ctx max_sequence_length mlp_hidden_size intermediate_size_mlp d_inner "
    "vocab_size_per_layer_input dense_intermediate_size moe_dense_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts num_key_value_heads_dense n_group_experts linear_num_value_heads "
    "mamba_d_conv conv_kernel linear_conv_kernel_dim",
    1: "n_group topk_group num_nextn_predict_layers n_shared_experts first_k_dense_replace",
    16: "head_dim kv_channels d_kv attention_head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_d_head index_head_dim swa_head_dim",
    32: "q_lora_rank kv_lora_rank sliding_window attention_window image_size hidden_size_per_layer_input lora_rank",
    8: "state_size mamba_d_state mamba_dt_rank time_step_rank patch_size",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "sep_token_id": 2}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of an architecture with small sizes. Raises whatever the configuration does not accept."""
    config = AutoConfig.for_model(model_type)
    return type(config)(**_shrunk(config.to_dict()))


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    layers = next((fields[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if fields.get(name)), None)
    made: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_config"):
            made[name] = _shrunk(value)
        elif isinstance(value, list) and len(value) == layers:
            made[name] = _varied(value)
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            made[name] = min(value, SMALL[name]) if value > 0 else value
        elif name in _TOKENS and isinstance(value, int):
            made[name] = _TOKENS[name]
        else:
            made[name] = value
    return made


def _varied(values: list[Any]) -> list[Any]:
    """As many entries as there are layers, of as many kinds as possible."""
    kinds = [value for index, value in enumerate(values) if value not in values[:index]]
    return (kinds + values)[: SMALL["num_hidden_layers"]]


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs for a forward pass, by the name of the model's main input.

    Raises:
        NotImplementedError: there are none for this kind of input.
    """
    generator = torch.Generator().manual_seed(0)
    config, name = model.config, model.main_input_name
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 128
    ids = torch.randint(3, vocabulary, (2, 12), generator=generator)
    if name == "input_ids":
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    if name == "pixel_values":
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.randn(1, getattr(config, "num_channels", 3), *size, generator=generator)}
    if name == "input_values":
        return {name: torch.randn(1, 4000, generator=generator)}
    raise NotImplementedError(f"no inputs for {name}")
