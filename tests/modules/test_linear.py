"""`QuantLinear` as a module: what users do with layers."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from hf_pcdvq import CcqConfig, PcdvqConfig
from hf_pcdvq.modules import QuantLinear

CODECS = {
    "pcdvq-2.0": PcdvqConfig(bits=2.0).codec,
    "pcdvq-2.25": PcdvqConfig(bits=2.25).codec,
    "ccq-2.75": CcqConfig(layout="2.75").codec,
    "ccq-2.5": CcqConfig(layout="2.5", hadamard=False).codec,
    "ccq-2.0625": CcqConfig(layout="2.0625").codec,
    "stream-3.0": CcqConfig(layout="stream", bits=3.0).codec,
}


@pytest.fixture(params=CODECS.values(), ids=CODECS.keys())
def codec(request):
    return request.param


@pytest.fixture
def layer(codec):
    torch.manual_seed(0)
    return QuantLinear.from_linear(nn.Linear(192, 50), codec)


X = torch.randn(2, 7, 192, generator=torch.Generator().manual_seed(1))


def test_computes_with_the_decoded_weight_and_bias(layer):
    dense = layer.dequantize(torch.float32)
    # The CPU kernels quantize activations to 15 bits.
    assert (layer(X) - dense(X)).norm() < 3e-4 * dense(X).norm()


@pytest.mark.parametrize("memory", ["the same", "other"])
def test_computes_with_the_tensors_that_it_has_now(memory, layer, codec):
    """And not with those of an earlier call."""
    layer(X)
    other = QuantLinear.from_linear(nn.Linear(192, 50), codec)
    for name, tensor in other.named_parameters():
        if memory == "the same":
            layer._parameters[name].data.copy_(tensor)
        else:
            layer._parameters[name] = tensor
    assert torch.equal(layer(X), other(X))


def test_no_bias_stays_no_bias(codec):
    layer = QuantLinear.from_linear(nn.Linear(64, 8, bias=False), codec)
    assert layer.bias is None and layer.dequantize(torch.float32).bias is None
    assert not layer(torch.zeros(3, 64)).any()


def test_is_differentiable_in_the_input(layer):
    x = X.clone().requires_grad_()
    grad = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(2))
    layer(x).backward(grad)
    expected = grad @ layer.dequantize(torch.float32).weight
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_dtype_leaves_codes_and_scales(layer, dtype):
    before = {name: tensor.clone() for name, tensor in layer.packed.items()}
    tables = {name: tensor.clone() for name, tensor in layer.tables.items()}
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    assert layer(X.to(dtype)).dtype == dtype
    layer.to(torch.float32)
    for name, tensor in layer.packed.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    for name, tensor in layer.tables.items():
        assert tensor.dtype == tables[name].dtype and torch.equal(tensor, tables[name])


def test_moves_between_devices(layer):
    moved = copy.deepcopy(layer).to("meta")
    assert {tensor.device.type for tensor in [*moved.packed.values(), *moved.tables.values()]} == {"meta"}


def test_deepcopy_and_pickle(layer):
    expected = layer(X)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(X), expected)
        other.packed[""].zero_()
        assert torch.equal(layer(X), expected)


def test_tables_are_filled_again_on_new_memory(layer, codec):
    """`to_empty` and the meta device leave tables, which no state dict holds, without values."""
    expected, state = layer(X), layer.state_dict()
    emptied = copy.deepcopy(layer).to_empty(device="cpu")
    emptied.load_state_dict(state)
    assert torch.equal(emptied(X), expected)
    returned = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    returned.load_state_dict(state)
    assert torch.equal(returned(X), expected)
    assigned = QuantLinear(192, 50, True, codec, device="meta")
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(X), expected)


def test_results_can_be_changed_in_place_under_autograd(codec):
    layer = QuantLinear.from_linear(nn.Linear(192, 50, bias=False), codec)
    x = X.clone().requires_grad_()
    layer(x).mul_(3).sum().backward()
    twin = X.clone().requires_grad_()
    (3 * layer(twin)).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_compiles_in_one_graph(layer):
    torch._dynamo.reset()  # every codec recompiles the same forward; the limit is 8
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(X), layer(X), rtol=1e-5, atol=1e-6)
    x = X.clone().requires_grad_()
    compiled(x).sum().backward()
    reference = X.clone().requires_grad_()
    layer(reference).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-5, atol=1e-6)


def test_state_dict_holds_packed_tensors_only(layer, codec):
    expected = {"weight" if not suffix else f"weight_{suffix}" for suffix in codec.specs(50, 192)} | {"bias"}
    assert set(layer.state_dict()) == expected
    other = QuantLinear(192, 50, True, codec)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(X), layer(X))


def test_is_a_linear_layer_with_frozen_codes(layer):
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (192, 50)
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]


def test_memory_is_packed(layer, codec):
    stored = sum(tensor.numel() * tensor.element_size() for tensor in layer.packed.values())
    scales = 14 if codec.bits == 2.0625 else 4
    codes = 2 if codec.bits == 2.0625 else codec.bits  # its group scales are counted as scales
    rows = 64 if codec.bits == 3.0 else 50  # the stream layout pads to periods of 32 channels
    assert stored == rows * 192 * codes / 8 + 50 * scales


def test_refuses_sizes_that_do_not_fit(codec):
    with pytest.raises(ValueError, match=f"multiple of {codec.multiple}.*got 100"):
        QuantLinear(100, 8, False, codec)
    with pytest.raises(RuntimeError, match="no initialization"):
        QuantLinear(192, 8, False, codec).reset_parameters()


def test_peft_trains_an_adapter(tiny_model_dir, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra `train` is not installed")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=PcdvqConfig(), dtype=torch.float32
    )
    packed = model.model.layers[0].mlp.up_proj.packed[""].clone()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    ids = torch.arange(3, 60)[None]
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert torch.equal(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.packed[""], packed)


def test_an_interrupted_forward_leaves_offloading_intact(layer):
    """accelerate brings words to the device before a forward and takes them away after it, but not after an error."""
    x = torch.randn(2, 192)
    expected = layer(x)
    offloaded = cpu_offload(nn.Sequential(layer), torch.device("cpu"))
    with pytest.raises(ValueError):
        offloaded(torch.randn(2, 64))
    assert torch.equal(offloaded(x), expected)


def test_trained_scales_stay_trained_when_the_dtype_changes(layer):
    scale = dict(layer.named_parameters())["weight_scale"].requires_grad_(True)
    layer.to(torch.bfloat16)
    assert dict(layer.named_parameters())["weight_scale"] is scale
    assert scale.requires_grad and scale.dtype == torch.float32


def test_words_are_not_moved_for_a_computation(layer):
    weight = layer.weight
    assert weight.to("cpu", weight.dtype) is weight
    with pytest.raises(RuntimeError, match="is packed, so other code cannot compute with it"):
        weight.to("meta", weight.dtype)
