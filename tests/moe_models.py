"""Tiny mixture-of-experts models, one for each kind of layout on the Hub."""

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERTS = 8
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2))


def qwen3() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SIZES, moe_intermediate_size=96, num_experts=EXPERTS, num_experts_per_tok=2, head_dim=16)
    )


def deepseek() -> DeepseekV3ForCausalLM:
    sizes = {**_SIZES, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32}
    heads = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    routing = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    layers = {"first_k_dense_replace": 1, "n_shared_experts": 1, "moe_intermediate_size": 96}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **routing, **layers))


def ernie(**sizes: int) -> Ernie4_5_MoeForCausalLM:
    layers = {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}
    fields = {**_SIZES, "moe_intermediate_size": 96, "head_dim": 16, **layers, **sizes}
    return Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**fields))


KINDS = {"mixtral": mixtral, "qwen3": qwen3, "deepseek": deepseek, "ernie": ernie}


def model(kind: str) -> PreTrainedModel:
    """A random model in float32, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KINDS[kind]().eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 40)[None]).logits
