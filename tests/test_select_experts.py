"""Experts and routers are recognized by structure: what is packed, what is not, and the reasons reported."""

import pytest
import torch
from moe_models import EXPERTS
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from hf_pcdvq import Calibration, PcdvqConfig, quantize_model
from hf_pcdvq.modules import QuantLinear
from hf_pcdvq.select import select_layers

HIDDEN, MIDDLE = 64, 96


class Expert(nn.Module):
    """An expert that is a separate module, as in Transformers 4 and in the code of older models."""

    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, MIDDLE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, MIDDLE, bias=False)
        self.down_proj = nn.Linear(MIDDLE, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class ListOfExperts(nn.Module):
    """A layer with such experts; each token goes to one of them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        chosen = self.gate(flat).argmax(1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens = (chosen == number).nonzero()[:, 0]
            if len(tokens):
                out[tokens] = expert(flat[tokens])
        return out.view(hidden.shape)


def with_list_of_experts():
    sizes = {"hidden_size": HIDDEN, "intermediate_size": MIDDLE, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=258, tie_word_embeddings=False)).eval()
        for layer in model.model.layers:
            layer.mlp = ListOfExperts()
    return model


def select(module):
    return select_layers(module, lambda name: PcdvqConfig(bits=2.0).codec, [], None, set(), "", {})


def test_experts_that_are_modules_of_their_own_are_packed_one_by_one():
    model = with_list_of_experts()
    settings = Calibration(samples=8, length=64, holdout=0)
    windows = torch.randint(0, 258, (8, 64), generator=torch.Generator().manual_seed(0))
    quantize_model(model, None, PcdvqConfig(calibration=settings), windows, progress=False)
    layer = model.model.layers[1].mlp
    assert all(isinstance(module, QuantLinear) for expert in layer.experts for module in expert.children())
    assert type(layer.gate) is nn.Linear
    left = model.config.quantization_config.left_unpacked
    assert left["model.layers.*.mlp.gate.weight"] == "router of experts (x2)"
    records = model.hf_quantizer.report.layers
    assert len(records) == 2 * (4 + 3 * EXPERTS)


class Stack(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(EXPERTS, 16, 16)))


def test_experts_of_unknown_layouts_are_named():
    layer = nn.Module()
    layer.list = nn.ParameterList(nn.Parameter(torch.zeros(16, 16)) for _ in range(EXPERTS))
    layer.single = Stack("weight")
    layer.ungated = Stack("up_proj", "down_proj")
    layer.linear = nn.Linear(16, 16)
    packed, left = select(layer)
    assert packed == ["linear"]
    assert left["list.0"].startswith("ParameterList")
    assert left["single.weight"] == f"Stack [[{EXPERTS}, 16, 16]] is not nn.Linear"
    assert "experts that cannot be packed: Stack: not one gate_up_proj and one down_proj" in left["ungated.up_proj"]


@pytest.mark.parametrize(
    "experts",
    (
        Stack("gate_up_proj", "down_proj"),
        Stack("weight"),
        nn.ModuleList(nn.Linear(16, 16) for _ in range(EXPERTS)),
        nn.ModuleDict({f"expert_{number}": nn.Linear(16, 16) for number in range(EXPERTS)}),
    ),
    ids=("fused", "stack", "list", "dictionary"),
)
def test_routers_are_left_wherever_they_are(experts):
    layer = nn.Module()
    layer.experts = experts
    layer.gate = nn.Linear(16, EXPERTS)
    layer.router = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, EXPERTS))
    layer.shared_gate = nn.Linear(16, 1)
    layer.shared = nn.Sequential(nn.Linear(16, EXPERTS), nn.Linear(EXPERTS, 16))
    layer.latent = nn.Linear(16, 32)
    packed, left = select(layer)
    assert {name for name, reason in left.items() if reason.startswith("router of experts")} == {
        "gate.weight",
        "router.*.weight",
        "shared_gate.weight",
    }
    assert {"shared.0", "shared.1", "latent"} <= set(packed)


def test_a_convolution_is_no_stack_of_experts():
    layer = nn.Module()
    layer.conv = nn.Conv1d(16, 16, 4, groups=16)
    layer.project = nn.Linear(16, 16)
    assert select(layer)[0] == ["project"]
