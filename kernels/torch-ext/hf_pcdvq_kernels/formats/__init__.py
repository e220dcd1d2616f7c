"""Every packed format, in one table: a family of formats is described by its class, in the file of its name.

The formats themselves are described in words, with their decode formulas, in the codecs that write them
(`hf_pcdvq/codecs/`). The descriptions are here because the decoders may not import the plugin.
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
    """The description of a format's family, by the name of the format.

    Raises:
        ValueError: there is no such format.
    """
    return _entry(FORMATS, "format", name)


def family_named(family: str) -> type[PackedWeight]:
    """The description of a family.

    Raises:
        ValueError: there is no such family.
    """
    return _entry(FAMILIES, "family of formats", family)


def _entry(table: dict[str, type[PackedWeight]], kind: str, name: str) -> type[PackedWeight]:
    if name not in table:
        raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(table)}")
    return table[name]


__all__ = ["FAMILIES", "FORMATS", "Argument", "Decode", "PackedWeight", "Specs", "family_named", "family_of"]
