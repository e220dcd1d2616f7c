"""The models of benchmarks/bench_cpu.py, and what is measured on whole models besides their speed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cpu_results import SMALL
from cpu_timing import Call
from random_models import dense_model, packed_copy, random_codes
from smollm2 import save_smollm2
from texts import Texts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, PreTrainedModel

import hf_pcdvq
from hf_pcdvq.codecs import codec_of_setting
from hf_pcdvq.config import PackedConfig, PcdvqConfig, config_of_setting
from hf_pcdvq.evaluation.metrics import compare_logits, token_windows
from hf_pcdvq.modules import QuantLinear
from hf_pcdvq.quantizer import PackedHfQuantizer

CPU = torch.device("cpu")
PROMPT = 16  # tokens before generation
PIECE = 16  # tokens that are multiplied straight from the codes on every CPU
CACHE = 96 << 20  # bytes of weights between two uses of the same one


def tinyllama() -> LlamaConfig:
    """The shape of TinyLlama-1.1B."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def llama_3b() -> LlamaConfig:
    """The shape of Llama-3.2-3B."""
    return LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    )


def tiny() -> LlamaConfig:
    """A test's; llama.cpp needs multiples of 256."""
    return LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )


# Behind the name of a setting: with the output head in int8, and the embeddings that it may be tied to.
HEAD = "+int8-head"


def config_named(setting: str) -> PackedConfig:
    """The config of a setting, which `HEAD` may follow."""
    return config_of_setting(setting.removesuffix(HEAD), head="int8" if setting.endswith(HEAD) else None)


SHAPES = {"1.1B": tinyllama, "3B": llama_3b, "tiny": tiny}


def made_once(folder: Path, make: Any) -> Path:
    """A folder that `make(path)` fills, if it does not exist."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(folder)
    return folder


def smollm2_folder(work: Path) -> Path:
    """The dense SmolLM2-135M-Instruct."""
    return made_once(work / "smollm2", save_smollm2)


def packed_smollm2_folder(work: Path, setting: str) -> Path:
    """The same, packed by rounding to the nearest codes."""
    dense = smollm2_folder(work)

    def quantize(folder: Path) -> None:
        print(f"quantizing SmolLM2 with {setting}", flush=True)
        # int8 is for overrides only.
        config = PcdvqConfig(overrides={"": "int8"}) if setting == "int8" else config_named(setting)
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
        model.save_pretrained(folder)

    return made_once(work / f"smollm2-{setting}", quantize)


def dense_of(name: str, work: Path) -> PreTrainedModel:
    """A bf16 model by name: `SMALL`, or one of `SHAPES`."""
    if name == SMALL:
        return AutoModelForCausalLM.from_pretrained(smollm2_folder(work), dtype=torch.bfloat16).eval()
    return dense_model(SHAPES[name](), CPU)


def packed_of(name: str, work: Path, setting: str, dense: PreTrainedModel) -> PreTrainedModel:
    """The packed form of such a model, which may share parameters with it."""
    if name == SMALL:
        return AutoModelForCausalLM.from_pretrained(packed_smollm2_folder(work, setting), dtype=torch.bfloat16)
    return packed_copy(dense, config_named(setting))


def random_folder(work: Path, shape: str, setting: str) -> Path:
    """A saved packed model of random codes."""

    def save(folder: Path) -> None:
        config = config_named(setting)
        model = packed_copy(dense_model(SHAPES[shape](), CPU), config)
        model.hf_quantizer = PackedHfQuantizer(config, pre_quantized=False)
        model.config.quantization_config = config
        model.save_pretrained(folder)

    return made_once(work / f"{shape}-{setting}", save)


def dense_layer(outputs: int, inputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)


def packed_layer(setting: str, outputs: int, inputs: int) -> QuantLinear:
    """A layer of random codes."""
    codec = codec_of_setting(setting, 128, 0)
    layer = QuantLinear(inputs, outputs, False, codec)
    layer.set_packed("weight", random_codes(codec, outputs, inputs, CPU))
    layer.reset_tables()
    return layer


def without_onednn(layer: nn.Linear, x: Tensor) -> Tensor:
    """A dense product by PyTorch's own code, which is at times the faster one for one token."""
    with torch.backends.mkldnn.flags(enabled=False):
        return layer(x)


def copies(layer: nn.Module, cache: int) -> list[nn.Module]:
    """As many of a layer as do not fit into a cache of so many bytes."""
    nbytes = sum(parameter.nbytes for parameter in layer.parameters())
    return [layer, *(copy.deepcopy(layer) for _ in range(cache // nbytes))]


def generation(new_tokens: int, model: PreTrainedModel) -> Call:
    """Greedy generation after a short prompt. min_new_tokens keeps it from ending early."""
    ids = torch.arange(PROMPT)[None]
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def reading(tokens: int, model: PreTrainedModel) -> Call:
    """One pass over a prompt."""
    ids = torch.arange(tokens)[None] % model.config.vocab_size
    return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)


# ------------------------------------------------------------------------------------------------- quality


@torch.no_grad()
def activation_quality(work: Path, setting: str, texts: Texts, count: int, length: int) -> dict[str, Any]:
    """KL divergence that quantized activations cause: the same packed model with and without, otherwise in float32.

    Windows go through the CPU backend in pieces of 16 tokens with a cache: larger ones it decodes and multiplies in
    floating point.
    """
    folder = packed_smollm2_folder(work, setting)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder(work))
    windows = token_windows(tokenizer, texts.evaluation_text(), length, count)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for window in windows:
            hf_pcdvq.set_backend("reference")
            expected = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            hf_pcdvq.set_backend("cpu")
            yield expected, _logits_in_pieces(model, window)[:-1]

    return compare_logits(pairs(), windows, progress=False).to_dict()


def _logits_in_pieces(model: PreTrainedModel, window: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    return torch.cat([model(input_ids=piece[None], past_key_values=cache).logits[0] for piece in window.split(PIECE)])
