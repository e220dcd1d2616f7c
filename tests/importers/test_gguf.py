"""A GGUF file becomes an ordinary folder."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pcdvq.importers.gguf import dense_from_gguf

HIDDEN, INNER, TOKENS = 64, 128, ["<s>", "</s>", "a", "b", "ab", *(chr(code) for code in range(ord("c"), ord("z")))]
SHAPES = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
for _name in ("attn_norm", "ffn_norm"):
    SHAPES[f"blk.0.{_name}"] = (HIDDEN,)
for _name in ("attn_q", "attn_k", "attn_v", "attn_output"):
    SHAPES[f"blk.0.{_name}"] = (HIDDEN, HIDDEN)
SHAPES |= {"blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER)}


@pytest.fixture
def written(tmp_path):
    """A folder with a tiny Llama as a GGUF file, and its tensors."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    folder = tmp_path / "gguf"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    tensors = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        finish()
    writer.close()
    return folder, tensors


def test_the_file_is_parsed_once(written, tmp_path, monkeypatch):
    """Parsing a large vocabulary takes longer than decoding the weights."""
    import gguf

    folder, tensors = written
    parsed, reader, names = [], gguf.GGUFReader, gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or reader(path))
    ours = gguf.GGUFReader
    for out in ("first", "second"):
        dense_from_gguf(folder, "model.gguf", tmp_path / out)
    assert len(parsed) == 2 and gguf.GGUFReader is ours and gguf.get_tensor_name_map is names
    assert AutoTokenizer.from_pretrained(tmp_path / "second")("ab").input_ids[-1] == TOKENS.index("ab")
    found = load_file(tmp_path / "second" / "model.safetensors")
    expected = torch.from_numpy(tensors["blk.0.ffn_up.weight"]).bfloat16()
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], expected)


def test_without_the_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        dense_from_gguf(tmp_path, "model.gguf", tmp_path / "out")


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
