"""The size that is foreseen is that of the file, header included."""

import copy

import pytest
import torch
from conftest import tiny_llama
from moe_models import ernie
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.allocation.filesize import file_bytes
from hf_pcdvq.quantizer import PackedHfQuantizer


def tied():
    config = copy.deepcopy(tiny_llama().config)
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config).half()


def experts():
    return ernie(num_hidden_layers=3, moe_num_experts=2, moe_k=1).to(torch.bfloat16)


MODELS = {"llama": tiny_llama, "tied": tied, "experts, and a name that saving changes": experts}
CONFIGS = [
    PcdvqConfig(bits=2.25, overrides={"q_proj": "pcdvq-2.0", r"layers\.0\.": "int8"}),
    PcdvqConfig(bits=2.25, head="int8"),
    CcqConfig(layout="stream", bits=2.25),  # whose rows are padded
]


@pytest.mark.parametrize("config", CONFIGS, ids=["mixed", "head", "padded"])
@pytest.mark.parametrize("kind", MODELS)
def test_to_the_byte(kind, config, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    quantizer = PackedHfQuantizer(copy.deepcopy(config), pre_quantized=False)
    expected = file_bytes(dense, quantizer.select(dense), quantizer.quantization_config)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=copy.deepcopy(config))
    packed.save_pretrained(tmp_path / "packed")
    assert (tmp_path / "packed" / "model.safetensors").stat().st_size == expected
