"""The ops: schema, fake implementation, gradient, agreement with an explicit product, and every error."""

import hf_pcdvq_kernels as ops
import pytest
import torch
from hf_pcdvq_kernels import random_weights
from hf_pcdvq_kernels.reference import products
from packing import SETTINGS as WITH_KERNELS
from packing import family, op_pair, random_packed, random_stack, relative_error

NAMESPACE = torch.ops.hf_pcdvq_kernels
IN_PYTORCH = pytest.mark.usefixtures("reference")  # tests/kernels/test_cpu.py has the CPU backend's own
SETTINGS = [*WITH_KERNELS, "int8"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The product is compared with that of the same decoded weight in float64, so only the rounding of the inputs and of
# the accumulation remains: a few units in the last place of the result's dtype.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 2e-6}
# rows x inputs; inputs a multiple of 64, including odd numbers of groups; more and fewer rows than a ring of 256
SHAPES = [(1, 64), (5, 192), (123, 576), (64, 1088), (600, 64)]


@pytest.fixture
def reference():
    ops.set_backend("reference")
    yield
    ops.set_backend("auto")


@pytest.mark.parametrize("setting", SETTINGS)
def test_opcheck_dequantize(setting):
    dequantize, _ = op_pair(setting)
    torch.library.opcheck(dequantize, (*random_packed(setting, 5, 192), torch.bfloat16))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_opcheck_matmul(setting, transposed):
    _, matmul = op_pair(setting)
    x = torch.randn(3, 5 if transposed else 192, requires_grad=True)
    torch.library.opcheck(matmul, (x, *random_packed(setting, 5, 192)), {"transposed": transposed})
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    torch.library.opcheck(matmul, (x, *random_packed(setting, 5, 192), transposed, signs))


@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck_hadamard(inverse):
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    torch.library.opcheck(NAMESPACE.hadamard, (torch.randn(3, 12, requires_grad=True), signs), {"inverse": inverse})


@IN_PYTORCH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_matmul_is_the_product_with_the_decoded_weight(setting, shape, dtype):
    dequantize, matmul = op_pair(setting)
    packed = random_packed(setting, *shape)
    weight = dequantize(*packed, dtype).double()
    # Products with bytes are scaled at the end, so no weight is rounded.
    exact = dequantize(*packed, torch.float32).double() if setting == "int8" else weight
    for batch in [(1,), (3, 7)]:
        x = torch.randn(*batch, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        out = matmul(x, *packed)
        assert out.shape == (*batch, shape[0]) and out.dtype == dtype
        assert relative_error(out, x.double() @ exact.T) < TOLERANCE[dtype]
        grad = torch.randn(*batch, shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)
        assert relative_error(matmul(grad, *packed, transposed=True), grad.double() @ weight) < TOLERANCE[dtype]


@pytest.mark.parametrize("setting", SETTINGS)
def test_signs_rotate_the_weight_back(setting):
    """The product uses the unrotated weight, in both directions."""
    dequantize, matmul = op_pair(setting)
    packed, signs = (
        random_packed(setting, 24, 192),
        torch.randn(64, generator=torch.Generator().manual_seed(0)).sign(),
    )
    weight = ops.hadamard(dequantize(*packed, torch.float64), signs, inverse=True)
    x, grad = torch.randn(3, 192, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    # float64 in, float64 arithmetic: only the rounding of products remains; for bytes, which are scaled at the end,
    # that of the decoded weight to float32
    tolerance = 1e-7 if setting == "int8" else 1e-12
    assert relative_error(matmul(x, *packed, signs=signs), x @ weight.T) < tolerance
    assert relative_error(matmul(grad, *packed, transposed=True, signs=signs), grad @ weight) < tolerance


@pytest.mark.parametrize("setting", SETTINGS)
def test_slices_join_into_the_same_weight(setting, monkeypatch, reference):
    dequantize, matmul = op_pair(setting)
    packed = random_packed(setting, 600, 576)
    x, grad = torch.randn(4, 576), torch.randn(4, 600)
    whole = dequantize(*packed, torch.float32), matmul(x, *packed), matmul(grad, *packed, transposed=True)
    monkeypatch.setattr(products, "SLICE", 576 * 70)  # 9 slices, the last one short; rings of 256 stay whole
    # outputs start as NaN, so a skipped slice is noticed
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, float("nan"), **options))
    cut = dequantize(*packed, torch.float32), matmul(x, *packed), matmul(grad, *packed, transposed=True)
    assert torch.equal(cut[0], whole[0])
    for part, uncut in zip(cut[1:], whole[1:]):
        assert relative_error(part, uncut.double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradient_in_the_input(setting):
    dequantize, matmul = op_pair(setting)
    packed = random_packed(setting, 7, 64)
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: matmul(value, *packed), x)
    assert torch.autograd.gradgradcheck(lambda value: matmul(value, *packed), x)


@pytest.mark.parametrize("block", [1, 2, 64, 128])
def test_hadamard_matches_the_definition(block):
    """H[i, j] = (-1)^popcount(i & j), an independent definition of Sylvester's construction."""
    signs = torch.tensor([1.0 if (3 * j) % 5 < 3 else -1.0 for j in range(block)])
    entries = [[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]
    rotation = torch.tensor(entries, dtype=torch.float64) * signs * block**-0.5
    x = torch.randn(5, 3 * block, dtype=torch.float64)
    expected = torch.cat([part @ rotation.T for part in x.split(block, -1)], -1)
    # float64 in, float64 arithmetic: only the rounding of products remains
    torch.testing.assert_close(ops.hadamard(x, signs), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.hadamard(ops.hadamard(x, signs), signs, inverse=True), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard_rounds_once(dtype):
    """Low-precision input is rotated in float32: the result is the rounding of the exact one."""
    signs = torch.ones(128)
    x = torch.randn(16, 256).to(dtype)
    exact = ops.hadamard(x.double(), signs)
    assert ops.hadamard(x, signs).dtype == dtype
    # float32 itself also accumulates the rounding of 128 products
    assert relative_error(ops.hadamard(x, signs), exact) < torch.finfo(dtype).eps * (
        4 if dtype == torch.float32 else 1
    )


def test_hadamard_of_a_strided_view():
    x = torch.randn(8, 6).T
    # the matrix product may sum in a different order
    torch.testing.assert_close(ops.hadamard(x, torch.ones(8)), ops.hadamard(x.contiguous(), torch.ones(8)))


def changed(packed, index, value):
    return [value if position == index else item for position, item in enumerate(packed)]


PCDVQ = random_packed("pcdvq-2.25", 4, 64)
CLUSTER = random_packed("ccq-2.0625", 4, 64)
STREAM = random_packed("stream-2.0", 4, 64)
BAD_PACKED = [
    ("pcdvq", PCDVQ, 0, PCDVQ[0].int(), TypeError, "weight must be torch.uint8"),
    ("pcdvq", PCDVQ, 0, PCDVQ[0][0], ValueError, "weight must have two dimensions"),
    ("pcdvq", PCDVQ, 0, PCDVQ[0][:, :15], ValueError, "multiple of 8"),
    ("pcdvq", PCDVQ, 0, PCDVQ[0].T.contiguous().T, ValueError, "weight must be contiguous"),
    ("pcdvq", PCDVQ, 1, PCDVQ[1][:3], ValueError, "magnitude must have shape"),
    ("pcdvq", PCDVQ, 1, None, ValueError, "patterns must have shape"),
    ("pcdvq", PCDVQ, 2, PCDVQ[2].half(), TypeError, "scale must be torch.float32"),
    ("pcdvq", PCDVQ, 2, PCDVQ[2][:3], ValueError, "scale must have shape"),
    ("pcdvq", PCDVQ, 3, PCDVQ[3][:100], ValueError, "patterns must have shape"),
    ("pcdvq", PCDVQ, 4, PCDVQ[4].to("meta"), ValueError, "levels is on meta"),
    ("ccq", CLUSTER, 0, CLUSTER[0].short(), TypeError, "weight must be torch.uint8"),
    ("ccq", CLUSTER, 0, CLUSTER[0][:, :15], ValueError, "multiple of 16"),
    ("ccq", CLUSTER, 2, None, ValueError, "local_scale is required"),
    ("ccq", CLUSTER, 2, CLUSTER[2][:, :0], ValueError, "local_scale must have shape"),
    ("ccq", CLUSTER, 3, CLUSTER[3].double(), TypeError, "code_scale must be torch.float32"),
    ("ccq", CLUSTER, 5, "3.0", ValueError, "layout must be one of"),
    ("ccq", random_packed("ccq-2.5", 4, 64), 2, CLUSTER[2], ValueError, "local_scale must be None"),
    ("stream", STREAM, 0, STREAM[0].long(), TypeError, "weight must be torch.int32"),
    ("stream", STREAM, 0, STREAM[0].repeat(2, 1), ValueError, r"weight must have shape \[1, 64\]"),
    ("stream", STREAM, 0, STREAM[0][0], ValueError, "weight must have two dimensions"),
    ("stream", STREAM, 1, STREAM[1][None], ValueError, r"scale must be \[N\]"),
    ("stream", STREAM, 2, 2.1, ValueError, "bits must be one of 2.0, 2.25, 2.5, 3.0, 4.0, got 2.1"),
    ("stream", STREAM, 3, 11, ValueError, "window_bits must be one of"),
]


@pytest.mark.parametrize("method, packed, index, value, error, message", BAD_PACKED)
def test_wrong_packed_tensors_are_refused(method, packed, index, value, error, message):
    bad = changed(packed, index, value)
    with pytest.raises(error, match=message):
        ops.dequantize(method, bad, torch.float32)
    with pytest.raises(error, match=message):
        ops.matmul(method, torch.randn(2, 64), bad)


@pytest.mark.parametrize("method, packed", [("pcdvq", PCDVQ), ("ccq", CLUSTER), ("stream", STREAM)])
def test_wrong_inputs_are_refused(method, packed):
    with pytest.raises(ValueError, match="last dimension of x must be 64"):
        ops.matmul(method, torch.randn(2, 65), packed)
    with pytest.raises(ValueError, match=r"last dimension of x must be 4 .*transposed"):
        ops.matmul(method, torch.randn(2, 64), packed, transposed=True)
    with pytest.raises(TypeError, match="x must be one of"):
        ops.matmul(method, torch.ones(2, 64, dtype=torch.int64), packed)
    with pytest.raises(ValueError, match="x is on meta"):
        ops.matmul(method, torch.randn(2, 64, device="meta"), packed)
    with pytest.raises(TypeError, match="dtype must be one of"):
        ops.dequantize(method, packed, torch.int32)


def test_wrong_rotations_are_refused():
    with pytest.raises(ValueError, match="pcdvq_matmul: signs must have a power-of-two length, got 6"):
        ops.matmul("pcdvq", torch.randn(2, 64), PCDVQ, signs=torch.ones(6))
    with pytest.raises(ValueError, match="64 values cannot be rotated in blocks of 128"):
        ops.matmul("pcdvq", torch.randn(2, 64), PCDVQ, signs=torch.ones(128))
    with pytest.raises(ValueError, match="power-of-two length, got 6"):
        ops.hadamard(torch.randn(2, 12), torch.ones(6))
    with pytest.raises(ValueError, match="signs must have a length of at most 65536, got 131072"):
        ops.hadamard(torch.randn(1, 1 << 17), torch.ones(1 << 17))
    with pytest.raises(ValueError, match="multiple of the block of 8"):
        ops.hadamard(torch.randn(2, 12), torch.ones(8))
    with pytest.raises(TypeError, match="signs must be torch.float32"):
        ops.hadamard(torch.randn(2, 8), torch.ones(8, dtype=torch.int8))
    with pytest.raises(TypeError, match="x must be one of"):
        ops.hadamard(torch.ones(2, 8, dtype=torch.int32), torch.ones(8))


def test_random_weights_have_the_parameters_of_their_format_only():
    assert random_weights.random_packed("stream-2.0", 4, 64, window_bits=16)[-1] == 16
    with pytest.raises(TypeError, match="stream-2.0 has no parameter window"):
        random_weights.random_packed("stream-2.0", 4, 64, window=16)
    with pytest.raises(ValueError, match="unknown format 'stream 2.0'"):
        random_weights.random_packed("stream 2.0", 4, 64)


@pytest.mark.parametrize("setting", SETTINGS)
def test_grouped_products(setting):
    """Against individual products, and PyTorch's own op checks."""
    method = family(setting)
    packed, stacked = random_stack(setting, 3, 24, 64)
    experts = torch.tensor([1, -1, 2, 1], dtype=torch.int32)
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    out = ops.grouped_matmul(method, x, experts, stacked)
    for group, expert in enumerate(experts.tolist()):
        expected = op_pair(setting)[1](x[group], *packed[expert]) if expert >= 0 else torch.zeros(3, 24)
        assert torch.equal(out[group], expected)
    op = getattr(torch.ops.hf_pcdvq_kernels, f"{method}_grouped_matmul")
    torch.library.opcheck(op.default, (x, experts, *stacked), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(TypeError, match="experts must be torch.int32"):
        ops.grouped_matmul(method, x, experts.long(), stacked)
    with pytest.raises(ValueError, match=r"x must be \[G, T, 64\]"):
        ops.grouped_matmul(method, x[0], experts, stacked)
    with pytest.raises(ValueError, match="contiguous stacks"):
        ops.grouped_matmul(method, x, experts, packed[0])
    with pytest.raises(ValueError, match=r"experts\[3\] is 3, but the stack has 3 weights"):
        ops.grouped_matmul(method, x, torch.tensor([2, 0, 1, 3], dtype=torch.int32), stacked)
    with pytest.raises(ValueError, match="unknown family of formats 'gptq'; expected one of pcdvq, "):
        ops.grouped_matmul("gptq", x, experts, stacked)
