"""Import of FastDeploy's WINT2 checkpoints of mixture-of-experts models (CCQ, arXiv 2507.07145), not requantized.

Such a checkpoint follows Paddle's conventions: matrices are `[inputs, outputs]`, `qkv_proj` concatenates the rows of
query, key and value, `up_gate_proj` those of gate and up, and names begin with `ernie.`, not with `model.`.
An expert's matrix `[N, K]` in WINT2 is stored under `...mlp.experts.{e}.{up_gate_proj,down_proj}.` as

    quant_weight    uint8 [K/4, N]     four weights per byte
    weight_scale    uint8 [K/128, N]   scales of groups of 64 inputs, two per byte
    super_scales    float [N]
    code_scale      float [N]
    code_zp         float [N]

These are the transposes of our tensors in the unrotated layout `2.0625` (`codecs/convolutional.py`). Everything else
must be a floating-point `weight`; matrices of other types are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..config import CcqConfig
from ..files.headers import StoredTensor, checkpoint_files, read_headers
from ..files.packing import PackingRecord, save_file
from ..modules import QuantExperts, is_fused_experts
from ..progress import progress_of
from ..quantizer import PackedHfQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(up_gate_proj|down_proj)\.(\w+)")
# Our suffix of a packed tensor -> its name in a checkpoint.
_NAMES = {
    "": "quant_weight",
    "local_scale": "weight_scale",
    "scale": "super_scales",
    "code_scale": "code_scale",
    "code_zero": "code_zp",
}
_THEIR_STACK = {"gate_up_proj": "up_gate_proj", "down_proj": "down_proj"}
# One of our matrices -> the fused one that may contain its rows, and all matrices in that, in order.
_FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "k_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("up_gate_proj", ("gate_proj", "up_proj")),
    "up_proj": ("up_gate_proj", ("gate_proj", "up_proj")),
}


class Wint2Checkpoint:
    """The tensors of a checkpoint, read one at a time.

    Args:
        folder: contains one or several safetensors files.

    Raises:
        FileNotFoundError, ValueError: see `checkpoint_files` and `read_headers` in `files/headers.py`.
    """

    def __init__(self, folder: Path):
        self.stored: dict[str, StoredTensor] = read_headers(checkpoint_files(folder))
        self.unused = set(self.stored)

    def find(self, *names: str) -> str | None:
        """The first of these names, in our spelling or Paddle's, that is in the checkpoint; None if there is none."""
        for name in names:
            for key in (name, re.sub(r"^model\.", "ernie.", name)):
                if key in self.stored:
                    return key
        return None

    def read(self, name: str) -> Tensor:
        with safe_open(self.stored[name].file, "pt") as content:
            self.unused.discard(name)
            return content.get_tensor(name)

    def packed_experts(self) -> list[str]:
        """Our names of the modules with packed experts."""
        modules: dict[str, None] = {}
        for name in self.stored:
            match = _EXPERT.fullmatch(name)
            if match and match[4] == _NAMES[""]:
                modules[re.sub(r"^ernie\.", "model.", match[1])] = None
        return list(modules)


def import_wint2(source: Path, folder: Path, model_config: PreTrainedConfig | None = None) -> list[str]:
    """Write a WINT2 checkpoint as a packed model that `from_pretrained` loads.

    Args:
        source: folder of the checkpoint.
        folder: an existing, empty folder.
        model_config: None takes the one in `source`.

    Returns:
        Names of tensors in the checkpoint that the model does not use.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the checkpoint has no tensors in WINT2, or a tensor is missing or of an unexpected type or shape;
            the message names it.
    """
    checkpoint = Wint2Checkpoint(source)
    modules = checkpoint.packed_experts()
    if not modules:
        raise ValueError(
            f"{source} has no tensor *.experts.*.{_NAMES['']}; expected a WINT2 checkpoint of FastDeploy"
        )
    config = CcqConfig(layout="2.0625", hadamard=False, modules_to_convert=modules)
    model = _empty_model(model_config or AutoConfig.from_pretrained(source), config)
    shards = _shards(model)
    record = PackingRecord.of(model, config)
    index: dict[str, str] = {}
    size = 0
    for number, names in enumerate(progress_of(shards, desc="Importing", unit="layer"), 1):
        tensors = dict(_tensors(model, names, checkpoint))
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt", **record.metadata()})
        index.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    model.config.save_pretrained(folder)
    return sorted(checkpoint.unused)


def _empty_model(model_config: PreTrainedConfig, config: CcqConfig) -> PreTrainedModel:
    """The model on the meta device, with packed experts."""
    model_config = AutoConfig.for_model(**{**model_config.to_dict(), "quantization_config": None})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    known = {name for name, module in model.named_modules() if is_fused_experts(module)}
    if not known.issuperset(config.modules_to_convert):
        missing = sorted(set(config.modules_to_convert) - known)
        raise ValueError(f"{type(model).__name__} has no experts {', '.join(missing)}, which are in the checkpoint")
    quantizer = PackedHfQuantizer(config, pre_quantized=False)
    for name in quantizer.select(model):
        model.set_submodule(name, QuantExperts.empty_like(model.get_submodule(name), config.codec))
    model.config.quantization_config = config
    return model


def _shards(model: PreTrainedModel) -> list[list[str]]:
    """Names of the model's tensors, one list per decoder layer: the tensors that are in memory at the same time."""
    tied = set(model.all_tied_weights_keys)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        if name not in tied:
            match = re.match(r".*?\.\d+\.", name)
            shards.setdefault(match[0] if match else "", []).append(name)
    return list(shards.values())


def _tensors(model: PreTrainedModel, names: list[str], checkpoint: Wint2Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors of these names, from the checkpoint."""
    wanted = model.state_dict()
    for name in names:
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantExperts):
            for stack, (_, suffixes, _) in module.packed_parameters.items():
                for suffix, tensor_name in suffixes.items():
                    if tensor_name == parameter:
                        yield name, _packed_stack(path, stack, suffix, wanted[name], checkpoint)
        elif is_fused_experts(module):
            yield name, _dense_stack(path, parameter, wanted[name], checkpoint)
        else:
            yield name, _dense(name, wanted[name], isinstance(module, nn.Embedding), checkpoint)


def _packed_stack(path: str, stack: str, suffix: str, wanted: Tensor, checkpoint: Wint2Checkpoint) -> Tensor:
    experts = []
    for expert in range(len(wanted)):
        name = f"{path}.{expert}.{_THEIR_STACK[stack]}.{_NAMES[suffix]}"
        key = checkpoint.find(name)
        if key is None:
            raise ValueError(f"{name} is missing: all experts of a layer must be in WINT2, with all of their tensors")
        tensor = checkpoint.read(key)
        floating = wanted.dtype.is_floating_point
        suitable = tensor.is_floating_point() if floating else tensor.dtype in (torch.uint8, torch.int8)
        tensor = tensor.flatten() if floating else tensor.T.contiguous()
        if not suitable or tensor.shape != wanted.shape[1:]:
            shape = list(wanted.shape[1:]) if floating else list(reversed(wanted.shape[1:]))
            raise ValueError(_unexpected(checkpoint.stored[key], "floating" if floating else "uint8", shape))
        experts.append(tensor.to(wanted.dtype) if floating else tensor.view(wanted.dtype))
    return torch.stack(experts)


def _dense_stack(path: str, stack: str, wanted: Tensor, checkpoint: Wint2Checkpoint) -> Tensor:
    """Experts in a floating-point type, of a layer that is not in WINT2."""
    names = [f"{path}.{expert}.{_THEIR_STACK[stack]}.weight" for expert in range(len(wanted))]
    return torch.stack([_dense(name, matrix, False, checkpoint) for name, matrix in zip(names, wanted)])


def _dense(name: str, wanted: Tensor, embedding: bool, checkpoint: Wint2Checkpoint) -> Tensor:
    """A floating-point tensor in our orientation, possibly cut out of a fused one."""
    # The bias correction of the scores belongs to the router in Transformers, but to the layer in the checkpoint.
    key = checkpoint.find(name, name.replace(".gate.moe_statics.", ".moe_statics."))
    if key is not None:
        return _oriented(checkpoint, key, wanted, tuple(wanted.shape), embedding)
    path, _, parameter = name.rpartition(".")
    module, _, matrix = path.rpartition(".")
    fused, parts = _FUSED.get(matrix, (None, ()))
    key = checkpoint.find(f"{module}.{fused}.{parameter}") if fused else None
    if key is None:
        others = [stored for stored in checkpoint.stored if _belongs(stored, path, f"{module}.{fused}")]
        found = f"; the checkpoint has {', '.join(sorted(others))}, in a type that is not supported" if others else ""
        raise ValueError(f"{name} is missing: expected a floating-point tensor {list(wanted.shape)}{found}")
    total = checkpoint.stored[key].numel // wanted[0].numel()
    whole = _oriented(checkpoint, key, wanted, (total, *wanted.shape[1:]), embedding)
    if len(parts) == 2:
        sizes = [total // 2] * 2
    else:
        rows = len(wanted) if matrix != "q_proj" else (total - len(wanted)) // 2
        sizes = [total - 2 * rows, rows, rows]
    return whole.split(sizes)[parts.index(matrix)].contiguous()


def _belongs(stored: str, *modules: str) -> bool:
    return any(stored.startswith((f"{path}.", f"{re.sub(r'^model', 'ernie', path)}.")) for path in modules)


def _oriented(
    checkpoint: Wint2Checkpoint, key: str, wanted: Tensor, shape: tuple[int, ...], embedding: bool
) -> Tensor:
    """A floating-point tensor in the dtype of `wanted`. Paddle's matrices are transposed, its embeddings are not."""
    stored = checkpoint.stored[key]
    if not isinstance(stored.dtype, torch.dtype) or not stored.dtype.is_floating_point:
        raise ValueError(_unexpected(stored, "floating", list(shape)))
    tensor = checkpoint.read(key)
    if tensor.ndim == 2 and not embedding and tensor.T.shape == shape:
        tensor = tensor.T
    if tensor.shape != shape:
        raise ValueError(_unexpected(stored, "floating", list(shape)))
    return tensor.to(wanted.dtype).contiguous()


def _unexpected(stored: StoredTensor, kind: str, shape: list[int]) -> str:
    dtype = str(stored.dtype).removeprefix("torch.")
    return f"{stored.name} in {stored.file} is {dtype} {list(stored.shape)}; expected {kind} values {shape}"
