"""Tiny models of any architecture: a configuration's own defaults, with every size cut down by the name of its field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

# Small values by the name of a field, whatever the architecture; a field that a configuration lacks is not set.
_SIZES: dict[int, str] = {
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk experts_per_token "
    "linear_num_key_heads num_experts_per_token n_kv_heads",
    64: "adapter_in_dim adapter_input_size audio_hidden_size embedding_dim hidden_size d_model n_embd "
    "embed_dim dim n_embed emb_dim embedding_size word_embed_proj_dim attention_hidden_size "
    "rnn_hidden_size lru_width projection_dim moe_intermediate_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size",
    128: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim vocab_size "
    "entity_vocab_size max_position_embeddings n_positions n_ctx max_sequence_length mlp_hidden_size "
    "intermediate_size_mlp d_inner vocab_size_per_layer_input dense_intermediate_size "
    "moe_dense_intermediate_size",
    4: "linear_num_heads indexer_n_heads num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts num_key_value_heads_dense n_group_experts linear_num_value_heads mamba_d_conv "
    "conv_kernel linear_conv_kernel_dim",
    1: "num_expert_group num_kv_shared_layers indexer_kv_heads num_layers_per_stack n_group topk_group "
    "num_nextn_predict_layers n_shared_experts first_k_dense_replace",
    16: "indexer_head_dim linear_head_dim d_head mamba_headdim head_dim kv_channels d_kv attention_head_dim "
    "global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim "
    "linear_value_head_dim mamba_d_head index_head_dim swa_head_dim",
    32: "indexer_budget qk_head_dim q_lora_rank kv_lora_rank sliding_window attention_window image_size "
    "hidden_size_per_layer_input lora_rank",
    8: "indexer_compress_ratio rotary_dim state_size mamba_d_state mamba_dt_rank time_step_rank patch_size",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_DEPTHS = tuple(
    "num_hidden_layers n_layer num_layers n_layers num_decoder_layers encoder_layers decoder_layers depth "
    "num_blocks".split()
)
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "sep_token_id": 2}


_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
_EXPAND = ("mamba_expand", "expand")
_KEY_VALUE_HEADS = {"num_key_value_heads", "num_kv_heads", "n_kv_heads"}
_STATE_HEADS = ("mamba_n_heads", "n_mamba_heads", "num_heads")
_STATE_HEAD_SIZES = ("mamba_d_head", "mamba_headdim", "head_dim")

# Enough layers for one of each kind: some architectures put attention into every fourth or eighth.
LAYERS = (2, 4, 8)


def tiny_configs(model_type: str) -> Iterator[PreTrainedConfig]:
    """Configurations of an architecture with small sizes, likeliest first; not every one makes a model.

    Skips those that the configuration does not accept.

    Raises:
        ValueError: it accepts none; the message is what it says of the first.
    """
    try:
        default = AutoConfig.for_model(model_type)
    except Exception as error:  # whatever a configuration raises, here for its own defaults
        raise ValueError(f"{type(error).__name__}: {error}") from error
    refusals: list[Exception] = []
    for layers in LAYERS:
        for fill in (False, True):
            try:
                config = type(default)(**_shrunk(default.to_dict(), layers, fill))
            except Exception as error:  # whatever a configuration raises
                refusals.append(error)
            else:
                yield config
    if len(refusals) == 2 * len(LAYERS):
        raise ValueError(f"{type(refusals[0]).__name__}: {refusals[0]}") from refusals[0]


def _shrunk(fields: dict[str, Any], layers: int, fill: bool) -> dict[str, Any]:
    """Small values for the fields of a configuration, in the relations that the default values have.

    Args:
        fields: the default values.
        layers: number of layers.
        fill: give a size to fields whose default is None, which some configurations do not replace themselves.
    """
    number = _first(fields, _DEPTHS) or layers
    kept = _kept_layers(fields, layers, number)
    made = {name: _small(name, value, layers, fill, kept, number) for name, value in fields.items()}
    if fill and set(made.get("layer_types") or ()) == {"linear_attention"}:
        made["layer_types"][-1] = "full_attention"  # whose cache counts the tokens
    if fill and "default_language" in made:
        made["default_language"] = fields["languages"][0]
    heads, small_heads = _first(fields, _HEADS), _first(made, _HEADS)
    for name in _KEY_VALUE_HEADS & made.keys():
        if heads and fields[name] == heads:  # no groups of queries
            made[name] = small_heads
    hidden, small_hidden = _first(fields, _HIDDEN), _first(made, _HIDDEN)
    wide = fields.get("attention_hidden_size")
    if wide and hidden and wide % hidden == 0:
        made["attention_hidden_size"] = wide // hidden * small_hidden
        if heads and fields.get("attention_head_dim") == wide // heads:
            made["attention_head_dim"] = made["attention_hidden_size"] // small_heads
    expand = _first(fields, _EXPAND)
    if expand and hidden:
        # Heads of a state space: their number times their size is the expanded width.
        pairs = [
            (number, size) for number in _STATE_HEADS for size in _STATE_HEAD_SIZES if {number, size} <= fields.keys()
        ]
        for number, size in pairs:
            if fields[number] and fields[size] and fields[number] * fields[size] == expand * hidden:
                made[number] = expand * small_hidden // made[size]
    return made


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if fields.get(name)), None)


def _small(name: str, value: Any, layers: int, fill: bool, kept: list[int], number: int) -> Any:
    size = layers if name in _DEPTHS else SMALL.get(name)
    by_layer = {int(key): entry for key, entry in value.items()} if _is_by_layer(value) else {}
    if by_layer:
        return {new: _shrunk(by_layer[old], layers, fill) for new, old in enumerate(kept) if old in by_layer}
    if isinstance(value, dict) and (name.endswith("_config") or "model_type" in value):
        return _shrunk(value, layers, fill)
    if isinstance(value, list) and len(value) > 1 and len(value) == number:
        return [_small(name, value[old], layers, fill, kept, number) for old in kept]
    if isinstance(value, list) and value and "layer" in name and all(isinstance(entry, int) for entry in value):
        return [new for new, old in enumerate(kept) if old in value]
    if isinstance(value, int) and not isinstance(value, bool) and size:
        return min(value, size) if value > 0 else value
    if name in _TOKENS and isinstance(value, int):
        return _TOKENS[name]
    return _filled(name, size, layers) if value is None and fill else value


def _is_by_layer(value: Any) -> bool:
    return isinstance(value, dict) and all(str(key).isdigit() and isinstance(value[key], dict) for key in value)


def _filled(name: str, size: int | None, layers: int) -> Any:
    if name == "layer_types":
        return ["full_attention"] * layers
    return [layers - 1] if name.endswith("layer_indices") else size


def _kept_layers(fields: dict[str, Any], layers: int, number: int) -> list[int]:
    """Which of the default layers are kept: of as many kinds as possible."""
    lists = [value for value in fields.values() if isinstance(value, list) and len(value) == number > 1]
    kinds = max(lists, key=lambda value: len({str(entry) for entry in value}), default=[])
    first = [index for index, value in enumerate(kinds) if value not in kinds[:index]]
    rest = [index for index in range(number) if index not in first]
    return sorted((first + rest)[:layers])


def inputs_of(model: PreTrainedModel, sequences: int = 2) -> dict[str, torch.Tensor]:
    """Inputs for a forward pass, by the name of the model's main input.

    Args:
        model: the model.
        sequences: how many there are of token ids. One needs no padding token; it ends as some classifiers want it.

    Raises:
        NotImplementedError: there are none for this kind of input.
    """
    generator = torch.Generator().manual_seed(0)
    config, name = model.config, model.main_input_name
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 128
    ids = torch.randint(3, vocabulary, (sequences, 12), generator=generator)
    if sequences == 1:
        ids[:, -1] = _TOKENS["eos_token_id"]
    if name == "input_ids":
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    if name == "pixel_values":
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.randn(1, getattr(config, "num_channels", 3), *size, generator=generator)}
    if name == "input_values":
        return {name: torch.randn(1, 4000, generator=generator)}
    raise NotImplementedError(f"no inputs for {name}")
