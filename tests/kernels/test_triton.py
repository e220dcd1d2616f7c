"""The Triton kernels against the reference: on a GPU if there is one, else in Triton's interpreter.

The interpreter is selected when Triton is imported, so without a GPU this file runs in a separate process, started by
`test_triton_interpreted.py`.
"""

import dataclasses
import os
from functools import partial

import hf_pcdvq_kernels as ops
import pytest
import torch
from hf_pcdvq_kernels.formats import family_of
from packing import SETTINGS, family, op_pair, random_packed, random_stack, relative_error
from torch._dynamo.testing import CompileCounter

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton's interpreter (test_triton_interpreted.py runs it)", allow_module_level=True)

from hf_pcdvq_kernels.triton import launch, launch_config, timing, tuned, tuning  # noqa: E402
from hf_pcdvq_kernels.triton.product import product  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
# Against the product of the unrounded weight in float64. bfloat16: weights, rotated activations and the result are rounded
# to 8 bits; the reference itself is off by up to 5e-3. float16: sums of 8 to 35 products, and the levels of PCDVQ,
# are rounded to 11 bits.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 2e-6}
# The interpreter is slow: there, some tests take one way to decode of each family, and two of `stream`.
FEWER = SETTINGS if GPU else ["pcdvq-2.25", "ccq-2.5", "stream-2.0", "stream-2.25"]
SIGNS = torch.tensor([1.0 if (3 * j) % 5 < 3 else -1.0 for j in range(64)])


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """Every op runs on Triton kernels, and outputs that they do not write are NaN."""
    ops.set_backend("triton")
    empty = torch.empty

    def poisoned(*shape, **options):
        out = empty(*shape, **options)
        return out.fill_(float("nan") if out.is_floating_point() else -1)  # -1 is a NaN in every 16-bit float format

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    ops.set_backend("auto")


def on_device(packed):
    return [item.to(DEVICE) if isinstance(item, torch.Tensor) else item for item in packed]


def exact_weight(setting, packed):
    ops.set_backend("reference")
    weight = op_pair(setting)[0](*packed, torch.float64)
    ops.set_backend("triton")
    return weight


def exact_rotation(x):
    ops.set_backend("reference")
    rotated = ops.hadamard(x.double(), SIGNS)
    ops.set_backend("triton")
    return rotated


def activations(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PRODUCTS = [
    ((1, 128), 1, torch.bfloat16),
    ((3, 64), 3, torch.float16),
    ((5, 192), 1, torch.bfloat16),
    ((5, 192), 3, torch.float16),
    ((5, 192), 8, torch.bfloat16),
    ((5, 192), 9, torch.float16),
    ((19, 576), 3, torch.float16),
    ((19, 576), 8, torch.bfloat16),
]


def in_turn(settings, cases):
    """All pairs on a GPU; in the interpreter, which is slow, every setting with two cases, and every case with two settings."""
    return [
        pytest.param(setting, shape, tokens, dtype, id=f"{setting}-{shape[0]}x{shape[1]}-{tokens}-{str(dtype)[6:]}")
        for i, setting in enumerate(settings)
        for j, (shape, tokens, dtype) in enumerate(cases)
        if GPU or (i + j) % 4 == 0
    ]


@pytest.mark.parametrize("setting, shape, tokens, dtype", in_turn(SETTINGS, PRODUCTS))
def test_products(setting, shape, tokens, dtype):
    packed = random_packed(setting, *shape)
    x = activations(tokens, shape[1]).to(dtype)
    expected = exact_rotation(x) @ exact_weight(setting, packed).T
    out = op_pair(setting)[1](x.to(DEVICE), *on_device(packed), signs=SIGNS.to(DEVICE))
    assert out.shape == expected.shape and out.dtype == dtype
    assert relative_error(out.cpu(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("setting", [*SETTINGS, "stream-2.5", "stream-4.0"])
def test_products_over_several_rings_or_blocks(setting, tokens):
    """More output channels than a ring of 256, or more inputs than a block, and no rotation."""
    rows, columns = (270, 192) if "stream" in setting else (20, 2112)
    packed = random_packed(setting, rows, columns)
    x = activations(tokens, columns).half()
    out = op_pair(setting)[1](x.to(DEVICE), *on_device(packed))
    assert relative_error(out.cpu(), x.double() @ exact_weight(setting, packed).T) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("tokens", [1, 4, 20])
@pytest.mark.parametrize("setting", ["pcdvq-2.0", "ccq-2.5", "stream-2.25"])
def test_every_config_gives_the_same_product(setting, tokens):
    """However a product is divided into programs; and results are bit-identical on every run."""
    packed, x = random_packed(setting, 5, 2176), activations(tokens, 2176).half()
    expected = x.double() @ exact_weight(setting, packed).T
    weight = family_of(setting).checked("test", *on_device(packed))
    shape = launch_config.Shape(setting, launch_config.tokens_per_program(tokens), 5, 2176)
    choices = launch_config.candidates(shape)
    if not GPU:  # the interpreter is slow
        choices = [*choices[:2], choices[-1]]
    assert len({choice.split_k for choice in choices}) > 1
    for choice in choices:
        (out,) = product(x.to(DEVICE)[None], weight, config=choice)
        assert relative_error(out.cpu(), expected) < TOLERANCE[torch.float16], choice
    assert torch.equal(out, product(x.to(DEVICE)[None], weight, config=choice)[0])


@pytest.mark.parametrize("tokens, dtype", [(5, torch.bfloat16), (16, torch.float16)])
@pytest.mark.parametrize(
    "setting", ["pcdvq-2.0", "pcdvq-2.25", "ccq-2.75", "ccq-2.0625", "stream-2.0", "stream-2.25"]
)
def test_products_with_weights_of_a_stack(setting, tokens, dtype):
    """Groups use experts in any order, possibly the same one; a group without one, or beyond the stack, gets zeros."""
    packed, stacked = random_stack(setting, 4, 9, 192)
    experts = torch.tensor([2, 0, -1, 3, 2, 4, 1 << 30], dtype=torch.int32)
    x = activations(len(experts), tokens, 192).to(dtype)
    out = ops.grouped_matmul(family(setting), x.to(DEVICE), experts.to(DEVICE), on_device(stacked), SIGNS.to(DEVICE))
    assert out.shape == (len(experts), tokens, 9) and out.dtype == dtype
    for group, expert in enumerate(experts.tolist()):
        if not 0 <= expert < 4:
            assert not out[group].any()
            continue
        expected = exact_rotation(x[group]) @ exact_weight(setting, packed[expert]).T
        assert relative_error(out[group].cpu(), expected) < TOLERANCE[dtype]


def test_more_groups_than_a_grid_holds(monkeypatch):
    """They are launched in several grids, each with its own groups' activations and experts."""
    _, stacked = random_stack("ccq-2.5", 4, 9, 192)
    experts = torch.tensor([2, 0, -1, 3, 1], dtype=torch.int32)
    x = activations(len(experts), 1, 192).half()
    arguments = x.to(DEVICE), experts.to(DEVICE), on_device(stacked), SIGNS.to(DEVICE)
    expected, launched = ops.grouped_matmul(family("ccq-2.5"), *arguments), []
    monkeypatch.setattr(launch, "MOST_GROUPS", 2)
    multiply = launch.product
    monkeypatch.setattr(
        launch, "product", lambda part, *a, **kw: launched.append(len(part)) or multiply(part, *a, **kw)
    )
    assert torch.equal(ops.grouped_matmul(family("ccq-2.5"), *arguments), expected)
    assert launched == [2, 2, 1]


def test_no_groups():
    _, stacked = random_stack("ccq-2.5", 4, 9, 192)
    x, experts = torch.zeros(0, 1, 192, dtype=torch.float16), torch.zeros(0, dtype=torch.int32)
    out = ops.grouped_matmul(family("ccq-2.5"), x.to(DEVICE), experts.to(DEVICE), on_device(stacked))
    assert out.shape == (0, 1, 9) and out.dtype == x.dtype


def test_a_measured_config_is_used(tmp_path, monkeypatch):
    """Actually measured and written: the next product is split into as many parts as the file says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "COLD", 1)  # one weight, instead of more than any cache holds
    monkeypatch.setattr(timing, "REPLAYS", 1)
    shape = launch_config.Shape("pcdvq-2.0", 1, 8, 4352)
    packed, x = random_packed("pcdvq-2.0", 8, 4352), activations(1, 4352).half().to(DEVICE)
    default = launch_config.default(shape, launch_config.processors(x.device))
    measured = tuning.measure(shape, x.device)
    assert measured.config in {default, *launch_config.candidates(shape)}
    assert 0 < measured.seconds <= measured.default_seconds
    other = launch_config.LaunchConfig(block_n=8, num_warps=1, split_k=2)
    assert other in launch_config.candidates(shape) and default.split_k != 2
    tuned.write(tuned.file_of(x.device), "a device", {shape: dataclasses.replace(measured, config=other)})
    allocate, allocated = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kw: allocated.append(sizes) or allocate(*sizes, **kw))
    out = op_pair("pcdvq-2.0")[1](x, *on_device(packed))
    tuned.forget()
    parts = [sizes[0] for sizes in allocated if sizes[1:] == (1, 8)]
    assert parts == [2]
    assert (
        relative_error(out.cpu(), x.double().cpu() @ exact_weight("pcdvq-2.0", packed).T) < TOLERANCE[torch.float16]
    )


@pytest.mark.parametrize("tokens, dtype", [(1, torch.bfloat16), (3, torch.float16), (9, torch.float16)])
@pytest.mark.parametrize("setting", FEWER)
def test_activations_prepared_once(setting, tokens, dtype):
    """For products with any number of output channels, bit-identical to preparing them in each product."""
    columns = 1088 if tokens == 1 else 192  # more than a block, and less than one
    x, signs = activations(tokens, columns).to(dtype).to(DEVICE), SIGNS.to(DEVICE)
    prepared = ops.prepare(x, signs, setting)
    matmul = op_pair(setting)[1]
    for rows in (3, 9):
        packed = on_device(random_packed(setting, rows, columns))
        expected = matmul(x, *packed, signs=signs)
        # The activations themselves are no longer read.
        assert torch.equal(matmul(torch.zeros_like(x), *packed, signs=signs, prepared=prepared), expected)


def test_formats_without_kernels_are_rotated_by_one(monkeypatch):
    """And compute what the reference does, in both directions."""
    packed, signs, rotations = on_device(random_packed("int8", 6, 192)), SIGNS.to(DEVICE), []
    hadamard = launch.hadamard
    monkeypatch.setattr(launch, "hadamard", lambda *arguments: rotations.append(1) or hadamard(*arguments))
    x, grad = activations(2, 192).half().to(DEVICE), activations(2, 6).half().to(DEVICE)
    products = [ops.matmul("int8", x, packed, False, signs), ops.matmul("int8", grad, packed, True, signs)]
    assert len(rotations) == 2
    ops.set_backend("reference")
    expected = [ops.matmul("int8", x, packed, False, signs), ops.matmul("int8", grad, packed, True, signs)]
    assert len(rotations) == 2
    for out, value in zip(products, expected):
        assert relative_error(out.cpu(), value.cpu().double()) < TOLERANCE[torch.float16]


def test_what_cannot_be_prepared():
    x = activations(2, 192).half().to(DEVICE)
    packed = on_device(random_packed("ccq-2.5", 6, 192))
    expected = torch.ops.hf_pcdvq_kernels.ccq_matmul(x, *packed)
    with pytest.raises(ValueError, match="prepared must have shape"):
        torch.ops.hf_pcdvq_kernels.ccq_matmul(x, *packed, prepared=ops.prepare(x[:1], None, "ccq-2.5"))
    with pytest.raises(ValueError, match="cannot be rotated in blocks of 128"):
        ops.prepare(x, torch.ones(128, device=DEVICE), "ccq-2.5")
    with pytest.raises(ValueError, match="unknown format 'pcdvq-2.5'; expected one of pcdvq-2.0, "):
        ops.prepare(x, None, "pcdvq-2.5")
    assert ops.prepare(x.float(), None, "ccq-2.5") is None
    assert ops.prepare(activations(65, 192).half().to(DEVICE), None, "ccq-2.5") is None
    assert ops.prepare(x[:0], None, "ccq-2.5") is None
    assert ops.prepare(activations(2, 72).half().to(DEVICE), None, "pcdvq-2.0") is None
    ops.set_backend("reference")
    assert ops.prepare(x, None, "ccq-2.5") is None
    # Prepared before the backend was changed: PyTorch ignores it.
    ops.set_backend("triton")
    prepared = ops.prepare(x, None, "ccq-2.5")
    ops.set_backend("reference")
    out = torch.ops.hf_pcdvq_kernels.ccq_matmul(x, *packed, prepared=prepared)
    assert relative_error(out.cpu(), expected.cpu().double()) < TOLERANCE[torch.float16]


def test_preparing_is_compiled_once_for_one_token_and_once_for_more(monkeypatch):
    monkeypatch.undo()
    counter = CompileCounter()
    for setting in ("pcdvq-2.25", "ccq-2.5", "stream-2.0"):
        torch._dynamo.reset()
        counter.clear()
        compiled = torch.compile(partial(ops.prepare, signs=None, format=setting), backend=counter, dynamic=True)
        for tokens in (1, 2, 3, 5, 8, 12, 13, 40):
            compiled(torch.zeros(tokens, 192, dtype=torch.float16, device=DEVICE))
        assert counter.frame_count == 2


@pytest.mark.parametrize("setting", ["pcdvq-2.25", "ccq-2.0625", "stream-2.25"])
def test_opcheck_of_prepared_products(setting, monkeypatch):
    monkeypatch.undo()  # opcheck compares the op's allocations
    ops.set_backend("triton")
    x, packed = activations(3, 192).half().to(DEVICE), on_device(random_packed(setting, 6, 192))
    signs = SIGNS.to(DEVICE)
    torch.library.opcheck(torch.ops.hf_pcdvq_kernels.prepare.default, (x, signs, setting))
    prepared = ops.prepare(x, signs, setting)
    given = x.clone().requires_grad_()
    op = getattr(torch.ops.hf_pcdvq_kernels, f"{family(setting)}_matmul").default
    torch.library.opcheck(op, (given, *packed, False, signs, prepared))


@pytest.mark.parametrize("shape", [(5, 192), (37, 320)])  # one tile, and several with partial ones
@pytest.mark.parametrize("setting", [*SETTINGS, "stream-2.5", "stream-4.0"])
def test_weights_are_decoded_to_the_same_bits(setting, shape):
    packed = random_packed(setting, *shape)
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if GPU or shape[0] == 5 else (torch.float32,):
        ops.set_backend("reference")
        expected = op_pair(setting)[0](*packed, dtype)
        ops.set_backend("triton")
        out = op_pair(setting)[0](*on_device(packed), dtype).cpu()
        if GPU or dtype != torch.bfloat16:
            assert torch.equal(out, expected)
        else:  # the interpreter truncates where it should round to bfloat16
            assert relative_error(out, expected.double()) < 2**-7


@pytest.mark.parametrize("setting", FEWER)
def test_what_no_product_kernel_takes_is_decoded_first(setting):
    """float32, more tokens than a kernel supports, a transposed product, and a gradient through the rotation."""
    packed = random_packed(setting, 12, 192)
    weight, device_packed = exact_weight(setting, packed), on_device(packed)
    matmul = op_pair(setting)[1]
    x = activations(3, 192)
    assert relative_error(matmul(x.to(DEVICE), *device_packed).cpu(), x.double() @ weight.T) < 2e-6
    x = activations(65, 192).half()
    assert relative_error(matmul(x.to(DEVICE), *device_packed).cpu(), x.double() @ weight.T) < 1.5e-3
    x = activations(2, 192).half().to(DEVICE).requires_grad_()
    grad = activations(2, 12, seed=2).half()
    matmul(x, *device_packed, signs=SIGNS.to(DEVICE)).backward(grad.to(DEVICE))
    ops.set_backend("reference")
    expected = ops.hadamard(grad.double() @ weight, SIGNS, inverse=True)
    assert relative_error(x.grad.cpu(), expected) < TOLERANCE[torch.float16]


def test_inputs_that_no_product_kernel_takes():
    """72 inputs are 9 vectors, and a view may start anywhere; neither can be read four words at a time."""
    packed = random_packed("pcdvq-2.0", 6, 72)
    x = activations(2, 72).half()
    expected = x.double() @ exact_weight("pcdvq-2.0", packed).T
    assert (
        relative_error(torch.ops.hf_pcdvq_kernels.pcdvq_matmul(x.to(DEVICE), *on_device(packed)).cpu(), expected)
        < 1.5e-3
    )
    packed = random_packed("pcdvq-2.0", 7, 96)
    x = activations(2, 96).half()
    expected = x.double() @ exact_weight("pcdvq-2.0", packed).T
    for start in (1, 2):
        bytes_ = torch.cat([torch.zeros(start, dtype=torch.uint8), packed[0].flatten()])
        weight = bytes_.to(DEVICE)[start:].view(7, 24)
        assert weight.data_ptr() % 8 == start
        out = torch.ops.hf_pcdvq_kernels.pcdvq_matmul(x.to(DEVICE), weight, *on_device(packed[1:]))
        assert relative_error(out.cpu(), expected) < 1.5e-3


@pytest.mark.parametrize("factors", [[1e-30], [1e30], [1e-30, 1e30]])
@pytest.mark.parametrize("setting", ["pcdvq-2.25", "ccq-2.5", "stream-2.0"])
def test_activations_of_any_size(setting, factors):
    """In a product, activations are float16: outliers, tiny values and zeros must survive, NaN must propagate, beside tokens of any
    other size."""
    packed = random_packed(setting, 4, 192)
    weight, device_packed = exact_weight(setting, packed), on_device(packed)
    matmul = op_pair(setting)[1]
    x = (activations(len(factors), 192) * torch.tensor(factors)[:, None]).bfloat16()
    x[:, 7] *= 300
    out, expected = matmul(x.to(DEVICE), *device_packed).cpu(), x.double() @ weight.T
    for token, value in zip(out, expected, strict=True):
        assert relative_error(token, value) < TOLERANCE[torch.bfloat16]
    x = torch.zeros(len(factors), 192, dtype=torch.bfloat16)
    assert torch.equal(matmul(x.to(DEVICE), *device_packed).cpu(), torch.zeros(len(factors), 4, dtype=torch.bfloat16))
    x[-1, 5] = float("nan")
    out = matmul(x.to(DEVICE), *device_packed).cpu()
    assert out[-1].isnan().all() and not out[:-1].isnan().any()


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("setting", ["pcdvq-2.25", "ccq-2.5", "stream-2.0"])
def test_activations_that_the_rotation_gathers(setting, tokens):
    """In one input of each block, which is then larger than any before the rotation, by the root of the block's size."""
    packed = random_packed(setting, 4, 192)
    x = SIGNS.repeat(3).expand(tokens, -1).bfloat16() * 2040  # nearly a power of two, the largest for its exponent
    expected = exact_rotation(x) @ exact_weight(setting, packed).T
    out = op_pair(setting)[1](x.to(DEVICE), *on_device(packed), signs=SIGNS.to(DEVICE))
    assert relative_error(out.cpu(), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("block", [1, 8, 128, 512])
def test_hadamard(block, inverse):
    signs = SIGNS.repeat(8)[:block]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = activations(5, 3 * 512).to(dtype)
        ops.set_backend("reference")
        expected = ops.hadamard(x.double(), signs, inverse)
        ops.set_backend("triton")
        out = ops.hadamard(x.to(DEVICE), signs.to(DEVICE), inverse).cpu()
        # Rounded once; twice the error for bfloat16, which the interpreter truncates; float32 adds that of the sums.
        assert relative_error(out, expected) < torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)


def test_leading_dimensions_and_no_tokens():
    packed = on_device(random_packed("ccq-2.75", 6, 128))
    x = activations(2, 2, 128).half().to(DEVICE)
    out = torch.ops.hf_pcdvq_kernels.ccq_matmul(x, *packed)
    assert out.shape == (2, 2, 6) and torch.equal(
        out.view(4, 6), torch.ops.hf_pcdvq_kernels.ccq_matmul(x.view(4, 128), *packed)
    )
    assert torch.ops.hf_pcdvq_kernels.ccq_matmul(x[:0], *packed).shape == (0, 2, 6)


def test_float64_is_refused_when_triton_is_asked_for():
    with pytest.raises(RuntimeError, match="do not compute in float64"):
        torch.ops.hf_pcdvq_kernels.ccq_matmul(
            activations(1, 64).double().to(DEVICE), *on_device(random_packed("ccq-2.5", 4, 64))
        )
