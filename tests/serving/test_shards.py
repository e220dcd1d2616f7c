"""What the plugin for vLLM cuts from packed weights and merges into layers, against the decoded weights. Needs no vLLM."""

import hf_pcdvq_kernels as ops
import pytest
import torch
from hf_pcdvq_kernels import FORMATS
from hf_pcdvq_kernels.random_weights import random_packed
from hf_pcdvq_vllm.coding import Coding
from hf_pcdvq_vllm.names import packed_as
from hf_pcdvq_vllm.shards import Part, Span, check_part, column_multiple, part_of, products, shard_index

EVERY = sorted(FORMATS)


def coding(name, block=64):
    return Coding.described({"setting": name, "hadamard_block": block, "hadamard_seed": 1})


def packed(coding, rows, columns, seed=0):
    """Random packed tensors, by argument."""
    family = coding.family
    values = random_packed(coding.format, rows, columns, seed=seed)
    specs = family.specs(coding.format, rows, columns)
    return {argument.name: value for argument, value in zip(family.arguments, values) if argument.name in specs}


def multiply(coding, x, tensors):
    """`x` times the weight, rotated as its own number of inputs says."""
    tables = coding.tables(x.shape[1])
    return ops.matmul(coding.family.family, x, coding.arguments(tensors, tables), signs=tables.get("signs"))


def cut(coding, tensors, part):
    check_part("layer", coding, part)
    return {name: part_of(tensor, name, coding, part).contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", EVERY)
def test_ranks_with_some_outputs_each_compute_all_of_them(name):
    torch.manual_seed(0)
    described, x = coding(name), torch.randn(3, 128)
    whole = packed(described, 640, 128)
    spans = [Span(0, 256), Span(256, 512), Span(512, 640)]
    parts = [cut(described, whole, Part(span, Span(0, 128), 640, 128)) for span in spans]
    out = torch.cat([multiply(described, x, part) for part in parts], 1)
    torch.testing.assert_close(out, multiply(described, x, whole))


@pytest.mark.parametrize("name", EVERY)
def test_ranks_with_some_inputs_each_add_up(name):
    torch.manual_seed(0)
    # Blocks of 64: the largest power of two in 3 * 128 is larger, that in 128 and 256 is not smaller.
    described, x = coding(name), torch.randn(3, 384)
    whole = packed(described, 96, 384)
    out = torch.zeros(3, 96)
    for span in (Span(0, 128), Span(128, 384)):
        part = cut(described, whole, Part(Span(0, 96), span, 96, 384))
        out += multiply(described, x[:, span.start : span.stop], part)
    expected = multiply(described, x, whole)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_inputs_are_cut_where_a_block_and_a_byte_end():
    assert column_multiple(coding("pcdvq-2.0"), 768) == 64  # the block
    assert column_multiple(coding("pcdvq-2.0", block=0), 768) == 8
    assert column_multiple(coding("pcdvq-2.25", block=8), 768) == 32  # four vectors share a byte of magnitudes
    assert column_multiple(coding("ccq-2.5"), 768) == 64
    assert column_multiple(coding("ccq-2.0625"), 768) == 128  # two groups share a byte of scales
    assert column_multiple(coding("stream-2.0", block=128), 576) == 64  # the largest power of two in 576


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        (
            "stream-2.0",
            Part(Span(128, 256), Span(0, 64), 256, 64),
            "multiples of 256 outputs, .* needs 128 to 256 of 256",
        ),
        ("pcdvq-2.25", Part(Span(0, 8), Span(32, 64), 8, 64), "multiples of 64 inputs, .* needs 32 to 64 of 64"),
        ("ccq-2.0625", Part(Span(0, 8), Span(64, 128), 8, 128), "multiples of 128 inputs"),
    ],
)
def test_other_parts_are_refused_by_the_name_of_the_layer(name, part, message):
    with pytest.raises(ValueError, match=f"model.layers.0.mlp.down_proj: {name} can be cut at {message}"):
        check_part("model.layers.0.mlp.down_proj", coding(name), part)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("rows", [[576, 192, 192], [256, 512, 64]])
def test_merged_weights_are_multiplied_in_as_few_products_as_the_format_allows(name, rows):
    torch.manual_seed(0)
    described, x = coding(name), torch.randn(3, 64)
    weights = [packed(described, count, 64, seed=index) for index, count in enumerate(rows)]
    groups = products(described, rows)
    alone = described.family.family == "stream" and rows[0] % 256
    assert groups == ([[0], [1], [2]] if alone else [[0, 1, 2]])
    merged = [
        {argument: torch.cat([weights[index][argument] for index in group]) for argument in weights[0]}
        for group in groups
    ]
    if "patterns" in described.tables(64):  # the same codebook for all
        assert len(groups) == 1
    out = torch.cat([multiply(described, x, tensors) for tensors in merged], 1)
    torch.testing.assert_close(out, torch.cat([multiply(described, x, tensors) for tensors in weights], 1))


MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def test_a_layer_of_vllm_is_made_of_the_weights_that_it_merges():
    two, eight = coding("stream-2.0"), coding("int8")
    codings = {f"a.{name}": two for name in MERGED["qkv_proj"]} | {"a.o_proj": eight, "b.qkv_proj": eight}
    assert packed_as("a.qkv_proj", codings, MERGED) == (two, 3)
    assert packed_as("a.o_proj", codings, MERGED) == (eight, 1)
    assert packed_as("b.qkv_proj", codings, MERGED) == (eight, 1)  # one weight in the files too
    assert packed_as("a.gate_up_proj", codings, MERGED) is None
    assert packed_as("lm_head", codings, MERGED) is None


@pytest.mark.parametrize("other", [{}, {"a.up_proj": coding("int8")}])
def test_merged_weights_that_are_packed_differently_are_refused(other):
    with pytest.raises(ValueError, match=r"a\.gate_up_proj: .*a\.gate_proj: ccq-2\.5, a\.up_proj: (not packed|int8)"):
        packed_as("a.gate_up_proj", {"a.gate_proj": coding("ccq-2.5"), **other}, MERGED)


def test_merged_weights_are_counted_by_vllms_names():
    assert [shard_index(name) for name in ("q", "k", "v", 1, None)] == [0, 1, 2, 1, 0]
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        shard_index((0, 1))
