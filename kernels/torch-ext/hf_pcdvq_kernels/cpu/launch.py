"""Runs ops on the library of the CPU backend. Arguments are validated by the ops."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .. import _checks as checks
from ..formats import Decode, PackedWeight
from ..reference.products import SLICE
from ..reference.sliced import sliced_matmul
from .library import DTYPE_CODES, FORMAT_CODES, Library, Weight, describe, load

# Up to this many tokens are multiplied straight from the codes; for more, decoding a slice of rows and leaving the product to
# PyTorch is faster. Measured, see docs/cpu.md; with AVX2 PyTorch multiplies 16-bit numbers so slowly that there is no such limit.
MOST_TOKENS = {
    "avx512": {2: 32, 4: 16},
    "avx2": {2: 1 << 30, 4: 16},
    "portable": {2: 16, 4: 16},
}  # by size of an element; float32 is asked for because it is exact, to which activations of 15 bits come only close
# Fewer rows than this at a time, as there would be in layers with many inputs, PyTorch multiplies less efficiently.
SLICE_ROWS = 256


@cache
def library() -> Library:
    """The library, which `backend.use_cpu` has found to be there."""
    found = load()
    if not isinstance(found, Library):
        raise found
    return found


def takes(tokens: int, dtype: torch.dtype) -> bool:
    """Whether so many tokens are multiplied straight from the codes."""
    return tokens <= MOST_TOKENS[library().used][dtype.itemsize]


def enough_memory(ok: int, what: str) -> None:
    """Raise MemoryError if a function of the library returned 0."""
    if not ok:
        raise MemoryError(f"{what}: not enough memory for the prepared activations")


def prepare(x: Tensor, signs: Tensor | None, format: str) -> Tensor:
    """Rotated and quantized activations `[..., K]`, int32 words."""
    x, columns = x.contiguous(), x.shape[-1]
    tokens = x.numel() // columns
    prepared = torch.empty(prepared_words(tokens, columns), dtype=torch.int32, device=x.device)
    ok = library().prepare(
        FORMAT_CODES[format],
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        tokens,
        columns,
        *rotation(signs),
        prepared.data_ptr(),
        torch.get_num_threads(),
    )
    enough_memory(ok, "prepare")
    return prepared


def prepared_words(tokens: int, columns: int) -> int:
    """Number of int32 words of prepared activations `[tokens, columns]`."""
    return library().prepared_words(tokens, columns)


def rotation(signs: Tensor | None) -> tuple[int | None, int]:
    """Address and number of the signs, as the library's functions take them."""
    return (None, 0) if signs is None else (signs.data_ptr(), signs.numel())


def hadamard(x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    """The rotation of a product, see `hf_pcdvq_kernels.hadamard`, which computes in PyTorch on a CPU."""
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    ok = library().hadamard(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.numel() // columns if columns else 0,
        columns,
        *rotation(signs),
        inverse,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    enough_memory(ok, "hadamard")
    return out


def matmul(
    x: Tensor, weight: PackedWeight, transposed: bool, signs: Tensor | None, prepared: Tensor | None = None
) -> Tensor:
    """See `hf_pcdvq_kernels.matmul`."""
    tokens = x.numel() // x.shape[-1]
    if transposed or not takes(tokens, x.dtype):
        return _decoded_matmul(x, weight, transposed, signs)
    if prepared is not None:
        checks.check_prepared("matmul", prepared, prepared_words(tokens, weight.columns), x.device)
    return multiply(x, describe(weight), weight.rows, signs, prepared)


def multiply(x: Tensor, weight: Weight, rows: int, signs: Tensor | None, prepared: Tensor | None) -> Tensor:
    """`x @ W.T` straight from the codes, for `x` `[..., K]`."""
    out = x.new_empty((*x.shape[:-1], rows))
    tokens, dtype, threads = x.numel() // x.shape[-1], DTYPE_CODES[x.dtype], torch.get_num_threads()
    if prepared is not None:
        library().matmul(weight, prepared.data_ptr(), tokens, out.data_ptr(), dtype, threads)
        return out
    x = x.contiguous()
    ok = library().linear(weight, x.data_ptr(), dtype, tokens, *rotation(signs), out.data_ptr(), threads)
    enough_memory(ok, "matmul")
    return out


def _decoded_matmul(x: Tensor, weight: PackedWeight, transposed: bool, signs: Tensor | None) -> Tensor:
    if signs is not None and not transposed:
        x = hadamard(x, signs, False)
    size = weight.rows, weight.columns
    out = sliced_matmul(x, *size, _decode(weight, x.dtype), transposed, max(weight.row_multiple, SLICE_ROWS), SLICE)
    return hadamard(out, signs, True) if signs is not None and transposed else out


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """See `hf_pcdvq_kernels.dequantize`."""
    return _decode(weight, dtype)(0, weight.rows)


def _decode(weight: PackedWeight, dtype: torch.dtype) -> Decode:
    described, decode = describe(weight), library().dequantize

    def rows(start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, weight.columns, dtype=dtype, device=weight.weight.device)
        decode(described, start, stop, out.data_ptr(), DTYPE_CODES[dtype], torch.get_num_threads())
        return out

    return rows


def grouped_matmul(
    x: Tensor, experts: Tensor, first: PackedWeight, stack: dict[str, Tensor | None], signs: Tensor | None
) -> Tensor | None:
    """See `hf_pcdvq_kernels.grouped_matmul`; None if groups have too many tokens.

    Args:
        first: the first weight of the stack.
        stack: all stacked tensors, by argument name; None for those that the format lacks.
    """
    groups, tokens, columns = x.shape
    if not takes(tokens, x.dtype):
        return None
    x = x.contiguous()
    out = x.new_empty(groups, tokens, first.rows)
    ok = library().grouped_linear(
        describe(first, stack),
        experts.data_ptr(),
        groups,
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        tokens,
        *rotation(signs),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    enough_memory(ok, "grouped_matmul")
    return out
