"""CCQ: convolutional code quantization (arXiv 2507.07145), in its three published layouts.

A code word holds several small integers as overlapping windows of `L` bits: adjacent windows share bits, so a word is
shorter than the sum of its windows. Decoding is shift, mask, subtract, multiply; there is no table. Inputs form
groups of 64 (`G = K/64` of them), each with an integer group scale that is multiplied by the output channel's float
super scale.

Packed tensors of a weight `[N, K]`, K a multiple of 64: output channels are rows, codes run along the last dimension.
(The published ERNIE-4.5 files are K-major, `[words, N]`, the transpose of ours.)

    layout   weight (suffix "")   "scale"       "local_scale"           "code_scale", "code_zero"
    2.75     uint8 [N, 22 G]      float32 [N]   -                       -
    2.5      uint8 [N, 20 G]      float32 [N]   -                       -
    2.0625   uint8 [N, 16 G]      float32 [N]   uint8 [N, ceil(G/2)]    float32 [N] each

Weight i = 0..63 of a group is a window of one of the group's words. A word of 2.5 has 16 bits and
takes two bytes, the low one first.

    layout   word            window                            value         integer group scale
    2.75     b = word i//3   (b >> (4,2,0)[i%3]) & 15          window - 8    word 21 & 15
    2.5      u = word i//7   (u >> (13,11,9,6,4,2,0)[i%7]) & 7 window - 4    word 9 & 8191
    2.0625   b = word i//4   (c >> (9,6,3,0)[i%4]) & 63        window - 32   byte g//2 of local_scale: high four bits
             c = floor(b * code_scale[n] + code_zero[n] + 0.5)               for even group g, low four for odd

In 2.75 and 2.5, weight 63 is alone in the top bits of the last word, and the group scale is in its low bits. In
2.0625 the stored byte maps linearly to a code word of 15 bits ("code cluster"), computed in float32.

Decoding, in float32: the weight is `(integer group scale * scale[n]) * value`.

Encoding minimizes the squared error. The best code word for a given scale is found exactly, by a Viterbi search over
the shared bits or, for 2.0625, by trying all 256 bytes; the group scale is the best of a few integers near
an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from hf_pcdvq_kernels.formats.base import bytes_from_words
from hf_pcdvq_kernels.formats.ccq import CCQ_LAYOUTS, GROUP, CcqLayout, CcqWeight, ccq_layout
from hf_pcdvq_kernels.reference.ccq import cluster_words, windows
from torch import Tensor
from torch.nn.functional import pad

from .base import Codec, Packed, UnitEncoder

# The code cluster that we write, found by `tools/search_code_cluster.py` for normal weights. As multiples of 1/16
# they make `byte * code_scale + code_zero + 0.5` exact in float32: fused and separate arithmetic agree.
CODE_SCALE = 120.9375
CODE_ZERO = 802.4375

# The group scale that is best on average for normal weights with unit variance.
_UNIT_SCALE = {"2.75": 0.27, "2.5": 0.52, "2.0625": 0.068}
# The group scales to try, as multiples of that one times the group's root mean square; trying more gains 0.1 %.
_MULTIPLES = (0.8, 0.87, 0.94, 1.0, 1.07, 1.15, 1.25, 1.4)
# The largest estimate in a row is mapped to the largest integer scale divided by this. Smaller values clip the groups
# that matter most, larger ones make the integers coarse; between 1.1 and 1.4 the error changes by 0.2 %.
_HEADROOM = 1.25

# Elements in the largest temporary. On a CPU it stays below 2^15, above which PyTorch splits an operation across
# threads: the temporary fits a core's cache, and synchronizing threads would take longer than the computation.
_ELEMENTS = {"cpu": (1 << 15) - 1}
_ELEMENTS_ACCELERATOR = 1 << 24


@dataclass(frozen=True)
class ConvolutionalCodec(Codec):
    """CCQ at 2.75, 2.5 or 2.0625 bits.

    Attributes:
        layout: `"2.75"`, `"2.5"` or `"2.0625"`.
    """

    layout: str

    family = CcqWeight
    method = "ccq"

    def __post_init__(self) -> None:
        ccq_layout(self.layout)

    @classmethod
    def settings(cls) -> dict[str, dict[str, Any]]:
        rotated = {f"ccq-{layout}": {"layout": layout} for layout in CCQ_LAYOUTS}
        published = {f"ccq-{layout}-published": {"layout": layout, "hadamard": False} for layout in CCQ_LAYOUTS}
        return {**rotated, **published}

    @classmethod
    def of(
        cls, max_block: int, seed: int, layout: str, bits: float | None = None, window_bits: int | None = None
    ) -> Self:
        for name, value, own in (("bits", bits, ccq_layout(layout).bits), ("window_bits", window_bits, None)):
            if value not in (None, own):
                raise ValueError(f"{name} {value!r} needs layout 'stream', the layout is {layout!r}")
        return cls(max_block, seed, layout)

    @property
    def format(self) -> str:
        return f"ccq-{self.layout}"

    def parameters(self) -> dict[str, Any]:
        return {"layout": self.layout}

    @property
    def bits(self) -> float:
        return CCQ_LAYOUTS[self.layout].bits

    def encode_rotated(self, weight: Tensor) -> Packed:
        layout = CCQ_LAYOUTS[self.layout]
        groups = weight.reshape(weight.shape[0], -1, GROUP)
        scale, integer_scale = choose_scales(groups, layout)
        words = best_words(groups, integer_scale * scale[:, None], layout)
        return pack(words, integer_scale, scale, layout)

    def unit_encoder(self, weight: Tensor) -> ConvolutionalEncoder:
        return ConvolutionalEncoder(CCQ_LAYOUTS[self.layout], weight)


class ConvolutionalEncoder(UnitEncoder):
    """Encodes chains of windows at fixed group scales. A code is the chain's part of its word."""

    def __init__(self, layout: CcqLayout, weight: Tensor):
        self.layout, self.rows = layout, len(weight)
        groups = weight.reshape(self.rows, -1, GROUP)
        self.scale, self.integer_scale = choose_scales(groups, layout)
        self.chains = chains(layout)
        self.units = [
            slice(start + chain.inputs.start, start + chain.inputs.stop)
            for start in range(0, weight.shape[1], GROUP)
            for chain in self.chains
        ]
        self._table = search_table(layout, weight.device)

    def encode(self, unit: int, target: Tensor) -> tuple[Tensor, Tensor]:
        group, number = divmod(unit, len(self.chains))
        chain = self.chains[number]
        scale = self.integer_scale[:, group].float() * self.scale
        columns = (target / torch.where(scale > 0, scale, 1.0)[:, None]).T.contiguous()
        codes = best_code(columns, chain.shifts, self.layout, self._table)
        if self.layout.clustered:
            values = self._table[: len(chain.shifts), codes.long()].T
        else:
            shifts = torch.tensor(chain.shifts, device=codes.device, dtype=torch.int32)
            values = (codes[:, None] >> shifts & (2 * self.layout.offset - 1)) - self.layout.offset
        return codes, scale[:, None] * values

    def rescale(self, factor: Tensor) -> None:
        self.scale = self.scale * factor

    def pack(self, codes: Tensor) -> Packed:
        rows, groups = self.integer_scale.shape
        words = torch.zeros(rows, groups, self.layout.words, dtype=torch.int32, device=codes.device)
        codes = codes.reshape(rows, groups, -1)
        for number, chain in enumerate(self.chains):
            words[..., chain.word] |= codes[..., number]
        return pack(words, self.integer_scale, self.scale, self.layout)


class Chain(NamedTuple):
    """A run of overlapping windows: the smallest unit that shares no bits with others and is encoded independently.

    A word of 2.5 consists of two chains, of three and of four windows; the words of 2.75 and 2.0625 are one each.

    Attributes:
        word: index of the word that holds the windows.
        inputs: the weights, of the group's 64, that they hold.
        shifts: positions of the windows in the word, from high to low.
    """

    word: int
    inputs: slice
    shifts: tuple[int, ...]


def chains(layout: CcqLayout) -> list[Chain]:
    """The chains of a group, in weight order."""
    runs: list[tuple[int, ...]] = []
    for shift in layout.shifts:
        if runs and runs[-1][-1] - shift < layout.window_bits:
            runs[-1] += (shift,)
        else:
            runs.append((shift,))
    found: list[Chain] = []
    start = 0
    for word in range(layout.words):
        for run in runs:
            shifts = run[: GROUP - start]  # the last word ends early: it holds only weight 63
            if shifts:
                found.append(Chain(word, slice(start, start + len(shifts)), shifts))
                start += len(shifts)
    return found


def choose_scales(groups: Tensor, layout: CcqLayout) -> tuple[Tensor, Tensor]:
    """Choose the super scale of every channel, and for every group the integer scale with the least squared error.

    Args:
        groups: float32 `[N, G, 64]`.

    Returns:
        Super scales float32 `[N]` and integer group scales int32 `[N, G]`. A group scale is 0 if no scale is better
        than decoding to zeros, as in a group of zeros; a row of zeros has super scale 0.
    """
    # In float64, where the squares of the smallest and largest float32 neither underflow nor overflow.
    rms = torch.linalg.vector_norm(groups, dim=-1, dtype=torch.float64) / GROUP**0.5
    estimate = rms * _UNIT_SCALE[layout.name]
    scale = (estimate.amax(1) * (_HEADROOM / layout.max_scale)).float()
    divisor = torch.where(scale > 0, scale, 1)[:, None].expand(rms.shape).flatten()
    estimate = (estimate.flatten() / divisor).float()

    integer_scale = torch.zeros_like(estimate)
    table = search_table(layout, groups.device)
    for part, columns in _columns(groups, layout):
        integer_scale[part] = _best_integers(columns / divisor[part], estimate[part], layout, table)
    return scale, integer_scale.to(torch.int32).view(rms.shape)


def _best_integers(columns: Tensor, estimate: Tensor, layout: CcqLayout, table: Tensor) -> Tensor:
    """Best integer scale of groups `[64, n]`, given in units of the super scale, near the `estimate` `[n]`."""
    best = torch.zeros_like(estimate)
    least = columns.square().sum(0)
    for multiple in _MULTIPLES:
        candidate = (estimate * multiple).round().clamp(1, layout.max_scale)
        error = torch.zeros_like(least)
        for chain in chains(layout):
            error += chain_error(columns[chain.inputs] / candidate, chain.shifts, layout, table)
        error *= candidate.square()
        better = error < least
        best = torch.where(better, candidate, best)
        least = torch.where(better, error, least)
    return best


def best_words(groups: Tensor, group_scale: Tensor, layout: CcqLayout) -> Tensor:
    """The code words with the least squared error at given scales.

    Args:
        groups: float32 `[N, G, 64]`.
        group_scale: float32 `[N, G]`, integer scale times super scale. If it is 0, the words decode to 0 in any case.

    Returns:
        int32 `[N, G, words]`: bytes of the code cluster for 2.0625; otherwise the last word's scale bits are 0.
    """
    divisor = torch.where(group_scale > 0, group_scale, 1).flatten()
    words = torch.zeros(layout.words, divisor.numel(), dtype=torch.int32, device=groups.device)
    table = search_table(layout, groups.device)
    for part, columns in _columns(groups, layout):
        columns = columns / divisor[part]
        for chain in chains(layout):
            words[chain.word, part] |= best_code(columns[chain.inputs], chain.shifts, layout, table)
    return words.T.reshape(*group_scale.shape, layout.words)


def _columns(groups: Tensor, layout: CcqLayout) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of groups as columns: contiguous `[64, n]`, so that every operation is vectorized over many groups."""
    flat = groups.reshape(-1, GROUP)
    alternatives = 256 if layout.clustered else 1 << layout.window_bits
    size = _ELEMENTS.get(groups.device.type, _ELEMENTS_ACCELERATOR) // alternatives
    for start in range(0, len(flat), size):
        part = slice(start, min(start + size, len(flat)))
        yield part, flat[part].T.contiguous()


def search_table(layout: CcqLayout, device: torch.device) -> Tensor:
    """The candidate values for `chain_error` and `best_code`.

    Returns:
        The value of every window, float32 `[2^L, 1]`; for 2.0625 see `cluster_table`.
    """
    if layout.clustered:
        return cluster_table(CODE_SCALE, CODE_ZERO).to(device)
    return torch.arange(-layout.offset, layout.offset, device=device, dtype=torch.float32)[:, None]


def cluster_table(code_scale: float, code_zero: float) -> Tensor:
    """The values `v` of the bytes of a code cluster, and `-|v|^2 / 2`: float32 `[5, 256]`, on the CPU."""
    slope, offset = torch.tensor([code_scale, code_zero], device="cpu", dtype=torch.float32)
    words = cluster_words(torch.arange(256, device="cpu")[:, None], slope, offset)
    values = windows(words, CCQ_LAYOUTS["2.0625"]).float()
    return torch.cat([values, values.square().sum(1, keepdim=True) / -2], 1).T.contiguous()


def chain_error(values: Tensor, shifts: tuple[int, ...], layout: CcqLayout, table: Tensor) -> Tensor:
    """Squared error of the best code.

    Args:
        values: float32 `[windows, n]`, weights of `n` groups divided by their group scale.
        shifts: shifts of the chain.
        table: from `search_table`.

    Returns:
        float32 `[n]`.
    """
    if layout.clustered:
        return values.square().sum(0) - 2 * _cluster_scores(values, table).amax(1)
    return _least_errors(values, shifts, layout, table)[-1].amin(0)


def best_code(values: Tensor, shifts: tuple[int, ...], layout: CcqLayout, table: Tensor) -> Tensor:
    """The code with the least squared error; arguments as in `chain_error`.

    Returns:
        int32 `[n]`: the chain's windows at their positions in the word, or the byte for 2.0625.
    """
    if layout.clustered:
        return _cluster_scores(values, table).argmax(1).to(torch.int32)
    errors = _least_errors(values, shifts, layout, table)
    window = errors[-1].argmin(0)
    code = window << shifts[-1]
    for i in reversed(range(len(shifts) - 1)):
        shared = layout.window_bits - (shifts[i] - shifts[i + 1])
        low = window >> (layout.window_bits - shared)
        errors_of_high = errors[i].view(-1, 1 << shared, len(low))
        high = errors_of_high.gather(1, low.expand(len(errors_of_high), 1, -1)).argmin(0)[0]
        window = high << shared | low
        code |= window << shifts[i]
    return code.to(torch.int32)


def _cluster_scores(values: Tensor, table: Tensor) -> Tensor:
    """`<x, v> - |v|^2 / 2`, largest for the nearest `v`, for vectors `x` and all bytes: float32 `[n, 256]`."""
    return pad(values, (0, 0, 0, 1), value=1.0).T @ table


def _least_errors(values: Tensor, shifts: tuple[int, ...], layout: CcqLayout, table: Tensor) -> list[Tensor]:
    """Forward pass of the Viterbi search.

    Returns:
        For every window of the chain, float32 `[2^L, n]`: the least squared error over the weights up to this one,
        for each value of this window.
    """
    errors: list[Tensor] = []
    for i, shift in enumerate(shifts):
        error = (values[i] - table).square_()
        if errors:
            shared = layout.window_bits - (shifts[i - 1] - shift)
            # The lowest bits of the previous window are the highest bits of this one; its other bits are free.
            before = errors[-1].view(-1, 1 << shared, error.shape[1]).amin(0)
            error.view(1 << shared, -1, error.shape[1]).add_(before[:, None])
        errors.append(error)
    return errors


def pack(words: Tensor, integer_scale: Tensor, scale: Tensor, layout: CcqLayout) -> Packed:
    """Pack code words and scales into the tensors of the format.

    Args:
        words: int32 `[N, G, words]`, as `best_words` returns them.
        integer_scale: int32 `[N, G]`.
        scale: float32 `[N]`, super scales.
    """
    packed = {"scale": scale}
    if layout.clustered:
        even, odd = pad(integer_scale, (0, integer_scale.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(2)
        packed["local_scale"] = (even << 4 | odd).to(torch.uint8)
        packed["code_scale"] = torch.full_like(scale, CODE_SCALE)
        packed["code_zero"] = torch.full_like(scale, CODE_ZERO)
    else:
        words = torch.cat([words[..., :-1], words[..., -1:] | integer_scale[..., None]], 2)
    words = words.flatten(1)
    packed[""] = bytes_from_words(words) if layout.word_bytes == 2 else words.to(torch.uint8)
    return packed
