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
def test_an_adapter_on_packed_experts_is_refused_when_it_is_attached(peft, mixtral_dir, targets):
    with pytest.raises(RuntimeError, match=r"QuantExperts: (gate_up|down)_proj is packed.*target_modules=\['q_proj'"):
        peft.get_peft_model(packed(mixtral_dir), peft.LoraConfig(r=2, **targets))


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


def test_a_refused_merge_beside_dense_layers_loses_nothing(peft, tiny_model_dir):
    """PEFT merges layer by layer, so dense ones before the first packed one are merged already."""
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(packed(tiny_model_dir), config).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(RuntimeError, match="QuantLinear: weight is packed"):
                merge()
            assert torch.equal(model(IDS).logits, expected)
        model.get_base_model().dequantize(torch.float32)
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_packed_model_is_itself_again_when_its_adapters_are_unloaded(peft, tiny_model_dir):
    model = packed(tiny_model_dir)
    expected, layer = model(IDS).logits, model.model.layers[0].mlp.up_proj
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    unloaded = peft.get_peft_model(model, config).unload()
    assert unloaded.model.layers[0].mlp.up_proj is layer and torch.equal(unloaded(IDS).logits, expected)


def test_a_packed_weight_says_where_it_is_and_the_dtype_that_adapters_take():
    layer = QuantLinear.from_linear(nn.Linear(64, 8, bias=False, dtype=torch.float16), PcdvqConfig().codec)
    assert layer.weight.device.type == "cpu" and not layer.weight.requires_grad
    assert layer.weight.dtype == torch.float16
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert "QuantLinear: weight" in repr(layer.weight)


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.weight + 1,
        lambda layer: 2.0 * layer.weight,
        lambda layer: torch.randn(8, 64) * layer.weight,
        lambda layer: nn.functional.linear(torch.randn(3, 64), layer.weight),
        lambda layer: layer.weight.shape,
        lambda layer: layer.weight.data,
        lambda layer: layer.weight.float(),
        lambda layer: layer.weight.to(torch.float64),
        lambda layer: layer.weight.zero_(),
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: torch.zeros(8, 64, out=layer.weight),
        lambda layer: setattr(layer.weight, "data", torch.zeros(8, 64)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(8, 64))),
        lambda layer: setattr(layer, "weight", None),
    ],
)
def test_code_that_takes_packed_words_for_the_weight_is_refused(use):
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(64, 8), PcdvqConfig().codec)
    x = torch.randn(3, 64)
    before = layer(x)
    with pytest.raises(RuntimeError, match="QuantLinear: weight is packed, so other code cannot"):
        use(layer)
    assert torch.equal(layer(x), before)


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
    with pytest.raises(RuntimeError, match=r"QuantLinear: weight(_scale)? is packed"):
        attach(layer)
    assert type(layer) is QuantLinear and torch.equal(layer(x), before)


def test_the_bias_of_a_packed_layer_can_be_parametrized():
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(64, 8), PcdvqConfig().codec)
    x = torch.randn(3, 64)
    expected = layer(x) + layer.bias
    parametrize.register_parametrization(layer, "bias", Double())
    torch.testing.assert_close(layer(x), expected)
