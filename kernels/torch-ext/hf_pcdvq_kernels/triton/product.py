"""Products with kernels: prepare the activations, launch the kernel with its config, sum the split-k parts."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from .._checks import check_prepared
from ..formats import PackedWeight
from . import activations, launch_config, tiles, tuned
from .activations import Order
from .device import OPTIONS, current, has_pdl, has_ptx, pdl_option
from .launch_config import LaunchConfig, Shape, kernels_of
from .launcher import Address, Launcher, launcher


def reads_prepared(format: str, tokens: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether products of this size run as kernels, which read prepared activations."""
    whole = columns % kernels_of(format).product_multiple == 0
    return whole and dtype in (torch.float16, torch.bfloat16) and 0 < tokens <= launch_config.DOT_TOKENS


def has_kernel(weight: PackedWeight, tokens: int, dtype: torch.dtype) -> bool:
    """Whether a product with this weight runs as a kernel."""
    aligned = weight.weight.data_ptr() % 8 == 0
    return aligned and reads_prepared(weight.name, tokens, weight.columns, dtype)


def prepare(x: Tensor, signs: Tensor | None, format: str) -> Tensor:
    """Prepare `x` `[..., K]` for products with weights in a format; returns one int32 buffer."""
    columns = x.shape[-1]
    order = _default_order(format, x.numel() // columns, columns)
    with current(x.device):
        return _prepare(x.contiguous(), signs, order)


def prepared_words(format: str, tokens: int, columns: int) -> int:
    """The length of the buffer that `prepare` returns."""
    return _buffer_words(_default_order(format, tokens, columns), tokens, columns)


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
    groups, tokens, _ = x.shape
    grouped = groups if experts is not None else None
    launched = Product(weight, tokens, x.dtype, x.device, config, grouped, stack, prepared is not None)
    if prepared is not None:
        check_prepared(f"{weight.name} product", prepared, launched.words, x.device)
    shape = (groups, tokens, weight.rows) if shape_of_result is None else shape_of_result
    return launched(x, tuple(kernels_of(weight.name).operands(weight).values()), signs, prepared, experts, shape)


class Product:
    """How products of one size with weights of one kind are launched: what does not depend on the numbers in them.

    Args:
        weight: one of the weights.
        tokens: per group.
        dtype, device: of the activations.
        config: the launch config; None takes the tuned or the default one.
        groups: of a product with a stack of weights; None for one weight.
        stack: the number of weights in the stack.
        prepared: whether activations come prepared.

    Attributes:
        words: length of a buffer of prepared activations.
    """

    def __init__(
        self,
        weight: PackedWeight,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        config: LaunchConfig | None = None,
        groups: int | None = None,
        stack: int = 1,
        prepared: bool = False,
    ):
        kernels, rows, columns = kernels_of(weight.name), weight.rows, weight.columns
        shape = Shape(weight.name, launch_config.tokens_per_program(tokens), rows, columns)
        if config is None:
            config = _config(shape, device, tokens, groups, prepared)
        units = shape.units(config.num_warps)
        self._order = kernels.order(weight.name, units, shape.dot)
        self._tokens, self._columns = tokens * (groups or 1), columns
        self._dtype, self._device, self._activation_dtype = dtype, device, kernels.activation_dtype
        self.words = _buffer_words(self._order, self._tokens, columns)
        blocks = triton.cdiv(columns, shape.block_inputs(config.num_warps))
        span = triton.cdiv(blocks, min(config.split_k, blocks))
        self._splits = triton.cdiv(blocks, span)
        pdl = has_pdl(device)
        self._multiply = launcher(
            kernels.matmul_kernel,
            (triton.cdiv(rows, config.block_n), self._splits, groups or 1),
            device,
            {"tokens": tokens, "rows": rows, **kernels.matmul_sizes(weight), "stack": stack, "span": span},
            {
                **kernels.matmul_constants(weight, config.block_n, shape.dot),
                "T": shape.tokens,
                "BLOCK_N": config.block_n,
                "UNITS": units,
                "DOT": shape.dot,
                "PTX": has_ptx(device),
                "PDL": pdl,
                "GROUPED": groups is not None,
            },
            {"num_warps": config.num_warps, **pdl_option(pdl), **OPTIONS},
        )
        self._sum = None if self._splits == 1 else _summation(self._tokens * rows, self._splits, device)

    def __call__(
        self,
        x: Tensor,
        operands: tuple[Tensor | Address, ...],
        signs: Tensor | None,
        prepared: Tensor | None,
        experts: Tensor | None,
        shape: tuple[int, ...],
    ) -> Tensor:
        """The product, in `shape`.

        Args:
            x: contiguous; not read if it is given `prepared`.
            operands: of the weight, in the order of the kernel's arguments.
        """
        with current(self._device):
            if prepared is None:
                prepared = _prepare(x, signs, self._order)
            quads, x_scale = _parts(prepared, self._order, self._tokens, self._columns)
            # Allocated in the shape that is returned: a view of it could not be changed in place under autograd.
            out = torch.empty(shape, dtype=self._dtype, device=self._device)
            parts = out
            if self._sum is not None:
                parts = torch.empty(self._splits, *shape, dtype=torch.float32, device=self._device)
            chosen = quads if experts is None else experts
            self._multiply(quads.view(self._activation_dtype), x_scale, *operands, chosen, parts)
            if self._sum is not None:
                self._sum(parts, out)
        return out


def _config(shape: Shape, device: torch.device, tokens: int, groups: int | None, prepared: bool) -> LaunchConfig:
    """The launch config of a product; `groups` is the number of token groups of a grouped product, else None."""
    processors = launch_config.processors(device)
    if groups is not None:  # groups keep the device busy, so less splitting is needed
        return launch_config.default(shape, -(-processors // groups))
    config = tuned.choose(shape, device)
    # Prepared activations are in the order of the default config; another number of warps may need a different order.
    default = _default_order(shape.format, tokens, shape.columns)
    if prepared and kernels_of(shape.format).order(shape.format, shape.units(config.num_warps), shape.dot) != default:
        config = launch_config.default(shape, processors)
    return config


def _default_order(format: str, tokens: int, columns: int) -> Order:
    """How products read their activations unless their config was measured or given."""
    # Of the tokens only the side of this bound counts, and the rows make no difference. A number of tokens that
    # `torch.compile` traces must not be rounded: that would make it a constant.
    count = 1 if tokens <= launch_config.VECTOR_TOKENS else launch_config.DOT_TOKENS
    shape = Shape(format, count, 1, columns)
    return kernels_of(format).order(format, shape.units(launch_config.unit_warps(shape)), shape.dot)


def _buffer_words(order: Order, tokens: int, columns: int) -> int:
    """Size of the buffer in int32 words: two for each of `order.words`, and one per scale."""
    return 2 * order.words(tokens, columns) + order.scales(tokens, columns)


def _parts(prepared: Tensor, order: Order, tokens: int, columns: int) -> tuple[Tensor, Tensor]:
    """The two parts of a buffer: the quads, and the scales that follow them."""
    words = 2 * order.words(tokens, columns)
    return prepared[:words].view(torch.int64), prepared[words:].view(torch.float32)


def _prepare(x: Tensor, signs: Tensor | None, order: Order) -> Tensor:
    columns = x.shape[-1]
    tokens = x.numel() // columns
    prepared = torch.empty(_buffer_words(order, tokens, columns), dtype=torch.int32, device=x.device)
    quads, x_scale = _parts(prepared, order, tokens, columns)
    block = 1 if signs is None else len(signs)
    launched = _preparation(order, tokens, columns, block, has_pdl(x.device), x.device)
    launched(x, x_scale if signs is None else signs, quads.view(torch.float16), x_scale)
    return prepared


@lru_cache(4096)  # asked for by every layer and input
def _preparation(order: Order, tokens: int, columns: int, block: int, pdl: bool, device: torch.device) -> Launcher:
    blocks = order.blocks(columns)
    tile = max(activations.TILE, block)
    return launcher(
        activations.prepare_kernel,
        (order.stored(tokens), triton.cdiv(blocks * order.units * order.unit, tile)),
        device,
        {"tokens": tokens, "columns": columns, "blocks": blocks},
        {
            "BLOCK": block,
            "UNIT": order.unit,
            "SLOTS": order.slots,
            "PLACES": order.places,
            "QUADS": order.quads,
            "UNITS": order.units,
            "TOGETHER": order.together,
            "PDL": pdl,
            "TILE": tile,
            "CHUNK": activations.CHUNK,
        },
        OPTIONS,
    )


def _summation(numbers: int, splits: int, device: torch.device) -> Launcher:
    """Sums the parts of a split product."""
    tile, sizes = 512, {"numbers": numbers, "splits": splits}
    return launcher(tiles.sum_kernel, (triton.cdiv(numbers, tile),), device, sizes, {"TILE": tile}, OPTIONS)
