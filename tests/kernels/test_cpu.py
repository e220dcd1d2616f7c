"""The CPU backend against the reference: every format, instruction set and dtype, ugly shapes, every code word."""

import copy
import gc
import pickle
import weakref
from functools import partial

import hf_pcdvq_kernels as ops
import pytest
import torch
from hf_pcdvq_kernels import random_weights
from hf_pcdvq_kernels.cpu import launch, library
from hf_pcdvq_kernels.direct import can_skip_dispatcher
from hf_pcdvq_kernels.formats import FORMATS, family_of
from hf_pcdvq_kernels.reference import products
from packing import random_stack, relative_error
from torch import nn

from hf_pcdvq.codecs import codec_of_setting
from hf_pcdvq.modules import QuantLinear, share_inputs

LOADED = library.load()
pytestmark = pytest.mark.skipif(not isinstance(LOADED, library.Library), reason=f"no CPU kernels: {LOADED}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Activations are quantized to 15 bits in blocks of 256: their error is a step of max|x| / 16256 divided by sqrt(12), about
# 7e-5 of their standard deviation. The 16-bit dtypes add the rounding of results, 2^-9 and 2^-12, and of inputs.
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 6e-3, torch.float16: 8e-4}
# rows x units of inputs (of `multiple`, or of 64 where that is less): less than a vector, odd numbers of everything, a
# partial last group, more than one ring of 256 rows
SHAPES = [(1, 1), (5, 3), (37, 5), (530, 2)]
INSTRUCTIONS = LOADED.instructions if isinstance(LOADED, library.Library) else ()


@pytest.fixture(params=INSTRUCTIONS, autouse=True)
def instructions(request):
    LOADED.set_instructions(request.param)
    yield request.param
    LOADED.set_instructions(INSTRUCTIONS[0])
    ops.set_backend("auto")


def weights(format, seed=0):
    """Random weights of a format in all shapes and, in `stream`, with all sizes of windows."""
    multiple = family_of(format).multiple(format)
    windows = [{"window_bits": bits} for bits in (12, 13, 16)] if "stream" in format else [{}]
    for rows, units in SHAPES:
        # whole groups of 64, less than one, and one that is partial after whole ones, in the same block of 256 or the next
        for columns in {units * max(multiple, 64), units * multiple, 192 + multiple, 256 * units + multiple}:
            for parameters in windows:
                yield random_weights.random_weight(format, rows, columns, seed, **parameters)


def every_code_word(format):
    """A weight with all 65536 values of two successive bytes among its codes."""
    weight = random_weights.random_weight(format, 512, 1024)
    flat = weight.weight.view(torch.uint8).view(-1)
    flat.view(torch.int16)[:] = torch.arange(flat.numel() // 2).to(torch.int16)
    return weight


def arguments(weight):
    return [getattr(weight, "layout_name" if item.name == "layout" else item.name) for item in weight.arguments]


def dequantize(weight, dtype, start=0, stop=None):
    """Decode into memory full of NaN, so that what is not written is seen."""
    stop = weight.rows if stop is None else stop
    out = torch.full((stop - start, weight.columns), torch.nan, dtype=dtype)
    LOADED.dequantize(library.describe(weight), start, stop, out.data_ptr(), library.DTYPE_CODES[dtype], 2)
    return out


@pytest.mark.parametrize("format", library.FORMAT_NAMES)
def test_decoding_is_that_of_the_reference_bit_by_bit(format):
    for weight in [*weights(format), every_code_word(format)]:
        for dtype in DTYPES:
            expected = products.dequantize(weight, dtype)
            assert torch.equal(dequantize(weight, dtype).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("format", library.FORMAT_NAMES)
def test_slices_of_rows_are_decoded(format):
    weight = random_weights.random_weight(format, 600, 128)
    start = weight.row_multiple if weight.row_multiple > 1 else 7
    expected = products.dequantize(weight, torch.float32)[start : start + 300]
    assert torch.equal(dequantize(weight, torch.float32, start, start + 300), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", library.FORMAT_NAMES)
def test_products(format, dtype):
    generator = torch.Generator().manual_seed(1)
    for weight in weights(format):
        decoded = products.dequantize(weight, torch.float32).double()
        for tokens in (1, 2, 7, 16):
            x = torch.randn(tokens, weight.columns, generator=generator).to(dtype)
            out = torch.full((tokens, weight.rows), torch.nan, dtype=dtype)
            code = library.DTYPE_CODES[dtype]
            described = library.describe(weight)
            assert LOADED.linear(described, x.data_ptr(), code, tokens, None, 0, out.data_ptr(), 2)
            # Relative to the norms of the factors: a single product may cancel to nearly nothing.
            error = (out.double() - x.double() @ decoded.T).norm()
            assert error < TOLERANCE[dtype] * x.double().norm() * decoded.norm() / weight.columns**0.5


@pytest.mark.parametrize("block", [1, 4, 32, 1024])
def test_rotation_is_part_of_the_product(block):
    weight = random_weights.random_weight("pcdvq-2.25", 40, 2048)
    signs = 1 - 2.0 * torch.randint(2, (block,), generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(1))
    expected = ops.hadamard(x.double(), signs) @ products.dequantize(weight, torch.float64).T
    for tokens in (x, x.repeat(50, 1)):  # from the codes, and from decoded slices
        out = ops.matmul("pcdvq", tokens, arguments(weight), signs=signs)
        assert relative_error(out[:3], expected) < TOLERANCE[torch.float32]
    grad = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    back = ops.matmul("pcdvq", grad, arguments(weight), transposed=True, signs=signs)
    expected = ops.hadamard(grad.double() @ products.dequantize(weight, torch.float64), signs, inverse=True)
    assert relative_error(back, expected) < 2e-6  # decoded, nothing is quantized


def test_gradient_of_the_input():
    packed = random_weights.random_packed("stream-2.0", 48, 128)
    weight = ops.dequantize("stream", packed, torch.float64)
    x = torch.randn(4, 128, requires_grad=True, generator=torch.Generator().manual_seed(0))
    ops.matmul("stream", x, packed).square().sum().backward()
    expected = 2 * (x.detach().double() @ weight.T) @ weight
    assert relative_error(x.grad, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("format", library.FORMAT_NAMES)
def test_results_do_not_depend_on_the_number_of_threads(format):
    weight = random_weights.random_weight(format, 1500, 512)
    x = torch.randn(5, 512)
    results = []
    for threads in (1, 2, 5):
        out = torch.empty(5, 1500)
        LOADED.linear(library.describe(weight), x.data_ptr(), 0, 5, None, 0, out.data_ptr(), threads)
        results.append(out)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("format", ["pcdvq-2.0", "stream-2.5", "ccq-2.75"])
def test_values_at_the_limits_of_their_dtypes(format):
    weight = random_weights.random_weight(format, 32, 320)
    packed, family = arguments(weight), family_of(format).family
    decoded = products.dequantize(weight, torch.float64)
    x = torch.randn(4, 320, generator=torch.Generator().manual_seed(0))
    for size in (1e-25, 1e25):
        assert relative_error(ops.matmul(family, x * size, packed), (x * size).double() @ decoded.T) < 3e-4
    assert not ops.matmul(family, torch.zeros(2, 320), packed).any()
    assert not ops.matmul(family, torch.full((2, 320), 1e-40), packed).any()
    for value in (torch.nan, torch.inf):  # of one token, whose products then say so
        x[1, 3] = value
        finite = ops.matmul(family, x, packed).isfinite().all(1)
        assert finite.tolist() == [True, False, True, True]


@pytest.mark.parametrize("format", library.FORMAT_NAMES)
def test_experts(format):
    family, number = family_of(format).family, 3
    packed, stack = random_stack(format, number, 40, 128)
    x = torch.randn(5, 2, 128, generator=torch.Generator().manual_seed(0))
    experts = torch.tensor([2, -1, 0, 2, 1], dtype=torch.int32)
    out = ops.grouped_matmul(family, x, experts, stack)
    assert not out[1].any()
    for group, expert in enumerate(experts.tolist()):
        if expert >= 0:
            assert torch.equal(out[group], ops.matmul(family, x[group], packed[expert]))
    with pytest.raises(ValueError, match=r"experts\[0\] is 3, but the stack has 3 weights"):
        ops.grouped_matmul(family, x, experts + 1, stack)


def test_prepared_activations_give_the_same_product():
    packed = random_weights.random_packed("pcdvq-2.25", 24, 256)
    signs, x = torch.ones(64), torch.randn(3, 256)
    prepared = ops.prepare(x, signs, "pcdvq-2.25")
    expected = ops.matmul("pcdvq", x, packed, signs=signs)
    assert torch.equal(ops.matmul("pcdvq", x, packed, signs=signs, prepared=prepared), expected)
    assert torch.equal(torch.ops.hf_pcdvq_kernels.prepare(x, signs, "pcdvq-2.25"), prepared)
    with pytest.raises(ValueError, match="prepared must have shape"):
        ops.matmul("pcdvq", x[:2], packed, signs=signs, prepared=prepared)
    assert ops.prepare(x.repeat(50, 1), signs, "pcdvq-2.25") is None  # so many tokens are multiplied otherwise


def test_opcheck_of_prepare():
    for x in (torch.randn(3, 256), torch.randn(1, 70, dtype=torch.bfloat16)):
        torch.library.opcheck(torch.ops.hf_pcdvq_kernels.prepare.default, (x, None, "stream-2.0"))


def test_every_float16_is_read_and_written():
    """By a rotation in blocks of one, which changes nothing."""
    halves = torch.arange(65536).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    assert torch.equal(launch.hadamard(halves, torch.ones(1), False).view(torch.int16), halves.view(torch.int16))


@pytest.mark.parametrize("format", ["pcdvq-2.0", "stream-2.0", "int8"])
def test_float16_is_rounded_to_nearest(format):
    """Decoded values between, below and beyond what float16 holds."""
    weight = random_weights.random_weight(format, 64, 256)
    for factor in (1e-5, 1e-7, 1.0, 1e4):
        weight.scale.mul_(factor)
        expected = products.dequantize(weight, torch.float16)
        assert torch.equal(dequantize(weight, torch.float16).view(torch.int16), expected.view(torch.int16))
        weight.scale.div_(factor)


def test_arguments_of_prepare_are_checked():
    for signs in (torch.ones(512), torch.ones(64, dtype=torch.float64), torch.ones(3), torch.ones(128)[::2]):
        with pytest.raises((ValueError, TypeError)):
            ops.prepare(torch.randn(1, 64), signs, "pcdvq-2.25")
    with torch.device("meta"):  # a default device is not that of the activations
        assert ops.prepare(torch.randn(1, 64, device="cpu"), None, "pcdvq-2.25").device.type == "cpu"


def test_words_at_odd_addresses():
    packed = random_weights.random_packed("pcdvq-2.25", 8, 96)
    for index, tensor in enumerate(packed):
        if tensor.dtype in (torch.uint8, torch.int8):
            memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
            packed[index] = memory[1:].view(tensor.shape).copy_(tensor)
    x = torch.randn(2, 96)
    weight = ops.dequantize("pcdvq", packed, torch.float32)
    ops.set_backend("reference")
    assert torch.equal(weight, ops.dequantize("pcdvq", packed, torch.float32))
    ops.set_backend("cpu")
    assert relative_error(ops.matmul("pcdvq", x, packed), x.double() @ weight.double().T) < 3e-4


# ------------------------------------------------------------------------------------------------------- layers


def layer(setting="pcdvq-2.25", bias=True, seed=0):
    torch.manual_seed(seed)
    return QuantLinear.from_linear(nn.Linear(64, 48, bias=bias), codec_of_setting(setting, 1024, 0))


@torch.no_grad()
def test_a_layer_computes_what_its_op_does():
    for setting in ("pcdvq-2.25", "ccq-2.5", "stream-2.0", "int8"):
        packed = layer(setting)
        for x in (
            torch.randn(64),
            torch.randn(2, 3, 64),
            torch.randn(64, 5).T,
            torch.randn(140, 64),
            torch.empty(0, 64),
        ):
            expected = packed.codec.matmul(x, packed.packed, packed.tables) + packed.bias
            assert torch.equal(packed(x), expected)
        with pytest.raises(ValueError, match="the last dimension of x must be 64"):
            packed(torch.randn(3, 32))


@torch.no_grad()
def test_a_layer_notices_that_its_tensors_have_changed():
    packed, other, x = layer(), layer(seed=1), torch.randn(1, 64)
    expected = other(x)
    before = packed(x)
    packed.load_state_dict(other.state_dict())
    assert torch.equal(packed(x), expected)
    packed = layer()
    assert torch.equal(packed(x), before)
    for name, parameter in other.named_parameters():
        setattr(packed, name, parameter)
    assert torch.equal(packed(x), expected)
    packed = layer()
    packed(x)
    packed.set_packed("weight", other.packed)
    packed.bias = other.bias
    assert torch.equal(packed(x), expected)


@torch.no_grad()
def test_a_layer_elsewhere_is_refused_by_name_and_does_not_keep_what_it_had():
    packed, x = layer(), torch.randn(1, 64)
    packed(x)
    words = weakref.ref(packed.weight)
    packed.to("meta")
    gc.collect()
    assert words() is None
    with pytest.raises(ValueError, match="x is on cpu, weight on meta"):
        packed(x)


@torch.no_grad()
def test_layers_that_share_an_input_of_a_wrong_size_refuse_it():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (
                QuantLinear.from_linear(nn.Linear(1024, 8), codec_of_setting("pcdvq-2.25", 1024, 0)) for _ in range(2)
            )

        def forward(self, x):
            return self.first(x) + self.second(x)

    pair = Pair()
    share_inputs(pair)
    assert pair(torch.randn(2, 1024)).isfinite().all()
    for x in (torch.randn(1, 64), torch.tensor(1.0)):
        with pytest.raises(ValueError):
            pair(x)


@torch.no_grad()
def test_a_layer_that_has_been_called_can_be_copied_and_saved():
    packed, x = layer(), torch.randn(1, 64)
    expected = packed(x)
    assert torch.equal(copy.deepcopy(packed)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), expected)


def test_the_dispatcher_is_skipped_only_where_nothing_needs_it():
    skips, x = partial(can_skip_dispatcher, family=family_of("pcdvq-2.0")), torch.randn(2, 64)
    assert skips(x)
    assert not skips(x.requires_grad_())
    with torch.no_grad():
        assert skips(x)
    seen = []
    torch.vmap(lambda part: seen.append(skips(part)) or part)(torch.randn(3, 4))
    assert seen == [False]
    assert not skips(torch.randn(2, dtype=torch.float64))
    ops.set_backend("reference")
    assert not skips(torch.randn(2))


def test_gradients_and_compiled_graphs_of_a_layer():
    packed = layer()
    x = torch.randn(3, 64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    dense = packed.dequantize(torch.float32)
    packed(x).sum().backward()
    mine, x.grad = x.grad, None
    dense(x).sum().backward()
    assert relative_error(mine, x.grad.double()) < 1e-5
    with torch.no_grad():
        compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), packed(x), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the choice


def test_unknown_instructions_are_refused():
    with pytest.raises(ValueError, match="instructions must be one of .*portable, got 'avx1024'"):
        LOADED.set_instructions("avx1024")


def test_what_the_library_cannot_compute_is_refused_by_name():
    packed = random_weights.random_packed("ccq-2.5", 4, 64)
    ops.set_backend("cpu")
    with pytest.raises(RuntimeError, match="set to 'cpu', but the kernels do not compute in float64"):
        ops.matmul("ccq", torch.randn(1, 64, dtype=torch.float64), packed)
    ops.set_backend("auto")
    assert ops.matmul("ccq", torch.randn(1, 64, dtype=torch.float64), packed).dtype == torch.float64


def test_all_formats_have_kernels_or_say_that_they_have_none():
    assert {name for name, family in FORMATS.items() if family.on_cpu} == set(library.FORMAT_NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_tokens_hardly_changes_their_products(dtype):
    """Whatever groups they are multiplied in, from the codes or with decoded weights."""
    packed, x = random_weights.random_packed("ccq-2.5", 24, 512), torch.randn(150, 512).to(dtype)
    weight = ops.dequantize("ccq", packed, torch.float64)
    for tokens in (3, 5, 13, 16, 17, 32, 33, 128, 129):
        out = ops.matmul("ccq", x[:tokens], packed)
        assert relative_error(out, x[:tokens].double() @ weight.T) < 2 * TOLERANCE[dtype]
