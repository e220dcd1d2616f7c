"""Which part of a packed weight a rank of a tensor-parallel group holds, and which weights lie in one tensor.

All of it follows from `PackedWeight`. Does not import vLLM.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .coding import Coding

# What vLLM calls the weights that it merges, in their order.
_SHARDS = {"q": 0, "k": 1, "v": 2}


class Span(NamedTuple):
    """Rows or inputs of a weight, from `start` to `stop` (exclusive)."""

    start: int
    stop: int


class Part(NamedTuple):
    """What a rank holds of a weight `[total_rows, total_columns]`."""

    rows: Span
    columns: Span
    total_rows: int
    total_columns: int


def shard_index(shard_id: str | int | None) -> int:
    """The place of a weight among those that vLLM merges into one layer.

    Raises:
        ValueError: it is not one weight, but several that a file holds as one.
    """
    if shard_id is None:
        return 0
    if isinstance(shard_id, int):
        return shard_id
    if shard_id not in _SHARDS:
        raise ValueError(f"a packed weight cannot be cut into the parts {shard_id!r} that vLLM asks for")
    return _SHARDS[shard_id]


def column_multiple(coding: Coding, columns: int) -> int:
    """Inputs of a weight with so many can be cut at multiples of this: whole blocks of the rotation, whole bytes."""
    return math.lcm(coding.family.column_multiple(coding.format), coding.block(columns) or 1)


def check_part(layer: str, coding: Coding, part: Part) -> None:
    """Raises ValueError: the part is not itself a packed weight with the same rotation; the message names the layer."""
    wanted = (
        ("outputs", part.rows, part.total_rows, coding.family.row_multiple),
        ("inputs", part.columns, part.total_columns, column_multiple(coding, part.total_columns)),
    )
    for kind, span, total, multiple in wanted:
        if span != (0, total) and (span.start % multiple or (span.stop % multiple and span.stop != total)):
            raise ValueError(
                f"{layer}: {coding.format} can be cut at multiples of {multiple} {kind}, but tensor parallelism needs "
                f"{span.start} to {span.stop} of {total}; use fewer ranks, or pipeline parallelism"
            )


def part_of(tensor: Tensor, argument: str, coding: Coding, part: Part) -> Tensor:
    """The part of one packed tensor of a weight. Scales of rows are replicated where inputs are cut."""
    specs = coding.family.specs
    first = specs(coding.format, part.rows.start, part.columns.start)[argument][0]
    last = specs(coding.format, part.rows.stop, part.columns.stop)[argument][0]
    return tensor[tuple(slice(start, stop) for start, stop in zip(first, last))]


def products(coding: Coding, rows: list[int]) -> list[list[int]]:
    """Weights with so many rows each, concatenated, in groups that are one packed weight.

    A group can go on after a weight only if that ends where weights may be cut: everywhere in most formats, in `stream` at
    the end of a ring.
    """
    groups: list[list[int]] = []
    for index in range(len(rows)):
        if groups and sum(rows[place] for place in groups[-1]) % coding.family.row_multiple == 0:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
