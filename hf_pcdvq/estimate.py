"""Estimates the size of a packed model from its configuration alone, by building it on the meta device."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoConfig

from .auto_class import auto_class_of
from .codecs.base import counted_bits
from .config import PackedConfig
from .effort import Effort, efforts
from .modules import dense_weights, is_fused_experts
from .quantizer import PackedHfQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PARTS = ("experts", "attention", "other layers", "embeddings", "output head", "left as they are")
# Bytes that a product of many tokens decodes at a time, as 16-bit floats: see `triton/launch.py`.
_WORKSPACE = 2 << 26


@dataclass(frozen=True)
class Part:
    """Part of a model.

    Attributes:
        parameters: number of dense parameters.
        nbytes: their size, packed or not.
    """

    parameters: int = 0
    nbytes: int = 0

    def plus(self, parameters: int, nbytes: int) -> Part:
        return Part(self.parameters + parameters, self.nbytes + nbytes)


@dataclass(frozen=True)
class Estimate:
    """Sizes of a model that is to be packed.

    Attributes:
        parts: by name, see `PARTS`. "experts" are fused experts, "attention" is recognized by the module's name;
            these and "other layers" are packed, the rest is not.
        cache_bytes: size of the keys and values of one token.
        state_bytes: size of what layers without keys and values, those of linear attention, keep of all tokens together.
        context: number of tokens that `memory_bytes` accounts for.
        efforts: what it takes to make the packed model, "rounded" and "calibrated".
    """

    parts: dict[str, Part]
    cache_bytes: int
    state_bytes: int
    context: int
    efforts: dict[str, Effort]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts.values())

    @property
    def nbytes(self) -> int:
        """Size of the safetensors files, excluding their headers."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def memory_bytes(self) -> int:
        """GPU memory for weights, the cache of `context` tokens and decoding of weights, excluding activations."""
        return self.nbytes + self.cache_total + _WORKSPACE

    @property
    def cache_total(self) -> int:
        """Size of the cache of `context` tokens."""
        return self.cache_bytes * self.context + self.state_bytes

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-serializable."""
        totals = {"parameters": self.parameters, "bytes": self.nbytes, "memory_bytes": self.memory_bytes}
        return {**totals, **asdict(self)}


def read_model_config(source: str) -> PreTrainedConfig:
    """The model configuration from a JSON file, a folder or a model on the Hub.

    Raises:
        ValueError: the file has no `model_type`, or one that Transformers does not know.
    """
    if not Path(source).is_file():
        return AutoConfig.from_pretrained(source)
    fields = json.loads(Path(source).read_text(encoding="utf-8"))
    if "model_type" not in fields:
        raise ValueError(f"{source} has no model_type; expected a model's config.json")
    return AutoConfig.for_model(**fields)


def estimate(
    model_config: PreTrainedConfig,
    config: PackedConfig,
    context: int = 4096,
    timed: bool = False,
    processes: int = 1,
) -> Estimate:
    """Estimate the size of a model packed according to `config`.

    Args:
        model_config: configuration of a model that writes text and is not quantized. One that also reads images is counted
            with what reads them if its `architectures` name such a class.
        config: how to pack it; its resolved fields are filled in, as when quantizing. With a calibration, what text does not
            reach is left as it is; without, it is packed too.
        context: number of tokens whose keys and values must fit in memory.
        timed: also how long quantizing takes on this machine, which is measured for a few seconds.
        processes: how many share the quantizing.

    Raises:
        ValueError: no layer of the model can be packed.
    """
    model_config = AutoConfig.for_model(**{**model_config.to_dict(), "quantization_config": None})
    with torch.device("meta"):
        model = auto_class_of(model_config).from_config(model_config, dtype=torch.bfloat16).eval()
    quantizer = PackedHfQuantizer(config, pre_quantized=False)
    names = quantizer.select(model)
    packed = {
        id(weight): _packed_bytes(config, name, weight)
        for name in names
        for weight in dense_weights(model.get_submodule(name)).values()
    }
    parts = dict.fromkeys(PARTS, Part())
    for path, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            nbytes = packed.get(id(weight), weight.numel() * weight.element_size())
            part = _part(model, path, module, id(weight) in packed)
            parts[part] = parts[part].plus(weight.numel(), nbytes)
    if model.config.get_text_config().tie_word_embeddings:
        parts["output head"] = Part()
    cache_sizes = _cache_sizes(model)  # from here on, experts return their inputs
    found = efforts(model, names, config, packed, timed, processes)
    return Estimate(parts, *cache_sizes, context, found)


def _packed_bytes(config: PackedConfig, name: str, weight: nn.Parameter) -> int:
    *_, rows, columns = weight.shape
    bits = counted_bits(config.codec_of(name).specs(rows, columns), rows, columns)
    return round(bits * weight.numel() / 8)


def _part(model: PreTrainedModel, path: str, module: nn.Module, packed: bool) -> str:
    if module is model.get_output_embeddings():
        return "output head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if not packed:
        return "left as they are"
    if is_fused_experts(module):
        return "experts"
    return "attention" if re.search(r"attn|attention", path) else "other layers"


def _cache_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of keys and values per token, and of states: runs the model on one token, on the meta device."""
    for module in model.modules():
        if is_fused_experts(module):
            module.forward = lambda hidden_states, *args, **kwargs: hidden_states  # routing needs actual values
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="meta"), use_cache=True).past_key_values
    sizes = []
    for names in (("keys", "values"), ("conv_states", "recurrent_states")):
        held = [vars(layer)[name] for layer in cache.layers for name in names if name in vars(layer)]
        tensors = [tensor for one in held for tensor in (one.values() if isinstance(one, dict) else [one])]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None))
    return sizes[0], sizes[1]


def estimate_table(result: Estimate) -> Table:
    """A table of the parts with their sizes and bits, and of the GPU memory required."""
    table = Table(title=f"{result.parameters:,} parameters", title_justify="left")
    table.add_column("part")
    for heading in ("parameters", "bits per weight", "GB", "GiB"):
        table.add_column(heading, justify="right")
    total = Part(result.parameters, result.nbytes)
    for name, part in [*result.parts.items(), ("packed model", total)]:
        bits = f"{8 * part.nbytes / part.parameters:.3f}" if part.parameters else "-"
        style = "bold" if part is total else None
        table.add_row(name, f"{part.parameters:,}", bits, *_sizes(part.nbytes), style=style)
    table.add_row(f"keys and values, {result.context:,} tokens", "", "", *_sizes(result.cache_total))
    table.add_row("GPU memory, without activations", "", "", *_sizes(result.memory_bytes), style="bold")
    return table


def effort_table(result: Estimate) -> Table:
    """A table of what quantizing takes."""
    table = Table(title="Quantizing, read and written block by block", title_justify="left")
    table.add_column("how")
    for heading in ("memory, GB", "read, GB", "disk, GB", "hours, here"):
        table.add_column(heading, justify="right")
    for how, effort in result.efforts.items():
        sizes = (f"{nbytes / 1e9:,.1f}" for nbytes in (effort.memory_bytes, effort.read_bytes, effort.disk_bytes))
        hours = "-" if effort.seconds is None else f"{effort.seconds / 3600:,.1f}"
        table.add_row(how, *sizes, hours)
    return table


def _sizes(nbytes: int) -> tuple[str, str]:
    return f"{nbytes / 1e9:,.2f}", f"{nbytes / 2**30:,.2f}"
