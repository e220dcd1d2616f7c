"""A configuration and inputs for any tuner that PEFT has, by the names of what it takes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor
from transformers import PreTrainedModel

TUNERS = sorted(PEFT_TYPE_TO_TUNER_MAPPING, key=lambda kind: kind.value)
IDS = torch.arange(3, 27)[None]
# Required, or too large by default for a tiny model; a field that a configuration lacks is not set.
_FIELDS = {
    "task_type": "CAUSAL_LM",
    "r": 4,
    "init_r": 4,
    "total_step": 10,
    "num_subspaces": 4,
    "block_size": 16,
    "group_size": 16,
    "oft_block_size": 0,  # given by r
    "n_frequency": 50,
    "vector_length": 16,
    "theta_d_length": 200,
    "feedforward_modules": [],
    "num_virtual_tokens": 4,
    "cpt_token_ids": [5, 6, 7, 8],
    "cpt_tokens_type_mask": [1, 2, 3, 4],
    "adapter_len": 4,
    "adapter_layers": 1,
    "hidden_size": 64,
    "token_indices": [5, 6],
}


def tuner_config(kind: PeftType, targets: str | None, folder: Path) -> PeftConfig:
    """A configuration of one tuner. `targets` None leaves the choice of layers to PEFT."""
    known = _FIELDS | ({} if targets is None else {"target_modules": targets})
    if kind == PeftType.XLORA:
        known["adapters"] = {adapter.name: str(adapter) for adapter in sorted(folder.iterdir())}  # of `save_adapters`
    made = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(made) if field.init}
    return made(**{name: value for name, value in known.items() if name in names})


def save_adapters(model: PreTrainedModel, folder: Path) -> None:
    """What a tuner that mixes adapters loads, each in a folder."""
    for number in range(2):
        config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
        get_peft_model(copy.deepcopy(model), config).save_pretrained(folder / str(number))


def run(model: PeftModel) -> tuple[Tensor, Tensor]:
    """Logits of the last tokens, and the loss."""
    several = {"n_tasks", "num_tasks"} & vars(model.active_peft_config).keys()
    tasks = {"task_ids": torch.tensor([0])} if several else {}
    out = model(input_ids=IDS, labels=IDS, **tasks)
    return out.logits[:, -IDS.shape[1] :], out.loss


def values(model: PeftModel) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
