"""Packing while parameters load: what one tensor of a file may become."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, NomicBertConfig, NomicBertModel

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.modules import QuantLinear

IDS = torch.arange(3, 30)[None]
ATTENTION = "layers.0.self_attn"


@pytest.fixture(scope="module")
def fused_dir(tmp_path_factory):
    """A model whose file holds query, key and value of a layer as one tensor."""
    folder = tmp_path_factory.mktemp("fused")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    NomicBertModel(NomicBertConfig(vocab_size=64, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    assert "encoder.layers.0.attn.Wqkv.weight" in load_file(folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("overrides", [{}, {"q_proj": None}, {"k_proj": None}, {"v_proj": "stream-3.0"}], ids=str)
def test_one_tensor_feeds_several_layers_packed_or_not(fused_dir, tmp_path, overrides):
    dense = AutoModel.from_pretrained(fused_dir)
    model = AutoModel.from_pretrained(fused_dir, quantization_config=PcdvqConfig(overrides=overrides)).eval()
    left = [pattern for pattern, setting in overrides.items() if setting is None]
    for name in ("q_proj", "k_proj", "v_proj"):
        layer, original = model.get_submodule(f"{ATTENTION}.{name}"), dense.get_submodule(f"{ATTENTION}.{name}")
        if name in left:
            assert torch.equal(layer.weight, original.weight)
        else:
            packed = QuantLinear.from_linear(original, layer.codec)
            assert torch.equal(layer.packed[""], packed.packed[""])
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")  # under the names of modules, which say what is packed
    assert {f"{ATTENTION}.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")} <= stored.keys()
    again = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], model(IDS)[0])
