"""Names of modules as regular expressions for `overrides`: few, and short enough to read."""

from __future__ import annotations

import re

_LIMIT = 900  # characters of the numbers in one pattern; a pattern may have 1000


def patterns_of(names: list[str], prefix: str) -> list[str]:
    """Regular expressions that match exactly these modules.

    Args:
        names: full names of modules inside the list of decoder blocks `prefix`.

    Returns:
        For each name in a block one expression with the numbers of the blocks, `^model\\.layers\\.(0|7)\\.mlp\\.up_proj$`,
        or several where these are too many for one.
    """
    numbers: dict[str, list[str]] = {}
    for name in names:
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        numbers.setdefault(rest, []).append(number)
    found = []
    for rest, blocks in numbers.items():
        room = _LIMIT - len(re.escape(prefix)) - len(re.escape(rest))
        for some in _pieces(blocks, room):
            found.append(rf"^{re.escape(prefix)}\.({'|'.join(some)})\.{re.escape(rest)}$")
    return found


def _pieces(numbers: list[str], room: int) -> list[list[str]]:
    pieces: list[list[str]] = [[]]
    for number in numbers:
        if pieces[-1] and len("|".join([*pieces[-1], number])) > room:
            pieces.append([])
        pieces[-1].append(number)
    return pieces
