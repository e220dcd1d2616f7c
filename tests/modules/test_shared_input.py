"""Layers with the same input prepare it once. On a GPU, or in Triton's interpreter like `kernels/test_triton.py`."""

import copy
import dataclasses
import gc
import os
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hf_pcdvq import CcqConfig, PcdvqConfig, get_backend, set_backend
from hf_pcdvq.modules import QuantLinear, share_inputs

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a GPU, or Triton's interpreter (test_shared_input_interpreted.py runs it)", allow_module_level=True
    )

DEVICE = "cuda" if GPU else "cpu"
CODECS = {
    "pcdvq": PcdvqConfig(bits=2.25).codec,
    "ccq": CcqConfig(layout="2.5").codec,
    "stream": CcqConfig(layout="stream", bits=2.0).codec,
}


@pytest.fixture(autouse=True)
def triton():
    set_backend("triton")
    yield
    set_backend("auto")


class Attention(nn.Module):
    """Four layers with the same number of inputs, three of which receive the same tensor."""

    def __init__(self, codec):
        super().__init__()
        torch.manual_seed(0)
        backend = get_backend()
        set_backend("auto")  # encoding need not run in the interpreter
        for name, rows in (("q", 8), ("k", 4), ("v", 4), ("o", 2)):  # few: the interpreter is slow
            setattr(self, name, QuantLinear.from_linear(nn.Linear(128, rows, bias=False), codec))
        set_backend(backend)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.cat([q, k, v, self.o(x.tanh())], -1)


class Changing(Attention):
    """Writes into its input between two layers."""

    def forward(self, x):
        first = self.k(x)
        x.mul_(2)
        return first, self.v(x)


class Prepared(TorchDispatchMode):
    """Counts how often activations are prepared."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.hf_pcdvq_kernels.prepare.default
        return function(*args, **(kwargs or {}))


def activations(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)


@pytest.fixture
def attention():
    return Attention(CODECS["pcdvq"]).to(DEVICE)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_the_same_input_is_prepared_once_and_computes_the_same(codec):
    attention, x = Attention(codec).to(DEVICE), activations(1, 3, 128)
    with torch.no_grad():
        expected = attention(x)
        share_inputs(attention)
        share_inputs(attention)  # has no further effect
        with Prepared() as prepared:
            out = attention(x)
    assert prepared.count == 2 and torch.equal(out, expected)


def test_an_input_that_was_written_into_is_prepared_again():
    attention = Changing(CODECS["pcdvq"]).to(DEVICE)
    expected = attention(activations(2, 128))
    share_inputs(attention)
    for out, wanted in zip(attention(activations(2, 128)), expected):
        assert torch.equal(out, wanted)


def test_nothing_is_kept_between_calls(attention):
    share_inputs(attention)
    x = activations(2, 128)
    with torch.inference_mode():
        attention(x)
        with Prepared() as prepared:
            attention.k(x)
            attention.v(x)
    assert prepared.count == 0  # outside the calling module, each layer prepares its input inside its product
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None


def test_nothing_is_kept_after_an_exception(attention):
    """Checkpointing, too, uses an exception to stop recomputation."""
    share_inputs(attention)
    attention.o.register_forward_pre_hook(lambda module, args: 1 / 0)
    x = activations(2, 128)
    with torch.inference_mode(), pytest.raises(ZeroDivisionError):
        attention(x)
    with torch.inference_mode(), Prepared() as prepared:
        attention.k(x)
    assert prepared.count == 0


def test_gradients_and_many_tokens_take_the_ordinary_way(attention):
    x = activations(70, 128).requires_grad_()
    attention(x).sum().backward()
    expected, x.grad = x.grad, None
    share_inputs(attention)
    with Prepared() as prepared:
        attention(x).sum().backward()
    assert prepared.count == 0 and torch.equal(x.grad, expected)


def test_copies_share_among_themselves(attention):
    share_inputs(attention)
    x = activations(1, 128)
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert twin.q.shared_input is twin.v.shared_input is not attention.q.shared_input
        with torch.no_grad(), Prepared() as prepared:
            assert torch.equal(twin(x), attention(x))
        assert prepared.count == 4


def test_lists_and_single_layers_share_nothing(attention):
    """Members of a list are called by other modules, and a list has no forward call that would end the sharing."""
    layers = nn.ModuleList([attention.q, attention.k])
    share_inputs(layers)
    assert attention.q.shared_input is None
    alone = nn.Sequential(attention.q)
    share_inputs(alone)
    assert attention.q.shared_input is None


def test_compiled_it_is_prepared_once_too(attention):
    """In one graph, which returns nothing but its result."""
    model = nn.Sequential(attention)
    share_inputs(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = activations(1, 128)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    (graph,) = graphs
    assert sum("prepare" in str(node.target) for node in graph.graph.nodes if node.op == "call_function") == 2
    assert len(next(node for node in graph.graph.nodes if node.op == "output").args[0]) == 1


def test_compiled_every_rotation_has_its_own(attention):
    """Two codecs of one format, which differ in the signs of their rotations, and the same input."""
    other = Attention(dataclasses.replace(CODECS["pcdvq"], seed=7)).to(DEVICE)
    attention.v, attention.o = other.v, other.o
    x = activations(1, 128)
    with torch.no_grad():
        expected = attention(x)
        share_inputs(attention)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(attention, backend="eager", fullgraph=True)(x), expected)


def test_sharing_can_be_ended_after_compiling():
    model, x = Changing(CODECS["pcdvq"]).to(DEVICE), activations(1, 128)
    share_inputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x.clone())
        for layer in model.children():
            layer.shared_input = None
        first, second = compiled(x.clone())
        assert torch.equal(first, model.k(x)) and torch.equal(second, model.v(2 * x))


def test_compiled_it_is_not_checked_at_every_call(attention):
    """`torch.compile` checks what it looked at at every call; for objects that layers share, that takes milliseconds."""
    share_inputs(attention)
    torch._dynamo.reset()
    with torch.no_grad():
        guards = torch._dynamo.explain(attention)(activations(1, 128)).out_guards
    assert len(guards) > 10
    names = [guard.name for guard in guards if guard.name.startswith("L[")]
    assert not [name for name in names if "_shared_input" in name or ".codec" in name]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_cuda_graph_prepares_what_it_replays(attention):
    share_inputs(attention)
    x = activations(1, 128)
    with torch.no_grad():
        attention(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(x)
        x.mul_(2)
        graph.replay()
        assert torch.equal(out, attention(x))


def test_layers_can_be_moved_to_another_module(attention):
    """The module that they came from holds the hooks, and may be gone when what it lent is copied or saved."""
    x = activations(1, 128)
    expected = attention(x)[..., :8]
    share_inputs(attention)
    borrower = nn.Sequential(attention.q)
    del attention
    gc.collect()
    copies = copy.deepcopy(borrower), pickle.loads(pickle.dumps(borrower))
    assert all(torch.equal(other(x), expected) for other in (borrower, *copies))


def test_loaded_models_share_and_dequantized_ones_forget_it(tiny_model_dir):
    config = PcdvqConfig(bits=2.0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config, device_map=DEVICE)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.shared_input is layer.self_attn.v_proj.shared_input is not None
    assert layer.mlp.gate_proj.shared_input is layer.mlp.up_proj.shared_input is not None
    assert layer.mlp.down_proj.shared_input is None
    dense = model.dequantize(torch.bfloat16)
    assert not dense.model.layers[0].mlp._forward_hooks and not dense.model.layers[0].mlp._forward_pre_hooks
