"""A GGUF file becomes an ordinary folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.real_model
def test_dense_folder_from_a_gguf_file_is_an_ordinary_model(smollm2_dir):
    config = json.loads((smollm2_dir / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert "<|im_start|>" in tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
