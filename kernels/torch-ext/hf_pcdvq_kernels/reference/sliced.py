"""Weights decoded slice by slice, so that temporaries stay bounded however large a layer is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch


def _slices(rows: int, columns: int, multiple: int, limit: int) -> Iterator[tuple[int, int]]:
    step = max(1, limit // columns // multiple) * multiple
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def sliced_dequantize(
    rows: int,
    columns: int,
    decode: Callable[[int, int], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    multiple: int,
    limit: int,
) -> torch.Tensor:
    """The whole weight `[rows, columns]`, whose rows `decode(start, stop)` returns.

    Decodes at most `limit` weights at a time, but at least `multiple` rows: `start` must be a multiple of `multiple`.
    """
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    for start, stop in _slices(rows, columns, multiple, limit):
        out[start:stop] = decode(start, stop)
    return out


def sliced_matmul(
    x: torch.Tensor,
    rows: int,
    columns: int,
    decode: Callable[[int, int], torch.Tensor],
    transposed: bool,
    multiple: int,
    limit: int,
) -> torch.Tensor:
    """`x @ W.T` (or `x @ W` if `transposed`) for a `W` `[rows, columns]` whose rows `decode(start, stop)` returns.

    `multiple` and `limit` are as in `sliced_dequantize`.
    The transposed product sums over slices in float32, whatever the dtype of `x`.
    """
    flat = x.reshape(-1, x.shape[-1])
    # Allocated in the shape that is returned: a view of it could not be changed in place under autograd.
    if transposed:
        out = x.new_zeros(*x.shape[:-1], columns, dtype=torch.promote_types(x.dtype, torch.float32))
    else:
        out = x.new_empty(*x.shape[:-1], rows)
    flat_out = out.view(-1, out.shape[-1])
    for start, stop in _slices(rows, columns, multiple, limit):
        block = decode(start, stop)
        if transposed:
            flat_out += flat[:, start:stop] @ block
        else:
            torch.mm(flat, block.T, out=flat_out[:, start:stop])
    return out.to(x.dtype)
