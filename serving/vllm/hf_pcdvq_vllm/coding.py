"""How one module is packed: what is recorded of it, and what decoding it needs. Does not import vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hf_pcdvq_kernels.constants import block_size, codebook_bytes, codebook_digest, signs
from hf_pcdvq_kernels.formats import PackedWeight, family_of
from safetensors.torch import load
from torch import Tensor

# What the name of a format stands for, as docs/formats.md has it, where a record does not say otherwise.
_CODEBOOKS = {"pcdvq-2.0": "pcdvq-a14-v1", "pcdvq-2.25": "pcdvq-a16-v1"}
_MAGNITUDES = ("norm", "projection")
_BLOCKS = (0, *(1 << power for power in range(3, 11)))


@dataclass(frozen=True)
class Coding:
    """The codec of a packed module.

    Attributes:
        format: name of the format, as in `hf_pcdvq_kernels.FORMATS`.
        max_block: largest block of the rotation; 0 if there is none.
        seed: seed of its signs.
        parameters: the non-tensor arguments of the format's ops, as pairs.
        codebook, magnitude: of formats with a codebook; None for others.
    """

    format: str
    max_block: int
    seed: int
    parameters: tuple[tuple[str, Any], ...] = ()
    codebook: str | None = None
    magnitude: str | None = None

    @classmethod
    def described(cls, description: Any) -> Coding:
        """The coding that a record in a file describes.

        Raises:
            ValueError: the description is not complete, or holds an unknown field or value.
        """
        if not isinstance(description, dict) or not isinstance(description.get("setting"), str):
            raise ValueError(f"a codec must be described by an object with a setting, got {description!r:.200}")
        fields = dict(description)
        name = fields.pop("setting").removesuffix("-published")
        family = family_of(name)
        block, seed = fields.pop("hadamard_block", None), fields.pop("hadamard_seed", None)
        if type(block) is not int or block not in _BLOCKS:
            raise ValueError(f"hadamard_block must be 0 or a power of two from 8 to 1024, got {block!r:.100}")
        if type(seed) is not int or not 0 <= seed < 1 << 31:
            raise ValueError(f"hadamard_seed must be an integer from 0 to {(1 << 31) - 1}, got {seed!r:.100}")
        parameters = family.parameters(name)
        parameters |= {key: fields.pop(key) for key in parameters.keys() & fields.keys()}
        codebook = magnitude = None
        if family.table_specs(name):
            codebook, magnitude = fields.pop("codebook", _CODEBOOKS[name]), fields.pop("magnitude", "norm")
        if fields:
            raise ValueError(f"{name} has no field {', '.join(map(repr, sorted(fields)))}")
        coding = cls(name, block, seed, tuple(sorted(parameters.items())), codebook, magnitude)
        coding.check()
        return coding

    def check(self) -> None:
        """Raises ValueError: a parameter, the codebook or the magnitude is not one that the format has."""
        for key, default in self.family.parameters(self.format).items():
            if type(dict(self.parameters)[key]) is not type(default):
                raise ValueError(
                    f"{self.format}: {key} must be like {default!r}, got {dict(self.parameters)[key]!r:.100}"
                )
        specs = self.family.specs(self.format, self.family.row_multiple, self.family.multiple(self.format))
        tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in specs.items()}
        found = self.family(*self.arguments(tensors, {})).name
        if found != self.format:
            raise ValueError(f"what describes {self.format} is that of {found}: {dict(self.parameters)}")
        if self.codebook is not None:
            if self.magnitude not in _MAGNITUDES:
                raise ValueError(f"magnitude must be one of {', '.join(_MAGNITUDES)}, got {self.magnitude!r:.100}")
            self._codebook_tables()

    @property
    def family(self) -> type[PackedWeight]:
        """The description of the format's family."""
        return family_of(self.format)

    def tables(self, in_features: int) -> dict[str, Tensor]:
        """The constants that decoding needs, on the CPU: the codebook's, and `signs` if there is a rotation."""
        tables = {} if self.codebook is None else self._codebook_tables()
        block = self.block(in_features)
        return {**tables, "signs": signs(block, self.seed)} if block else tables

    def block(self, in_features: int) -> int:
        """Size of the blocks in which that many inputs are rotated; 0 if they are not."""
        return block_size(in_features, self.max_block) if self.max_block else 0

    def arguments(self, packed: dict[str, Tensor], tables: dict[str, Tensor]) -> list[Any]:
        """The arguments of the format's ops, in order, from tensors by argument."""
        values = {**packed, **tables, **dict(self.parameters)}
        return [values.get(argument.name) for argument in self.family.arguments]

    def _codebook_tables(self) -> dict[str, Tensor]:
        book = codebook(self.codebook)
        tables = {"patterns": book["patterns"], "levels": book[f"levels_{self.magnitude}"]}
        for name, (shape, _) in self.family.table_specs(self.format).items():
            if tuple(tables[name].shape) != shape:
                raise ValueError(f"the codebook {self.codebook!r} is not one of {self.format}")
        return tables


@cache
def codebook(name: str) -> dict[str, Tensor]:
    """The tensors of a shipped codebook, on the CPU. The result is shared: do not modify it.

    Raises:
        ValueError: no codebook with that id is shipped.
    """
    with torch.device("cpu"):  # vLLM makes another device the default while it builds a model
        return load(codebook_bytes(name))


def check_codebook(name: str, sha256: Any) -> None:
    """Raises ValueError: the installed codebook is not the one that the model was packed with."""
    found = codebook_digest(codebook(name))
    if sha256 != found:
        raise ValueError(
            f"the model was packed with a codebook {name!r} of SHA-256 {sha256!r:.100}, but the installed one has {found}; "
            "it would decode to different weights"
        )
