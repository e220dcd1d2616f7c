"""Every packed format, in one table. Each family of formats is described by a class, in the file named after it.

The codecs that write the formats (`hf_pcdvq/codecs/`) document them in prose, with their decode formulas. The classes
are here because the decoders may not import the plugin.
"""

from __future__ import annotations

from .base import Argument, Decode, PackedWeight, Specs
from .ccq import CcqWeight
from .int8 import Int8Weight
from .pcdvq import PcdvqWeight
from .stream import StreamWeight

FAMILIES: dict[str, type[PackedWeight]] = {
    described.family: described for described in (PcdvqWeight, CcqWeight, StreamWeight, Int8Weight)
}
FORMATS: dict[str, type[PackedWeight]] = {name: family for family in FAMILIES.values() for name in family.names}


def family_of(name: str) -> type[PackedWeight]:
    """The description of the family that a format belongs to, by the name of the format.

    Raises:
        ValueError: unknown format.
    """
    return _entry(FORMATS, "format", name)


def family_named(family: str) -> type[PackedWeight]:
    """The description of a family, by its name.

    Raises:
        ValueError: unknown family.
    """
    return _entry(FAMILIES, "family of formats", family)


def _entry(table: dict[str, type[PackedWeight]], kind: str, name: str) -> type[PackedWeight]:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; expected one of {', '.join(table)}")
    return table[name]


__all__ = ["FAMILIES", "FORMATS", "Argument", "Decode", "PackedWeight", "Specs", "family_named", "family_of"]
