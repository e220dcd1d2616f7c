"""Products with packed weights as Numba functions, for benchmarks/bench_cpu.py: could they replace the C++ library?

Several ways of each, with float32 and with int16 activations, of which the fastest counts. They get rotated activations.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from hf_pcdvq_kernels.formats.pcdvq import PcdvqWeight
from hf_pcdvq_kernels.formats.stream import STREAM_MULTIPLIER, STREAM_RING, StreamWeight
from hf_pcdvq_kernels.reference.pcdvq import sign_table
from hf_pcdvq_kernels.reference.stream import values
from numba import njit, prange

LARGEST, BLOCK = 127 * 128, 256  # of int16 activations, as in the library
RING_WORDS = STREAM_RING // 16  # rows of words in a ring of stream-2.0

Product = Callable[[np.ndarray], np.ndarray]


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations float32 `[K]`, K a multiple of 256, as int16 `[K]` and float32 scales `[K/256]`."""
    blocks = x.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1) / np.float32(LARGEST)
    return np.rint(blocks / scale[:, None]).astype(np.int16).ravel(), scale


# ----------------------------------------------------------------------------------------------------- PCDVQ 2.25


def pcdvq_products(weight: PcdvqWeight) -> dict[str, Product]:
    """Ways to multiply with a weight, by name."""
    words, magnitude = weight.words.numpy().view(np.uint16), weight.magnitude.numpy()
    scale, levels = weight.scale.numpy(), weight.levels.numpy()
    patterns, signs = weight.patterns.numpy(), sign_table(torch.device("cpu")).numpy()
    # All directions with their signs, which a cache of the second level holds.
    every = np.arange(1 << 16)
    signed = (patterns[every >> 7] * signs[every & 127]).astype(np.int8)
    common = (words, magnitude, scale, levels)
    return {
        "float32, two tables": lambda x: _pcdvq_two_tables(*common, patterns.astype(np.float32), signs, x),
        "float32, one table": lambda x: _pcdvq_float(*common, signed, x),
        "int16, one table": lambda x: _pcdvq_integer(*common, signed, *quantized(x)),
    }


@njit(parallel=True, fastmath=True)
def _pcdvq_two_tables(words, magnitude, scale, levels, patterns, signs, x):  # pragma: no cover
    rows, vectors = words.shape
    out = np.empty(rows, np.float32)
    for n in prange(rows):
        total = np.float32(0)
        for v in range(vectors):
            word = words[n, v]
            pattern, sign = word >> 7, word & 127
            part = np.float32(0)
            for i in range(8):
                part += patterns[pattern, i] * signs[sign, i] * x[8 * v + i]
            total += part * levels[magnitude[n, v >> 2] >> (2 * (v & 3)) & 3]
        out[n] = total * scale[n]
    return out


@njit(parallel=True, fastmath=True)
def _pcdvq_float(words, magnitude, scale, levels, signed, x):  # pragma: no cover
    rows, vectors = words.shape
    out = np.empty(rows, np.float32)
    for n in prange(rows):
        total = np.float32(0)
        for v in range(vectors):
            word = words[n, v]
            part = np.float32(0)
            for i in range(8):
                part += np.float32(signed[word, i]) * x[8 * v + i]
            total += part * levels[magnitude[n, v >> 2] >> (2 * (v & 3)) & 3]
        out[n] = total * scale[n]
    return out


@njit(parallel=True, fastmath=True)
def _pcdvq_integer(words, magnitude, scale, levels, signed, x, x_scale):  # pragma: no cover
    rows, vectors = words.shape
    out = np.empty(rows, np.float32)
    for n in prange(rows):
        total = np.float32(0)
        for block in range(vectors // 32):
            in_block = np.float32(0)
            for v in range(32 * block, 32 * block + 32):
                word = words[n, v]
                part = np.int32(0)
                for i in range(8):
                    part += np.int32(signed[word, i]) * np.int32(x[8 * v + i])
                in_block += np.float32(part) * levels[magnitude[n, v >> 2] >> (2 * (v & 3)) & 3]
            total += in_block * x_scale[block]
        out[n] = total * scale[n]
    return out


# ----------------------------------------------------------------------------------------------------- stream 2.0


def stream_products(weight: StreamWeight) -> dict[str, Product]:
    """Ways to multiply with a weight of 2.0 bits, whose number of rows is a multiple of 256, by name."""
    words, scale = weight.weight.numpy().view(np.uint32), weight.scale.numpy()
    mask = np.uint32((1 << weight.window_bits) - 1)
    table = values(weight.window_bits, torch.device("cpu")).to(torch.float32).numpy()
    return {
        "float32, table": lambda x: _stream_table(words, scale, mask, table, x),
        "float32, arithmetic": lambda x: _stream_float(words, scale, mask, x),
        "int16, arithmetic": lambda x: _stream_integer(words, scale, mask, *quantized(x)),
    }


@njit(inline="always")
def _row_before(row):  # pragma: no cover
    """The row of words before one in its ring."""
    return row // RING_WORDS * RING_WORDS + (row + RING_WORDS - 1) % RING_WORDS


@njit(inline="always")
def _window(before, word, shift, mask):  # pragma: no cover
    """The window with `shift` bits below it."""
    both = np.uint64(before) << np.uint64(32) | np.uint64(word)
    return np.uint32(both >> shift) & mask


@njit(inline="always")
def _value(window):  # pragma: no cover
    """The sum of the signed bytes of the product, two at a time."""
    product = np.uint32(np.uint32(window * np.uint32(STREAM_MULTIPLIER)) ^ np.uint32(0x80808080))
    pairs = np.uint32((product & np.uint32(0xFF00FF)) + (product >> np.uint32(8) & np.uint32(0xFF00FF)))
    return np.int32((pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))) - np.int32(512)


@njit(parallel=True, fastmath=True)
def _stream_table(words, scale, mask, table, x):  # pragma: no cover
    rows, columns = words.shape
    out = np.empty(16 * rows, np.float32)
    for r in prange(rows):
        word, before = words[r], words[_row_before(r)]
        for channel in range(16):
            shift = np.uint64(30 - 2 * channel)
            total = np.float32(0)
            for k in range(columns):
                total += table[_window(before[k], word[k], shift, mask)] * x[k]
            out[16 * r + channel] = total * scale[16 * r + channel]
    return out


@njit(parallel=True, fastmath=True)
def _stream_float(words, scale, mask, x):  # pragma: no cover
    rows, columns = words.shape
    out = np.empty(16 * rows, np.float32)
    for r in prange(rows):
        word, before = words[r], words[_row_before(r)]
        for channel in range(16):
            shift = np.uint64(30 - 2 * channel)
            total = np.float32(0)
            for k in range(columns):
                total += np.float32(_value(_window(before[k], word[k], shift, mask))) * x[k]
            out[16 * r + channel] = total * scale[16 * r + channel]
    return out


@njit(parallel=True, fastmath=True)
def _stream_integer(words, scale, mask, x, x_scale):  # pragma: no cover
    rows, columns = words.shape
    out = np.empty(16 * rows, np.float32)
    for r in prange(rows):
        word, before = words[r], words[_row_before(r)]
        for channel in range(16):
            shift = np.uint64(30 - 2 * channel)
            total = np.float32(0)
            for block in range(columns // BLOCK):
                part = np.int32(0)
                for k in range(block * BLOCK, block * BLOCK + BLOCK):
                    part += _value(_window(before[k], word[k], shift, mask)) * np.int32(x[k])
                total += np.float32(part) * x_scale[block]
            out[16 * r + channel] = total * scale[16 * r + channel]
    return out


PRODUCTS = {"pcdvq-2.25": pcdvq_products, "stream-2.0": stream_products}


def use_threads(threads: int) -> None:
    """Run in so many threads."""
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    torch.set_num_threads(threads)  # Numba's OpenMP layer sets it to all cores when it starts
