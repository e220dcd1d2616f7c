"""What the ops call: allocates results, chooses kernels, launches them. Every shape takes the same path every time.

Nothing here waits for the device, so that a product can be captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .._checks import check_prepared
from ..reference.sliced import sliced_dequantize, sliced_matmul
from ..weights import CcqWeight, PcdvqWeight, Weight
from . import activations, ccq, launch_config, pcdvq, stream, tiles, tuned

INTERPRETED = isinstance(tiles.dequantize_kernel, InterpretedFunction)
# Weights decoded at a time where PyTorch multiplies: 128 MiB of 16-bit floats, and enough for a GPU's matrix product.
SLICE = 1 << 26
# No kernel lets the compiler fuse multiplications and additions: code words must be rounded as the reference rounds them.
# Where a fused operation is wanted, the kernels say so.
# Loads are not pipelined through shared memory either: it would take more of that than there is.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}
TILE_ROWS, TILE_COLUMNS = 16, 128


class Form(NamedTuple):
    """A weight as the kernels take it."""

    codec: str
    packed: tuple[Tensor, ...]  # the packed weight and four more tensors, some of them stand-ins
    constants: dict[str, Any]


def codec_of(weight: Weight) -> str:
    """What the kernels call the format of a weight."""
    if isinstance(weight, PcdvqWeight):
        return f"pcdvq {2.0 if weight.magnitude is None else 2.25}"
    if isinstance(weight, CcqWeight):
        return f"ccq {weight.layout.name}"
    return f"stream {weight.layout.bits}"


def form(weight: Weight) -> Form:
    """A weight as the kernels take it."""
    codec, scale = codec_of(weight), weight.scale
    if isinstance(weight, PcdvqWeight):
        patterns = _aligned(weight.patterns)
        packed = (weight.weight, _or(weight.magnitude, weight.weight), scale, patterns, weight.levels)
        return Form(codec, packed, {"PATTERNS": len(patterns)})
    if isinstance(weight, CcqWeight):
        rest = _or(weight.local_scale, weight.weight), _or(weight.code_scale, scale), _or(weight.code_zero, scale)
        return Form(codec, (weight.weight, scale, *rest), ccq.constants(weight.layout))
    return Form(codec, (weight.weight, *[scale] * 4), stream.constants(weight.layout))


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]`, bit for bit that of the reference."""
    decode = _rows(weight, dtype)
    return sliced_dequantize(
        weight.rows, weight.columns, decode, dtype, weight.weight.device, weight.row_multiple, SLICE
    )


def matmul(
    x: Tensor, weight: Weight, transposed: bool, signs: Tensor | None, prepared: Tensor | None = None
) -> Tensor:
    """`hadamard(x) @ W.T`, or `hadamard(x @ W, inverse=True)` where `transposed`; without `signs` nothing is rotated.

    `prepared` is what `prepare` made of `x`; a product without a kernel does not read it.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not transposed and _has_kernel(weight, len(flat), x.dtype):
        out = product(flat.contiguous()[None], weight, signs, None, None, prepared)
        return out.reshape(*x.shape[:-1], weight.rows)
    if signs is not None and not transposed:
        x = hadamard(x, signs, False)
    out = sliced_matmul(
        x, weight.rows, weight.columns, _rows(weight, x.dtype), transposed, weight.row_multiple, SLICE
    )
    return hadamard(out, signs, True) if signs is not None and transposed else out


def grouped_matmul(x: Tensor, experts: Tensor, first: Weight, signs: Tensor | None) -> Tensor | None:
    """The product of every `x[g]` with weight `experts[g]` of a stack; None if there is no kernel for it.

    Args:
        x: `[G, T, K]`.
        experts: int32 `[G]`; the product is zero where it is negative.
        first: the first weight of the stack, where its tensors begin.
    """
    if not _has_kernel(first, x.shape[1], x.dtype):
        return None
    return product(x.contiguous(), first, signs, None, experts)


def hadamard(x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    """See `hf_pcdvq_kernels.hadamard`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    block = len(signs)
    tile = max(activations.TILE, block)
    with _on(x.device):
        activations.hadamard_kernel[(triton.cdiv(x.numel(), tile),)](
            x, signs, out, x.numel(), INVERSE=inverse, BLOCK=block, TILE=tile, **OPTIONS
        )
    return out


def prepare(x: Tensor, signs: Tensor | None, codec: str) -> Tensor:
    """What products with a weight of a format ("pcdvq 2.25") make of `x` `[..., K]` first, in one int32 buffer."""
    flat = x.reshape(-1, x.shape[-1])
    order, scaled = _default_order(codec, *flat.shape)
    with _on(x.device):
        return _prepare(flat.contiguous(), signs, order, scaled)


def prepared_words(codec: str, tokens: int, columns: int) -> int:
    """The length of what `prepare` returns."""
    return _buffer_words(*_default_order(codec, tokens, columns), tokens, columns)


def product(
    x: Tensor,
    weight: Weight,
    signs: Tensor | None,
    choice: launch_config.Config | None,
    experts: Tensor | None,
    prepared: Tensor | None = None,
) -> Tensor:
    """`hadamard(x) @ W.T` for 16-bit `x` `[G, T, K]` of up to `DOT_TOKENS` rows; G is 1 without `experts`.

    `choice` overrides how it is cut into programs. `experts` is described in `grouped_matmul`, `prepared` in `matmul`; the
    latter comes without the two others.
    """
    packed = form(weight)
    groups, tokens, columns = x.shape
    shape = launch_config.Shape(packed.codec, launch_config.tokens_per_program(tokens), weight.rows, columns)
    if choice is None and experts is None:
        choice = tuned.choose(shape, x.device)
        # What is prepared lies in the order of the default config, which other warps may not read.
        default = _default_order(packed.codec, tokens, columns)[0]
        if prepared is not None and activations.order_of(packed.codec, _units(shape, choice)) != default:
            choice = launch_config.default(shape, launch_config.processors(x.device))
    elif choice is None:  # groups keep the device busy, so that there is less to split
        choice = launch_config.default(shape, -(-launch_config.processors(x.device) // groups))
    dot = shape.tokens > launch_config.VECTOR_TOKENS
    units = _units(shape, choice)
    is_stream = packed.codec.startswith("stream")
    order = activations.order_of(packed.codec, units)
    with _on(x.device):
        if prepared is None:
            prepared = _prepare(x.flatten(0, 1), signs, order, scaled=not dot)
        else:
            words = _buffer_words(order, not dot, tokens, columns)
            check_prepared(f"{packed.codec} product", prepared, words, x.device)
        quads, x_scale = _parts(prepared, order, groups * tokens, columns)
        # A block is what the kernel's loop takes at a time; of a stream it is UNITS * CHAIN pairs.
        blocks = triton.cdiv(columns, 2 * units * stream.CHAIN.value) if is_stream else order.blocks(columns)
        span = triton.cdiv(blocks, min(choice.splits, blocks))
        splits = triton.cdiv(blocks, span)
        out_dtype = x.dtype if splits == 1 else torch.float32
        out = torch.empty(splits, groups, tokens, weight.rows, dtype=out_dtype, device=x.device)
        constants = {**packed.constants, "T": shape.tokens, "R": choice.rows, "UNITS": units}
        constants |= {"DOT": dot, "BF16": x.dtype == torch.bfloat16, "PTX": _ptx(x.device)}
        constants["GROUPED"] = experts is not None
        kernel, arguments = _kernel(packed, constants)
        kernel[(triton.cdiv(weight.rows, choice.rows), splits, groups)](
            *(quads.view(torch.int32) if is_stream else quads, x_scale),
            *arguments,
            x if experts is None else experts,
            out,
            tokens,
            weight.rows,
            *((columns, len(weight.weight)) if is_stream else (columns // shape.lane_inputs,)),
            span,
            **constants,
            num_warps=choice.warps,
            **OPTIONS,
        )
        return out[0] if splits == 1 else _sum(out, x.dtype)


def _units(shape: launch_config.Shape, choice: launch_config.Config) -> int:
    """Units of inputs that a program takes at a time."""
    return 32 if shape.tokens > launch_config.VECTOR_TOKENS else 32 * choice.warps


def _kernel(packed: Form, constants: dict[str, Any]) -> tuple[Any, tuple[Tensor, ...]]:
    """The kernel of a product and its packed tensors; completes the constants."""
    method = packed.codec.split()[0]
    if method == "stream":
        constants["CHANNELS"] = stream.channels(packed.constants) if constants["DOT"] else constants["R"]
        return stream.matmul_kernel, packed.packed[:2]
    return (pcdvq if method == "pcdvq" else ccq).matmul_kernel, packed.packed


def _default_order(codec: str, tokens: int, columns: int) -> tuple[activations.Order, bool]:
    """How products read their activations unless their config was measured or given, and whether units are scaled."""
    dot = tokens > launch_config.VECTOR_TOKENS
    # Neither the number of tokens, up to that bound, nor that of rows makes a difference to the warps.
    warps = launch_config.unit_warps(launch_config.Shape(codec, 1, 1, columns))
    return activations.order_of(codec, 32 if dot else 32 * warps), not dot


def _buffer_words(order: activations.Order, scaled: bool, tokens: int, columns: int) -> int:
    """Int32 words of what is prepared: two for each of `order.words`, and one per scale."""
    scales = tokens * order.blocks(columns) * order.units if scaled else 0
    return 2 * tokens * order.words(columns) + scales


def _parts(prepared: Tensor, order: activations.Order, tokens: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of a buffer, the quads and the scales that follow them."""
    words = 2 * tokens * order.words(columns)
    return prepared[:words].view(torch.int64), prepared[words:].view(torch.float32)


def _prepare(x: Tensor, signs: Tensor | None, order: activations.Order, scaled: bool) -> Tensor:
    tokens, columns = x.shape
    blocks = order.blocks(columns)
    prepared = torch.empty(_buffer_words(order, scaled, tokens, columns), dtype=torch.int32, device=x.device)
    quads, x_scale = _parts(prepared, order, tokens, columns)
    block = 1 if signs is None else len(signs)
    tile = max(activations.TILE, block)
    activations.prepare_kernel[(tokens, triton.cdiv(blocks * order.units * order.unit, tile))](
        x,
        x_scale if signs is None else signs,
        quads.view(torch.float16 if scaled else x.dtype),
        x_scale,
        columns,
        blocks,
        BLOCK=block,
        UNIT=order.unit,
        SLOTS=order.slots,
        PLACES=order.places,
        QUADS=order.quads,
        UNITS=order.units,
        SCALE=scaled,
        TILE=tile,
        **OPTIONS,
    )
    return prepared


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    tile = 512
    tiles.sum_kernel[(triton.cdiv(out.numel(), tile),)](parts, out, out.numel(), len(parts), TILE=tile, **OPTIONS)
    return out


def _rows(weight: Weight, dtype: torch.dtype) -> Any:
    """`decode(start, stop)` for the rows of a weight."""
    packed = form(weight)
    codec = packed.codec.split()[0]

    def decode(start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, weight.columns, dtype=dtype, device=weight.weight.device)
        grid = triton.cdiv(len(out), TILE_ROWS), triton.cdiv(weight.columns, TILE_COLUMNS)
        with _on(out.device):
            tiles.dequantize_kernel[grid](
                out,
                *packed.packed,
                start,
                stop,
                weight.columns,
                len(weight.weight),
                CODEC=codec,
                ROWS=TILE_ROWS,
                COLUMNS=TILE_COLUMNS,
                PTX=_ptx(out.device),
                **packed.constants,
                **OPTIONS,
            )
        return out

    return decode


def reads_prepared(codec: str, tokens: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether products of this size have kernels, which begin with `prepare`. They read several words of a row at once."""
    whole = columns % (32 if codec.startswith("pcdvq") else 2) == 0
    # Triton's interpreter multiplies matrices of bfloat16 as if their bits were integers.
    most = launch_config.VECTOR_TOKENS if INTERPRETED and dtype == torch.bfloat16 else launch_config.DOT_TOKENS
    return whole and dtype in (torch.float16, torch.bfloat16) and 0 < tokens <= most


def _has_kernel(weight: Weight, tokens: int, dtype: torch.dtype) -> bool:
    aligned = weight.weight.data_ptr() % 8 == 0
    return aligned and reads_prepared(codec_of(weight), tokens, weight.columns, dtype)


def _aligned(table: Tensor) -> Tensor:
    return table if table.data_ptr() % 8 == 0 else table.clone()


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Kernels take no None; what a format lacks they do not read."""
    return stand_in if tensor is None else tensor


def _ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, whichever the tensors are on."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
