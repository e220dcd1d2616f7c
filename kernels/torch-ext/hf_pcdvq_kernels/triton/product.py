"""Products with kernels: prepare the activations, launch the kernel with its config, sum the split-k parts."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._checks import check_prepared
from ..formats import PackedWeight
from . import activations, launch_config, tiles, tuned
from .activations import Order
from .device import INTERPRETED, OPTIONS, current, has_pdl, has_ptx, pdl_option
from .launch_config import LaunchConfig, Shape, kernels_of


def reads_prepared(format: str, tokens: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether products of this size run as kernels, which read prepared activations."""
    whole = columns % kernels_of(format).product_multiple == 0
    # Triton's interpreter treats the bits of bfloat16 matrices as integers in tl.dot.
    most = launch_config.VECTOR_TOKENS if INTERPRETED and dtype == torch.bfloat16 else launch_config.DOT_TOKENS
    return whole and dtype in (torch.float16, torch.bfloat16) and 0 < tokens <= most


def has_kernel(weight: PackedWeight, tokens: int, dtype: torch.dtype) -> bool:
    """Whether a product with this weight runs as a kernel."""
    aligned = weight.weight.data_ptr() % 8 == 0
    return aligned and reads_prepared(weight.name, tokens, weight.columns, dtype)


def prepare(x: Tensor, signs: Tensor | None, format: str) -> Tensor:
    """Prepare `x` `[..., K]` for products with weights in a format; returns one int32 buffer."""
    flat = x.reshape(-1, x.shape[-1])
    order, scaled = _default_order(format, *flat.shape)
    with current(x.device):
        return _prepare(flat.contiguous(), signs, order, scaled)


def prepared_words(format: str, tokens: int, columns: int) -> int:
    """The length of the buffer that `prepare` returns."""
    return _buffer_words(*_default_order(format, tokens, columns), tokens, columns)


def product(
    x: Tensor,
    weight: PackedWeight,
    signs: Tensor | None = None,
    config: LaunchConfig | None = None,
    experts: Tensor | None = None,
    stack: int = 1,
    prepared: Tensor | None = None,
    shape_of_result: tuple[int, ...] | None = None,
) -> Tensor:
    """`hadamard(x) @ W.T` for 16-bit `x` `[G, T, K]` of up to `DOT_TOKENS` rows; G is 1 without `experts`.

    Args:
        config: the launch config; None takes the tuned or the default one.
        experts, stack: see `launch.grouped_matmul`.
        prepared: see `launch.matmul`; not combined with `config` or `experts`.
        shape_of_result: the shape to return the result in; `[G, T, N]` if None.
    """
    groups, tokens, columns = x.shape
    kernels = kernels_of(weight.name)
    shape = Shape(weight.name, launch_config.tokens_per_program(tokens), weight.rows, columns)
    if config is None:
        config = _config(shape, x.device, tokens, groups if experts is not None else None, prepared is not None)
    units = shape.units(config.num_warps)
    order = kernels.order(weight.name, units)
    with current(x.device):
        if prepared is None:
            prepared = _prepare(x.flatten(0, 1), signs, order, scaled=not shape.dot)
        else:
            words = _buffer_words(order, not shape.dot, tokens, columns)
            check_prepared(f"{weight.name} product", prepared, words, x.device)
        quads, x_scale = _parts(prepared, order, groups * tokens, columns)
        blocks = triton.cdiv(columns, shape.block_inputs(config.num_warps))
        span = triton.cdiv(blocks, min(config.split_k, blocks))
        splits = triton.cdiv(blocks, span)
        # Allocated in the shape that is returned: a view of it could not be changed in place under autograd.
        result = (groups, tokens, weight.rows) if shape_of_result is None else shape_of_result
        if splits == 1:
            out = torch.empty(result, dtype=x.dtype, device=x.device)
        else:
            out = torch.empty(splits, *result, dtype=torch.float32, device=x.device)
        kernels.matmul_kernel[(triton.cdiv(weight.rows, config.block_n), splits, groups)](
            p_x=quads.view(kernels.activation_dtype),
            p_x_scale=x_scale,
            **kernels.operands(weight),
            p_experts=x if experts is None else experts,
            p_out=out,
            tokens=tokens,
            rows=weight.rows,
            **kernels.matmul_sizes(weight),
            stack=stack,
            span=span,
            **kernels.matmul_constants(weight, config.block_n, shape.dot),
            T=shape.tokens,
            BLOCK_N=config.block_n,
            UNITS=units,
            DOT=shape.dot,
            BF16=x.dtype == torch.bfloat16,
            PTX=has_ptx(x.device),
            PDL=has_pdl(x.device),
            GROUPED=experts is not None,
            num_warps=config.num_warps,
            **pdl_option(has_pdl(x.device)),
            **OPTIONS,
        )
        return out if splits == 1 else _sum(out, x.dtype)


def _config(shape: Shape, device: torch.device, tokens: int, groups: int | None, prepared: bool) -> LaunchConfig:
    """The launch config of a product; `groups` is the number of token groups of a grouped product, else None."""
    processors = launch_config.processors(device)
    if groups is not None:  # groups keep the device busy, so less splitting is needed
        return launch_config.default(shape, -(-processors // groups))
    config = tuned.choose(shape, device)
    # Prepared activations are in the order of the default config; another number of warps may need a different order.
    default, _ = _default_order(shape.format, tokens, shape.columns)
    if prepared and kernels_of(shape.format).order(shape.format, shape.units(config.num_warps)) != default:
        config = launch_config.default(shape, processors)
    return config


def _default_order(format: str, tokens: int, columns: int) -> tuple[Order, bool]:
    """How products read their activations unless their config was measured or given, and whether units are scaled."""
    # Of the tokens only the side of this bound counts, and the rows make no difference. A number of tokens that
    # `torch.compile` traces must not be rounded: that would make it a constant.
    count = 1 if tokens <= launch_config.VECTOR_TOKENS else launch_config.DOT_TOKENS
    shape = Shape(format, count, 1, columns)
    return kernels_of(format).order(format, shape.units(launch_config.unit_warps(shape))), not shape.dot


def _buffer_words(order: Order, scaled: bool, tokens: int, columns: int) -> int:
    """Size of the buffer in int32 words: two for each of `order.words`, and one per scale."""
    scales = tokens * order.blocks(columns) * order.units if scaled else 0
    return 2 * tokens * order.words(columns) + scales


def _parts(prepared: Tensor, order: Order, tokens: int, columns: int) -> tuple[Tensor, Tensor]:
    """The two parts of a buffer: the quads, and the scales that follow them."""
    words = 2 * tokens * order.words(columns)
    return prepared[:words].view(torch.int64), prepared[words:].view(torch.float32)


def _prepare(x: Tensor, signs: Tensor | None, order: Order, scaled: bool) -> Tensor:
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
        PDL=has_pdl(x.device),
        TILE=tile,
        **OPTIONS,
    )
    return prepared


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    tile = 512
    tiles.sum_kernel[(triton.cdiv(out.numel(), tile),)](parts, out, out.numel(), len(parts), TILE=tile, **OPTIONS)
    return out
