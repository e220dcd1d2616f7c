"""Tiny pairs of an original and a packed model, and text for them."""

from pathlib import Path

import torch
from conftest import tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_pcdvq.config import config_of_setting
from hf_pcdvq.modules import packed_modules

SETTINGS = ("pcdvq-2.0", "pcdvq-2.25", "ccq-2.75", "ccq-2.5", "ccq-2.0625", "stream-2.0", "stream-2.25", "int8")


def windows(count: int, length: int = 24, seed: int = 0) -> Tensor:
    """Random tokens int64 `[count, length]` of the byte tokenizer."""
    return torch.randint(2, 258, (count, length), generator=torch.Generator().manual_seed(seed))


def pair(folder: Path, setting: str = "stream-2.0", **overrides: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A packed model, rounded to the nearest codes, and its original, in float32."""
    if setting == "int8":  # which is a setting of some modules only
        config = config_of_setting("stream-2.0", overrides={"mlp": "int8"})
    else:
        config = config_of_setting(setting, overrides=overrides or None)
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    return packed, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def saved_original(folder: Path) -> Path:
    """A float32 model whose layers have biases, norms that are not 1, and rows of 192 and 128 inputs."""
    model = tiny_llama().float()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.Module) and "RMSNorm" in type(module).__name__:
                module.weight.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that a model stores."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def scales(model: nn.Module) -> set[str]:
    """The names of the tensors that hold the scales of rows."""
    return {
        f"{name}.{entry.tensors['scale']}"
        for name, module in packed_modules(model).items()
        for entry in module.packed_parameters.values()
    }
