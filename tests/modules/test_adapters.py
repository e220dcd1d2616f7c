"""PEFT, and whatever else attaches to parameters, on packed modules: it works as on dense ones, or says why not."""

import moe_models
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.modules import QuantLinear

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="the extra `train` is not installed")


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    moe_models.model("mixtral").save_pretrained(folder)
    return folder


def packed(folder):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=PcdvqConfig(), dtype=torch.float32)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": "all-linear"},  # PEFT takes the stacks of experts for linear layers too
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ],
    ids=["all-linear", "gate_up_proj", "down_proj"],
)
def test_an_adapter_on_packed_experts_is_refused_rather_than_ignored(peft, mixtral_dir, targets):
    model = peft.get_peft_model(packed(mixtral_dir), peft.LoraConfig(r=2, **targets))
    with pytest.raises(TypeError, match=r"QuantExperts: (gate_up|down)_proj is packed.*target_modules=\['q_proj'"):
        model(IDS)


def test_an_adapter_on_the_linear_layers_of_a_packed_mixture_learns(peft, mixtral_dir):
    model = packed(mixtral_dir)
    plain = model(IDS).logits
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    )
    out = model(IDS, labels=IDS)
    out.loss.backward()
    adapters = {name: weight.grad for name, weight in model.named_parameters() if "lora" in name}
    assert len(adapters) == 8 and all(grad.abs().sum() > 0 for grad in adapters.values())
    assert not torch.allclose(out.logits, plain, atol=1e-2)


def test_an_adapter_is_merged_after_dequantizing(peft, tiny_model_dir):
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(packed(tiny_model_dir), config)
    with torch.no_grad():
        expected = model(IDS).logits
        model.get_base_model().dequantize(torch.float32)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    "attach",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: delattr(layer, "weight_scale"),
    ],
    ids=["parametrization", "pruning", "deletion"],
)
def test_nothing_attaches_to_packed_words(attach):
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(64, 8), PcdvqConfig().codec)
    x = torch.randn(3, 64)
    before = layer(x)
    with pytest.raises(TypeError, match=r"QuantLinear: weight(_scale)? is packed"):
        attach(layer)
    assert type(layer) is QuantLinear and torch.equal(layer(x), before)


def test_the_bias_of_a_packed_layer_can_be_parametrized():
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(64, 8), PcdvqConfig().codec)
    x = torch.randn(3, 64)
    expected = layer(x) + layer.bias
    parametrize.register_parametrization(layer, "bias", Double())
    torch.testing.assert_close(layer(x), expected)
