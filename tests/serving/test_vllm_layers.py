"""The plugin in vLLM: registration, and vLLM's own layers with packed weights, loaded as vLLM loads them.

Needs vLLM, whose environment cannot hold hf_pcdvq: `pip install ./kernels ./serving/vllm pytest` in one of its own, and there
`python -m pytest --noconftest -p no:cacheprovider tests/serving/test_vllm_layers.py`.
"""

from types import SimpleNamespace

import hf_pcdvq_kernels as ops
import pytest
import torch
from hf_pcdvq_kernels.random_weights import random_packed

pytest.importorskip("vllm", reason="needs vLLM, in an environment without hf_pcdvq")

from hf_pcdvq_vllm import register  # noqa: E402
from hf_pcdvq_vllm.coding import Coding  # noqa: E402
from hf_pcdvq_vllm.experts import PackedExpertsMethod  # noqa: E402
from hf_pcdvq_vllm.linear import parameter_name  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: E402

FORMATS = ["pcdvq-2.25", "ccq-2.5", "ccq-2.0625", "stream-2.0", "int8"]
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(autouse=True, scope="module")
def one_process(tmp_path_factory):
    place = tmp_path_factory.mktemp("group") / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{place}", 0, backend="gloo")
        initialize_model_parallel(1)
        yield


@pytest.fixture
def ranks(monkeypatch):
    """A function that makes layers believe to be of a rank in a tensor-parallel group."""

    def become(rank, size):
        monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: size)

    return become


def coding(name):
    return Coding.described({"setting": name, "hadamard_block": 64, "hadamard_seed": 1})


def config(name, *modules):
    register()
    made = get_quantization_config("pcdvq").from_config({})
    made.codings = {module: coding(name) for module in modules}
    made.packed_modules_mapping = MERGED
    return made


def packed(name, rows, columns, seed):
    family = coding(name).family
    values = random_packed(name, rows, columns, seed=seed)
    specs = family.specs(name, rows, columns)
    return {argument.name: value for argument, value in zip(family.arguments, values) if argument.name in specs}


def expected(name, x, tensors):
    described = coding(name)
    tables = described.tables(x.shape[1])
    return ops.matmul(described.family.family, x, described.arguments(tensors, tables), signs=tables["signs"])


def load(layer, tensors, *shard):
    for argument, tensor in tensors.items():
        parameter = getattr(layer, "weight" if argument == "weight" else f"weight_{argument}")
        parameter.weight_loader(parameter, tensor, *shard)


def product(layer, x):
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.apply(layer, x)


def test_registering_twice_changes_nothing():
    register()
    first = {method: get_quantization_config(method) for method in ("pcdvq", "ccq")}
    register()
    assert first == {method: get_quantization_config(method) for method in ("pcdvq", "ccq")}
    assert [found.get_name() for found in first.values()] == ["pcdvq", "ccq"]


@pytest.mark.parametrize("name", FORMATS)
def test_merged_weights_give_the_products_of_each(name):
    torch.manual_seed(0)
    x, sizes = torch.randn(3, 128), {"q": 576, "k": 192, "v": 192}
    settings = config(name, *(f"a.{part}_proj" for part in sizes))
    layer = linear.QKVParallelLinear(128, 64, 9, 3, bias=False, quant_config=settings, prefix="a.qkv_proj")
    weights = {part: packed(name, rows, 128, seed) for seed, (part, rows) in enumerate(sizes.items())}
    for part, tensors in weights.items():
        load(layer, tensors, part)
    whole = torch.cat([expected(name, x, tensors) for tensors in weights.values()], 1)
    torch.testing.assert_close(product(layer, x), whole)


@pytest.mark.parametrize("name", FORMATS)
def test_ranks_share_heads_and_inputs(name, ranks):
    torch.manual_seed(0)
    x, size = torch.randn(3, 256), 2
    heads = {"q": 4, "k": 1, "v": 1}  # of 256: keys and values on both ranks
    weights = {part: packed(name, 256 * count, 256, seed) for seed, (part, count) in enumerate(heads.items())}
    down, outs, summed = packed(name, 64, 512, 7), [], torch.zeros(3, 64)
    y = torch.randn(3, 512)
    for rank in range(size):
        ranks(rank, size)
        settings = config(name, "a.q_proj", "a.k_proj", "a.v_proj", "a.down_proj")
        layer = linear.QKVParallelLinear(256, 256, 4, 1, bias=False, quant_config=settings, prefix="a.qkv_proj")
        for part, tensors in weights.items():
            load(layer, tensors, part)
        outs.append(product(layer, x).split([512, 256, 256], 1))
        row = linear.RowParallelLinear(512, 64, bias=False, quant_config=settings, prefix="a.down_proj")
        load(row, down)
        summed += product(row, y[:, 256 * rank : 256 * (rank + 1)])
    for place, (part, tensors) in enumerate(weights.items()):
        whole = expected(name, x, tensors)
        found = torch.cat([out[place] for out in outs], 1) if part == "q" else outs[1][place]
        torch.testing.assert_close(found, whole)
    torch.testing.assert_close(outs[0][1], outs[1][1])
    whole = expected(name, y, down)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


def test_what_cannot_be_cut_is_refused_by_name(ranks):
    ranks(1, 2)
    with pytest.raises(ValueError, match="a.q: stream-2.0 can be cut at multiples of 256 outputs"):
        linear.ColumnParallelLinear(128, 128, quant_config=config("stream-2.0", "a.q"), prefix="a.q")
    with pytest.raises(ValueError, match="a.down: pcdvq-2.25 can be cut at multiples of 64 inputs"):
        linear.RowParallelLinear(64, 64, quant_config=config("pcdvq-2.25", "a.down"), prefix="a.down")
    fused = config("pcdvq-2.25", "a.qkv_proj")  # one weight in the files, for q, k and v
    with pytest.raises(ValueError, match="a.qkv_proj: .*the files hold 1 weights"):
        linear.QKVParallelLinear(128, 64, 4, 2, quant_config=fused, prefix="a.qkv_proj")


def test_a_weight_that_is_one_in_the_files_is_loaded_whole():
    torch.manual_seed(0)
    x, tensors = torch.randn(2, 128), packed("stream-2.0", 512, 128, 0)
    settings = config("stream-2.0", "a.qkv_proj")
    layer = linear.QKVParallelLinear(128, 64, 4, 2, bias=False, quant_config=settings, prefix="a.qkv_proj")
    load(layer, tensors)
    torch.testing.assert_close(product(layer, x), expected("stream-2.0", x, tensors))


def test_missing_and_wrong_tensors_are_named():
    settings = config("pcdvq-2.25", "a.o_proj")
    layer = linear.RowParallelLinear(128, 64, bias=False, quant_config=settings, prefix="a.o_proj")
    tensors = packed("pcdvq-2.25", 64, 128, 0)
    load(layer, {name: tensor for name, tensor in tensors.items() if name != "magnitude"})
    with pytest.raises(ValueError, match="a.o_proj: the files do not hold all of weight_magnitude"):
        product(layer, torch.randn(1, 128))
    with pytest.raises(ValueError, match=r"a.o_proj: weight_magnitude must be torch.uint8 \[64, 4\], .*\[64, 8\]"):
        load(layer, {"magnitude": torch.zeros(64, 8, dtype=torch.uint8)})


def test_other_layers_stay_as_they_are():
    settings = config("pcdvq-2.25", "a.o_proj")
    head = ParallelLMHead(64, 128, quant_config=settings, prefix="lm_head")
    assert head.weight.is_floating_point()
    dense = linear.RowParallelLinear(128, 64, bias=False, quant_config=settings, prefix="b.o_proj")
    assert dense.weight.is_floating_point() and dense.weight.shape == (64, 128)


def test_a_compiled_product_takes_any_number_of_tokens():
    torch.manual_seed(0)
    settings = config("pcdvq-2.25", "a.o_proj")
    layer = linear.RowParallelLinear(128, 64, bias=False, quant_config=settings, prefix="a.o_proj")
    tensors = packed("pcdvq-2.25", 64, 128, 0)
    load(layer, tensors)
    compiled = torch.compile(layer.quant_method.apply, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 40, 200):
        x = torch.randn(tokens, 128)
        torch.testing.assert_close(compiled(layer, x), expected("pcdvq-2.25", x, tensors))


# -------------------------------------------------------------------------------------------------------------- experts


def expert_config(**other):
    sizes = {"tp_size": 1, "dp_size": 1, "use_ep": False, **other}
    return SimpleNamespace(moe_parallel_config=SimpleNamespace(**sizes), has_bias=False, is_act_and_mul=True)


def experts_layer(method):
    layer = torch.nn.Module()
    layer.activation, layer.apply_router_weight_on_input = MoEActivation.SILU, False
    method.create_weights(layer, 4, 128, 64, torch.float32)
    return layer


def stacked(name, rows, columns):
    weights = [packed(name, rows, columns, seed) for seed in range(4)]
    shared = [argument.name for argument in coding(name).family.arguments if not argument.stacked]
    assert not set(shared) & weights[0].keys()
    return weights, {argument: torch.stack([weight[argument] for weight in weights]) for argument in weights[0]}


@pytest.mark.parametrize("tokens", [3, 70])  # a tile for every token, and tiles of several
@pytest.mark.parametrize("name", FORMATS)
def test_experts_give_the_weighted_sum_of_their_outputs(name, tokens):
    torch.manual_seed(0)
    method = PackedExpertsMethod("a.experts", coding(name), expert_config())
    layer = experts_layer(method)
    up, up_stack = stacked(name, 128, 128)
    down, down_stack = stacked(name, 128, 64)
    named = {
        parameter_name(argument, stack): tensor
        for stack, tensors in (("gate_up_proj", up_stack), ("down_proj", down_stack))
        for argument, tensor in tensors.items()
    }
    assert sorted(layer.load_weights(named.items())) == sorted(named)
    method.process_weights_after_loading(layer)
    x = torch.randn(tokens, 128)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, 2)
    out = method.apply(layer, x, weights, chosen, None, None)
    whole = torch.zeros_like(x)
    for token in range(tokens):
        for expert, weight in zip(chosen[token].tolist(), weights[token]):
            gate, linear_part = expected(name, x[token : token + 1], up[expert]).chunk(2, 1)
            inner = torch.nn.functional.silu(gate) * linear_part
            whole[token] += weight * expected(name, inner, down[expert])[0]
    torch.testing.assert_close(out, whole, rtol=1e-3, atol=1e-3 * whole.abs().max().item())


@pytest.mark.parametrize(
    ("spread", "message"), [({"tp_size": 2}, "tensor parallelism"), ({"use_ep": True}, "expert parallelism")]
)
def test_experts_on_several_devices_are_refused_by_name(spread, message):
    with pytest.raises(NotImplementedError, match=f"a.experts: packed experts do not go with {message}"):
        PackedExpertsMethod("a.experts", coding("pcdvq-2.25"), expert_config(**spread))


def test_missing_and_unknown_tensors_of_experts_are_named():
    method = PackedExpertsMethod("a.experts", coding("pcdvq-2.25"), expert_config())
    layer = experts_layer(method)
    with pytest.raises(ValueError, match="a.experts: the files do not hold all of down_proj, down_proj_magnitude"):
        method.process_weights_after_loading(layer)
    with pytest.raises(ValueError, match="a.experts: 0.w1 is not one of the packed tensors"):
        list(layer.load_weights([("0.w1", torch.zeros(1))]))
