"""Models of random weights and random codes, for benchmarks of speed, which does not depend on them."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from hf_pcdvq.codecs.base import Codec, Packed
from hf_pcdvq.config import PackedConfig, config_of_setting
from hf_pcdvq.modules import packed_type, share_inputs
from hf_pcdvq.modules.tied import install
from hf_pcdvq.quantizer import PackedHfQuantizer


def tiny() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )


def dense_model(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A model of random weights in bf16."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def packed_model(config: PreTrainedConfig, setting: str, device: torch.device) -> PreTrainedModel:
    """The same model with random codes in the layers that the setting packs."""
    return packed_copy(dense_model(config, device), config_of_setting(setting))


def packed_copy(dense: PreTrainedModel, quantization: PackedConfig) -> PreTrainedModel:
    """A copy of a model with random codes in the layers that a config packs; it shares all other parameters.

    Raises:
        ValueError: the config packs something else than linear layers and embeddings.
    """
    shared = {id(parameter): parameter for parameter in dense.parameters()}
    model = copy.deepcopy(dense, shared)
    for name in PackedHfQuantizer(quantization, pre_quantized=False).select(model):
        layer = model.get_submodule(name)
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Embedding)):
            raise ValueError(f"{name} is {type(layer).__name__}; only models of linear layers are measured here")
        codec = quantization.codec_of(name)
        codes = random_codes(codec, *layer.weight.shape, layer.weight.device)
        install(model, name, packed_type(layer).from_packed(layer, codec, {"weight": codes}))
    share_inputs(model)
    return model


def random_codes(codec: Codec, outputs: int, inputs: int, device: torch.device) -> Packed:
    """Packed tensors of a weight `[outputs, inputs]`: random bits, and small scales so that activations stay finite."""
    packed = {}
    for suffix, (shape, dtype) in codec.specs(outputs, inputs).items():
        if dtype.is_floating_point:
            packed[suffix] = torch.rand(shape, dtype=dtype, device=device) / 1000
        else:
            bits = torch.iinfo(dtype)
            packed[suffix] = torch.randint(bits.min, bits.max + 1, shape, device=device).to(dtype)
    return packed
