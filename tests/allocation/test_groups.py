"""Groups are found by what shares an input and a shape, not by names."""

import pytest
import torch
from conftest import tiny_llama
from moe_models import model as mixture
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.allocation.groups import find_groups
from hf_pcdvq.allocation.patterns import patterns_of
from hf_pcdvq.quantizer import PackedHfQuantizer

WINDOW = torch.arange(2, 34)


def groups_of(model):
    names = PackedHfQuantizer(PcdvqConfig(), pre_quantized=False).select(model)
    groups = find_groups(model, "model.layers", names, WINDOW)
    assert sorted(name for group in groups for name in group.modules) == sorted(names)
    assert sum(group.weights for group in groups) == sum(
        parameter.numel()
        for name in names
        for parameter in model.get_submodule(name).parameters(recurse=False)
        if parameter.ndim > 1
    )
    return [(group.block, group.kind) for group in groups]


def test_q_kv_o_gate_up_and_down_of_every_block():
    kinds = ["self_attn.q_proj", "self_attn.k_proj + self_attn.v_proj", "self_attn.o_proj"]
    kinds += ["mlp.gate_proj + mlp.up_proj", "mlp.down_proj"]
    assert groups_of(tiny_llama()) == [(block, kind) for block in range(2) for kind in kinds]


def test_as_many_heads_for_keys_as_for_queries_make_one_group():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=258
    )
    kinds = [kind for _, kind in groups_of(LlamaForCausalLM(config).eval())]
    assert kinds[0] == "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj"


@pytest.mark.parametrize("kind", ["mixtral", "ernie"])
def test_fused_experts_of_a_layer_are_a_group(kind):
    found = groups_of(mixture(kind).eval())
    assert [entry for entry in found if entry[1] == "mlp.experts"][-1] == (1, "mlp.experts")


def test_experts_that_are_modules_are_grouped_over_their_numbers():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(128, 96), nn.Linear(128, 96)
            self.down_proj = nn.Linear(96, 128)

        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.up_proj(x))

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x):
            return self.experts[0](x) + self.experts[2](x)  # no token goes to the one between

    model = tiny_llama().float()
    model.model.layers[1].mlp = Experts()
    found = [kind for block, kind in groups_of(model) if block == 1 and "experts" in kind]
    assert found == ["mlp.experts.*.gate_proj + mlp.experts.*.up_proj", "mlp.experts.*.down_proj"]


def test_patterns_match_the_modules_and_no_others():
    layers = range(400)
    names = [f"model.layers.{number}.mlp.{part}" for number in layers for part in ("up_proj", "down_proj")]
    chosen = [name for name in names if hash_of(name) % 3]
    patterns = patterns_of(chosen, "model.layers")
    config = PcdvqConfig(overrides=dict.fromkeys(patterns, "pcdvq-2.0"))  # which refuses patterns that are too long
    assert [name for name in names if config.overridden(name)] == chosen
    assert len(patterns) <= 2 * 2


def hash_of(name):
    return sum(name.encode())
