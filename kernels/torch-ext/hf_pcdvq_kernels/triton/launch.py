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

from ..reference.sliced import sliced_dequantize, sliced_matmul
from ..weights import CcqWeight, PcdvqWeight, Weight
from . import activations, ccq, config, pcdvq, stream, tiles, tuned

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
    unit: int  # inputs per unit
    slots: int  # weights per code word


def form(weight: Weight) -> Form:
    """A weight as the kernels take it."""
    if isinstance(weight, PcdvqWeight):
        patterns = _aligned(weight.patterns)
        packed = (weight.weight, _or(weight.magnitude, weight.weight), weight.scale, patterns, weight.levels)
        bits = "2.0" if weight.magnitude is None else "2.25"
        return Form(f"pcdvq {bits}", packed, {"PATTERNS": len(patterns)}, 32, 1)
    if isinstance(weight, CcqWeight):
        scale = weight.scale
        rest = _or(weight.local_scale, weight.weight), _or(weight.code_scale, scale), _or(weight.code_zero, scale)
        layout = weight.layout
        constants = ccq.constants(layout)
        return Form(f"ccq {layout.name}", (weight.weight, scale, *rest), constants, 64, len(layout.shifts))
    packed = (weight.weight, *[weight.scale] * 4)
    return Form(f"stream {weight.layout.bits}", packed, stream.constants(weight.layout), 2 * stream.SPAN.value, 1)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]`, bit for bit that of the reference."""
    decode = _rows(weight, dtype)
    return sliced_dequantize(
        weight.rows, weight.columns, decode, dtype, weight.weight.device, weight.row_multiple, SLICE
    )


def matmul(x: Tensor, weight: Weight, transposed: bool, signs: Tensor | None) -> Tensor:
    """`hadamard(x) @ W.T`, or `hadamard(x @ W, inverse=True)` where `transposed`; without `signs` nothing is rotated."""
    flat = x.reshape(-1, x.shape[-1])
    if not transposed and _has_kernel(weight, len(flat), x.dtype):
        return product(flat.contiguous()[None], weight, signs, None, None).reshape(*x.shape[:-1], weight.rows)
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


def product(
    x: Tensor, weight: Weight, signs: Tensor | None, choice: config.Config | None, experts: Tensor | None
) -> Tensor:
    """`hadamard(x) @ W.T` for 16-bit `x` `[G, T, K]` of up to `DOT_TOKENS` rows; G is 1 without `experts`.

    `choice` overrides how it is cut into programs. `experts` is described in `grouped_matmul`.
    """
    packed = form(weight)
    groups, tokens, columns = x.shape
    shape = config.Shape(packed.codec, config.tokens_per_program(tokens), weight.rows, columns)
    if choice is None and experts is None:
        choice = tuned.choose(shape, x.device)
    elif choice is None:  # groups keep the device busy, so that there is less to split
        choice = config.default(shape, -(-config.processors(x.device) // groups))
    dot = shape.tokens > config.VECTOR_TOKENS
    units = 32 if dot else 32 * choice.warps
    is_stream = packed.codec.startswith("stream")
    order = activations.Order(packed.unit, packed.slots, 1 if is_stream else units)
    with _on(x.device):
        quads, x_scale = _prepare(x.flatten(0, 1), signs, order, scale=not dot)
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
            *((columns, len(weight.weight)) if is_stream else (columns // packed.unit,)),
            span,
            **constants,
            num_warps=choice.warps,
            **OPTIONS,
        )
        return out[0] if splits == 1 else _sum(out, x.dtype)


def _kernel(packed: Form, constants: dict[str, Any]) -> tuple[Any, tuple[Tensor, ...]]:
    """The kernel of a product and its packed tensors; completes the constants."""
    method = packed.codec.split()[0]
    if method == "stream":
        constants["CHANNELS"] = stream.channels(packed.constants) if constants["DOT"] else constants["R"]
        return stream.matmul_kernel, packed.packed[:2]
    return (pcdvq if method == "pcdvq" else ccq).matmul_kernel, packed.packed


def _prepare(x: Tensor, signs: Tensor | None, order: activations.Order, scale: bool) -> tuple[Tensor, Tensor]:
    tokens, columns = x.shape
    blocks = order.blocks(columns)
    quads = torch.empty(tokens, blocks, order.quads, order.units, dtype=torch.int64, device=x.device)
    x_scale = torch.empty(tokens, blocks * order.units if scale else 0, dtype=torch.float32, device=x.device)
    block = 1 if signs is None else len(signs)
    tile = max(activations.TILE, block)
    activations.prepare_kernel[(tokens, triton.cdiv(blocks * order.units * order.unit, tile))](
        x,
        x_scale if signs is None else signs,
        quads.view(torch.float16 if scale else x.dtype),
        x_scale,
        columns,
        blocks,
        BLOCK=block,
        UNIT=order.unit,
        SLOTS=order.slots,
        PLACES=order.places,
        QUADS=order.quads,
        UNITS=order.units,
        SCALE=scale,
        TILE=tile,
        **OPTIONS,
    )
    return quads, x_scale


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


def _has_kernel(weight: Weight, tokens: int, dtype: torch.dtype) -> bool:
    """Whether `product` can do it. Its kernels read several words of a row at once."""
    whole = weight.columns % (32 if isinstance(weight, PcdvqWeight) else 2) == 0
    if not whole or weight.weight.data_ptr() % 8 or dtype not in (torch.float16, torch.bfloat16):
        return False
    # Triton's interpreter multiplies matrices of bfloat16 as if their bits were integers.
    most = config.VECTOR_TOKENS if INTERPRETED and dtype == torch.bfloat16 else config.DOT_TOKENS
    return 0 < tokens <= most


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
