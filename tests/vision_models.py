"""Small vision-language models: one with a tied head and the files of its processor, and one whose language model has a
class and a config of its own. Nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

PROCESSOR = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
IMAGES = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}}

VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save_tiny_gemma3(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a random Gemma 3 of one text and one vision layer, in bfloat16, as its publishers do: with a processor."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 258}
    text = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        **heads,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))


def save_tiny_qwen3_5(folder: Path) -> None:
    """Save a random Qwen 3.5 of two text layers, one of each kind, and one vision layer."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 258}
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    text = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, **heads, **linear}
    text |= {"max_position_embeddings": 64, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "patch_size": 14}
    config = Qwen3_5Config(text_config=text, vision_config={**vision, "out_hidden_size": 128})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
