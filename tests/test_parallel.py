"""Packed models divided among two processes, which talk through gloo: tensor and expert parallelism of Transformers."""

import subprocess
import sys
from pathlib import Path

import parallel_worker as worker
import pytest
import torch
from filelock import FileLock
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.codecs import SETTINGS, codec_of_setting
from hf_pcdvq.modules import dense_weights, packed_type, stack_packed
from hf_pcdvq.quantizer import PackedHfQuantizer

# Every layer is packed with another setting. Small, but each half of a weight is one ring of `stream` (256 outputs).
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": len(SETTINGS),
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 258,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=2, num_experts_per_tok=1)),
}
_PATTERNS = {rf"layers\.{number}\.": setting for number, setting in enumerate(SETTINGS)}


def packed_matrices():
    """For every setting, weights of the two shapes that the models have, `[512, 64]` and `[64, 512]`, by shape."""
    torch.manual_seed(0)
    codecs = [codec_of_setting(setting, 128, 0) for setting in SETTINGS]
    return [{shape: codec.encode(0.1 * torch.randn(shape)) for shape in ((512, 64), (64, 512))} for codec in codecs]


def fill(packed, codec, matrices):
    """The packed tensors of a weight `[N, K]`, from matrices of the same kind, with scales of its own."""
    rows, columns = packed
    parts = [matrices[min(rows, 512), columns]] * max(1, rows // 512)  # whole rings of `stream`
    found = {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
    return {**found, "scale": found["scale"] * (0.5 + torch.rand(rows))}


def make(folder, kind, matrices):
    """Save a packed model with random weights: encoding those of each layer anew would take a minute."""
    torch.manual_seed(0)
    model = _MODELS[kind]().eval()
    quantizer = PackedHfQuantizer(PcdvqConfig(overrides=_PATTERNS), pre_quantized=False)
    for name in quantizer.select(model):
        dense, codec = model.get_submodule(name), quantizer.quantization_config.codec_of(name)
        own = matrices[int(name.split(".")[2])]
        tensors = {
            key: fill(weight.shape, codec, own)
            if weight.ndim == 2
            else stack_packed([fill(weight.shape[1:], codec, own) for _ in weight])
            for key, weight in dense_weights(dense).items()
        }
        model.set_submodule(name, packed_type(dense).from_packed(dense, codec, tensors))
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = True
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    quantizer.postprocess_model(model)
    model.save_pretrained(folder / kind)
