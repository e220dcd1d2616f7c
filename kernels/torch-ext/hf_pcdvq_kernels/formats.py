"""Constants of the packed formats that encoder and decoders share.

The formats are described in words, with their decode formulas, in the codecs that write them:
`hf_pcdvq/codecs/polar.py` and `hf_pcdvq/codecs/convolutional.py`. This file holds only the numbers, here because
the decoders may not import the plugin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

VECTOR = 8  # PCDVQ: consecutive inputs of one output channel that share a direction and a magnitude
SIGN_BITS = 7  # PCDVQ: the eighth sign is the parity of the other seven
MAGNITUDE_BITS = 2  # PCDVQ: four magnitude levels
GROUP = 64  # CCQ: consecutive inputs of one output channel that share a group scale


@dataclass(frozen=True)
class CcqLayout:
    """How one published CCQ layout cuts a code word into overlapping windows.

    Weight `i` of a group of 64 lies in code word `i // len(shifts)`, as the `window_bits` bits above
    `shifts[i % len(shifts)]`; its integer value is that window minus `offset`.
    """

    name: str
    bits: float  # nominal bits per weight
    storage: torch.dtype  # dtype of one stored word, whose bit pattern is what counts
    words: int  # stored words per group of 64 weights
    shifts: tuple[int, ...]
    window_bits: int
    scale_bits: int  # group-scale bits in the low end of the last word; 0: scales lie in a tensor of their own

    @property
    def offset(self) -> int:
        return 1 << (self.window_bits - 1)

    @property
    def clustered(self) -> bool:
        """True where a stored byte is mapped linearly to the code word ("code cluster")."""
        return self.scale_bits == 0

    @property
    def code_bits(self) -> int:
        """Length of a code word: the windows laid over each other."""
        return self.shifts[0] + self.window_bits

    @property
    def max_scale(self) -> int:
        """Largest integer group scale."""
        return 15 if self.clustered else (1 << self.scale_bits) - 1


CCQ_LAYOUTS: dict[str, CcqLayout] = {
    layout.name: layout
    for layout in (
        CcqLayout("2.75", 2.75, torch.uint8, 22, (4, 2, 0), window_bits=4, scale_bits=4),
        CcqLayout("2.5", 2.5, torch.int16, 10, (13, 11, 9, 6, 4, 2, 0), window_bits=3, scale_bits=13),
        CcqLayout("2.0625", 2.0625, torch.uint8, 16, (9, 6, 3, 0), window_bits=6, scale_bits=0),
    )
}
